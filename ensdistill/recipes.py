"""Recipes: how networks are trained, as config.yaml may say it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from ensdistill.sections import Count, Positive, Section


class Recipe(Section):
    """How networks of one role are trained: stochastic gradient descent and its schedule."""

    epochs: Count = 300
    """Passes over the training split."""
    batch_size: Count = 64
    """Images per step; a BatchEnsemble of M members makes M rows of each."""
    learning_rate: Positive = 0.05
    """Peak learning rate; the BatchEnsemble factors r and s get half of it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay; none on the BatchEnsemble factors r and s."""
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


class _Changes(Section):
    """Settings of a recipe that differ, null for the study's; or `published`."""

    published: bool = False
    """Whether what it does not set is that of the method's source, α and τ of the loss too; else it
    is the study's."""

    @model_validator(mode="before")
    @classmethod
    def _published(cls, value: Any) -> Any:
        return {"published": True} if value == "published" else value


RecipeChanges = create_model(
    "RecipeChanges",
    __base__=_Changes,
    __doc__=_Changes.__doc__,
    **{
        name: (
            Annotated[(field.annotation, Field(), *field.metadata)] | None,
            Field(None, description=field.description),
        )
        for name, field in Recipe.model_fields.items()
    },
)
