"""Recipes: how networks are trained, as config.yaml may say it."""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, create_model, model_validator

from ensdistill.sections import Count, Positive, Section, Share, one_of


class TrivialAugment(Section):
    """One random operation of random size for each image [Müller & Hutter 2021], the wide range."""

    name: Literal["trivial_augment"] = "trivial_augment"
    """Chooses this policy."""


class RandAugment(Section):
    """Several random operations of one size for each image [Cubuk et al. 2020]."""

    name: Literal["rand_augment"] = "rand_augment"
    """Chooses this policy."""
    operations: Count = 2
    """How many operations, one after the other."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Their size; 30 is the largest."""


AnyPolicy: TypeAlias = one_of(TrivialAugment, RandAugment)  # type: ignore[valid-type]  # made when it runs


def _range(value: list[float]) -> list[float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("the least share must be above 0, and not above the largest")
    return value


class Augmentation(Section):
    """Random changes to training images, drawn anew every epoch for each image."""

    later: ClassVar = frozenset({"random_resized_crop", "policy"})

    crop_padding: Annotated[int, Field(ge=0)] = 4
    """Pixels of zero padding before a random crop back to the image's size."""
    flip: bool = True
    """Whether half of the images are mirrored left to right."""
    random_resized_crop: (
        Annotated[list[Share], Field(min_length=2, max_length=2), AfterValidator(_range)] | None
    ) = None
    """For photographs, instead of `crop_padding`: a part that has a random share of the image's
    area, between these two such as [0.08, 1.0], is resized to the image's size; null for none."""
    policy: AnyPolicy | None = None
    """Operations of colour and shape after that, `trivial_augment` or `rand_augment`; null for
    none."""


class Recipe(Section):
    """How networks of one role are trained: an optimiser and its schedule."""

    later: ClassVar = frozenset({"optimizer"})

    epochs: Count = 300
    """Passes over the training split."""
    batch_size: Count = 64
    """Images per step; a BatchEnsemble of M members makes M rows of each."""
    learning_rate: Positive = 0.05
    """Peak learning rate; the BatchEnsemble factors r and s get half of it."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd`: stochastic gradient descent with momentum; `adamw`: Adam with decoupled weight decay,
    which transformers need, with a learning rate of about 0.001 and a weight decay of about
    0.05."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; β₁ of AdamW, whose β₂ is 0.999."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's; for SGD alone."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay; none on the BatchEnsemble factors r and s, and with AdamW none on biases and
    parameters of normalisations."""
    clip_norm: Positive | None = None
    """Largest norm of a step's gradients, all together; longer ones are scaled down to it."""
    schedule: Literal["warmup_linear", "cosine"] = "warmup_linear"
    """`warmup_linear`: 1 until half of the epochs, linearly to 0.01 at 90 %, then 0.01;
    `cosine`: half a cosine to 0. Both after the warm-up."""
    warmup_epochs: Count = 5
    """Epochs in which the learning rate grows linearly from 0.01 of its peak to its peak."""
    validate_every: Count = 30
    """Epochs between validations; the last tenth of the epochs is always validated, and the
    network with the best validation accuracy is kept."""

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError("'warmup_epochs' is larger than 'epochs'")
        return self

    @model_validator(mode="after")
    def _momentum_is_the_optimizer_s(self) -> Self:
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError("'nesterov' goes with the optimizer 'sgd' alone")
        return self


class _Changes(Section):
    published: bool = False
    """Whether what it does not set is that of the method's source, α and τ of the loss too; else it
    is the study's."""

    @model_validator(mode="before")
    @classmethod
    def _published(cls, value: Any) -> Any:
        return {"published": True} if value == "published" else value


_OR_NULL: dict[str, Any] = {
    name: (
        Annotated[(field.annotation, Field(), *field.metadata)] | None,
        Field(None, description=field.description),
    )
    for name, field in Recipe.model_fields.items()
}


class RecipeChanges(create_model("_All", __base__=_Changes, **_OR_NULL)):  # type: ignore[misc]
    """Settings of a recipe that differ, null for the study's; or `published`."""
