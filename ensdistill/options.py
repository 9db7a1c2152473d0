"""What config.yaml may say of the three axes of a method: their options and traits.

What is trained (a student), what it minimises (an objective) and at which inputs the teachers are
asked (a perturbation). config.yaml names each, alone or with its own options: `perturbation: ods`,
or `perturbation: {name: ods, eta: 4/255}`. What is computed under these names is in students.py,
objectives.py and perturbations.py. The Snakefile reads this module in every process, so it does not
import PyTorch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ensdistill.architectures import NamedArchitecture
from ensdistill.sections import Count, Eta, Positive, Section, Share, one_of

# --- students --------------------------------------------------------------------------------

LOGITS = "a student with logits of its own"
MEMBERS = "a student with members"
ONE = "a student that is one network"
GAUSSIAN = "a student that predicts a Gaussian over logits"
FLOW = "a student that learns a flow over logits"
"""What an objective can need of a student, as sentences call it."""


class StudentOptions(Section):
    """Traits of a student, and options that every one has."""

    name: str
    """Chooses the student."""

    offers: ClassVar[frozenset[str]]
    """Which needs of objectives it meets."""
    own_objective: ClassVar[str]
    """The objective of a method that names none."""
    any_architecture: ClassVar[bool] = True
    """Whether it can be made of a library's network."""
    counts_teachers: ClassVar[bool] = False
    """Whether it is built for so many teachers; so is every student with members."""
    title: ClassVar[str]
    """In labels of a grid."""
    title_of_labels: ClassVar[str] = ""
    """In labels of a grid, where it learns from labels alone, if that differs."""
    published: ClassVar[Mapping[str, Any]] = {}
    """The recipe of its source, with α and τ (`alpha`, `temperature`)."""

    architecture: NamedArchitecture | None = None
    """The architecture of this method's students; the study's unless told."""

    @property
    def has_members(self) -> bool:
        """Whether it has as many members as there are teachers, so that each can learn from one."""
        return MEMBERS in self.offers


class Single(StudentOptions):
    """One ordinary network."""

    offers = frozenset({LOGITS, ONE})
    own_objective = "ensemble_mean"
    title = "KD-single"
    title_of_labels = "Single"

    name: Literal["single"] = "single"
    """Chooses this student."""


class BatchEnsemble(StudentOptions):
    """M members that share one set of weights and differ by rank-one factors."""

    later = frozenset({"init", "std"})
    offers = frozenset({LOGITS, MEMBERS})
    own_objective = "one_to_one"
    title = "KD"
    title_of_labels = "BE"

    name: Literal["batch_ensemble"] = "batch_ensemble"
    """Chooses this student."""
    init: Literal["normal", "signs", "ones"] = "normal"
    """How the factors r and s begin: N(1, std²), random signs, or all 1. Of pretrained weights much
    is lost by the first two, unless `std` is small."""
    std: Positive = 0.5
    """Standard deviation of normal factors."""


_LATENT: dict[str, Any] = {"epochs": 200, "batch_size": 128, "learning_rate": 0.1, "momentum": 0.9}
_LATENT |= {"nesterov": True, "weight_decay": 5e-4, "schedule": "cosine", "warmup_epochs": 5}
_LATENT |= {"alpha": 1.0, "temperature": 4.0}
"""Of github.com/cs-giung/distill-latentbe, whose baseline is one network."""


class LatentBatchEnsemble(StudentOptions):
    """A BatchEnsemble in training whose factors are averaged into one ordinary network."""

    offers = frozenset({LOGITS, MEMBERS})
    own_objective = "one_to_one"
    title = "LatentBE"
    published = _LATENT

    name: Literal["latent_batch_ensemble"] = "latent_batch_ensemble"
    """Chooses this student."""


class Hydra(StudentOptions):
    """A trunk that all members share, and a head for each."""

    offers = frozenset({LOGITS, MEMBERS})
    own_objective = "one_to_one"
    title = "Hydra"
    published: ClassVar = {
        **{"epochs": 200, "batch_size": 32, "learning_rate": 0.01, "momentum": 0.9},
        **{"nesterov": True, "weight_decay": 1e-4, "alpha": 1.0, "temperature": 5.0},
    }

    name: Literal["hydra"] = "hydra"
    """Chooses this student."""
    cut: str = "stage"
    """What a head is: the last stage and all behind it, the linear layer alone (`linear`), or the
    module of that name and all behind it, such as `blocks.2`. A library's architecture has no
    `stage`."""
    together: Share = 0.5
    """Share of the training in which one head learns for all; the others then start as copies."""


class MIMO(StudentOptions):
    """One network that takes M images at once and answers for each."""

    offers = frozenset({LOGITS, MEMBERS})
    own_objective = "labels"
    title = "KD-MIMO"
    title_of_labels = "MIMO"

    name: Literal["mimo"] = "mimo"
    """Chooses this student."""


class Packed(StudentOptions):
    """M narrow networks side by side in grouped convolutions."""

    any_architecture = False
    offers = frozenset({LOGITS, MEMBERS})
    own_objective = "labels"
    title = "KD-Packed"
    title_of_labels = "Packed"

    name: Literal["packed"] = "packed"
    """Chooses this student."""
    widen: Positive = 2.0
    """A member has `widen`/M of the architecture's width (α in the paper)."""
    groups: Count = 1
    """Groups of a member's own convolutions (γ in the paper)."""


class SampledOptions(StudentOptions):
    """Options of students that predict by samples of logits."""

    samples: Count = 32
    """S: samples of logits that make a prediction; drawn once, and stored with the weights."""


class GaussianLogits(SampledOptions):
    """One network that predicts a Gaussian over the teachers' logits (DLF)."""

    offers = frozenset({GAUSSIAN})
    own_objective = "gaussian_likelihood"
    counts_teachers = True
    title = "DLF"
    published: ClassVar = {
        **{"epochs": 200, "batch_size": 128, "nesterov": True},
        **{"weight_decay": 5e-4, "schedule": "cosine"},
    }

    name: Literal["gaussian_logits"] = "gaussian_logits"
    """Chooses this student."""
    rank: Count = 8
    """q: columns of the factors by which logits covary over images."""


class FlowMatching(SampledOptions):
    """A flow from noise to the teachers' logits, beside another method's student (EDFM)."""

    offers = frozenset({FLOW})
    own_objective = "flow_matching"
    title = "EDFM"
    # For CIFAR-10: 1e-4 and 5e-4 for a sum over classes, where our objective has a scaled mean.
    published: ClassVar = {
        **{"epochs": 1000, "batch_size": 256, "learning_rate": 0.016},
        **{"momentum": 0.9, "weight_decay": 3e-6},
    }

    name: Literal["flow_matching"] = "flow_matching"
    """Chooses this student."""
    backbone: str
    """The method whose student of the same seed gives the features; that must be one network."""
    width: Count = 256
    """Units of the velocity's layers."""


# --- objectives ------------------------------------------------------------------------------


class ObjectiveOptions(Section):
    """The traits of an objective."""

    name: str
    """Chooses the objective."""

    needs: ClassVar[str] = LOGITS
    """What it needs of a student."""
    needs_teachers: ClassVar[bool] = True
    """Whether teachers are asked."""
    has_labels: ClassVar[bool] = True
    """Whether labels teach too, at the images as they are."""
    prediction: ClassVar[Mapping[str, Any]] = {"prediction": "mixture"}
    """What a student's logits mean: a key of `predictions.PREDICTIONS`, and its parameters."""
    title: ClassVar[str] = ""
    """In labels of a grid, instead of the student's."""
    published: ClassVar[Mapping[str, Any]] = {}
    """As a student's."""


class Labels(ObjectiveOptions):
    """Cross-entropy with the labels."""

    needs_teachers = False

    name: Literal["labels"] = "labels"
    """Chooses this objective."""


class DistillationOptions(ObjectiveOptions):
    """Options of a loss with teachers; what a method does not set is the study's."""

    alpha: Share | None = None
    """α: weight of the teachers against the labels."""
    temperature: Positive | None = None
    """τ: temperature of the softmax, in the loss and in the perturbation."""


class OneToOne(DistillationOptions):
    """Teacher j teaches member j."""

    needs = MEMBERS

    name: Literal["one_to_one"] = "one_to_one"
    """Chooses this objective."""


class EnsembleMean(DistillationOptions):
    """The teachers' mean probabilities teach every member."""

    published = _LATENT

    name: Literal["ensemble_mean"] = "ensemble_mean"
    """Chooses this objective."""


class Dirichlet(ObjectiveOptions):
    """Likelihood of the teachers' probabilities under a Dirichlet distribution (EnD²)."""

    needs = ONE
    has_labels = False
    prediction: ClassVar = {"prediction": "dirichlet", "concentration_offset": 0.0}
    title = "EnD²"

    name: Literal["dirichlet"] = "dirichlet"
    """Chooses this objective."""
    first_temperature: Positive = 10.0
    """τ of student and teachers in the first half of the training; it falls to 1 in the second."""


class ProxyDirichlet(ObjectiveOptions):
    """Divergence from a Dirichlet distribution that is made of the teachers (Proxy-EnD²)."""

    needs = ONE
    has_labels = False
    prediction: ClassVar = {"prediction": "dirichlet", "concentration_offset": 1.0}
    title = "Proxy-EnD²"
    published: ClassVar = {
        **{"epochs": 250, "batch_size": 128, "learning_rate": 0.05, "weight_decay": 5e-4},
        **{"temperature": 2.0},
    }

    name: Literal["proxy_dirichlet"] = "proxy_dirichlet"
    """Chooses this objective."""
    temperature: Positive | None = None
    """τ: temperature of student and teachers; the study's unless told."""
    direction: Literal["reverse", "forward"] = "reverse"
    """KL(student ‖ proxy), or KL(proxy ‖ student)."""


class GaussianLikelihood(ObjectiveOptions):
    """Likelihood of the teachers' logits, a step of expectation maximisation at a time (DLF)."""

    needs = GAUSSIAN
    has_labels = False

    name: Literal["gaussian_likelihood"] = "gaussian_likelihood"
    """Chooses this objective."""


class FlowMatchingLoss(ObjectiveOptions):
    """Squared error of the velocity that leads from noise to a teacher's logits (EDFM)."""

    needs = FLOW
    has_labels = False

    name: Literal["flow_matching"] = "flow_matching"
    """Chooses this objective."""


# --- perturbations ---------------------------------------------------------------------------


class PerturbationOptions(Section):
    """The traits of a perturbation."""

    name: str
    """Chooses the perturbation."""

    moves: ClassVar[bool] = True
    """Whether x_distill is not x."""
    needs_teaching: ClassVar[str] = ""
    """What the objective must need, if that matters: where each teacher has images of its own, each
    must teach a member."""
    needs_held_out: ClassVar[bool] = False
    """Whether it takes images that nothing else uses."""
    title: ClassVar[str]
    """In figures, and in labels of a grid."""

    def is_single_pass(self) -> bool:
        """Whether the labels teach at the perturbed images."""
        return False

    def teacher_gradients(self, members: int) -> int:
        """Gradients of teachers' outputs with respect to their input in a step."""
        return 0

    def needs_of_student(self) -> str:
        """What it needs of a student, if anything."""
        return ""


class NoPerturbation(PerturbationOptions):
    """The images as they are."""

    moves = False
    title = ""

    name: Literal["none"] = "none"
    """Chooses this perturbation."""


class StepOptions(PerturbationOptions):
    """Options of a step away from the image, which keeps its label."""

    eta: Eta | None = None
    """η: root-mean-square size of the step per pixel, in units of the pixel range [0, 1]; the
    study's unless told."""
    single_pass: bool = False
    """Whether the labels teach at the perturbed images too, so that the student passes once."""

    def is_single_pass(self) -> bool:
        return self.single_pass


class Gaussian(StepOptions):
    """Gaussian noise of standard deviation η."""

    title = "Gaussian"

    name: Literal["gaussian"] = "gaussian"
    """Chooses this perturbation."""


class _OutputDiversified(StepOptions):
    """A step of size η in a direction that diversifies a teacher's output."""

    name: str
    temperature: Positive | None = None
    """τ of the softmax that is diversified; that of the objective unless told."""

    def teacher_gradients(self, members: int) -> int:
        return 1


class ODS(_OutputDiversified):
    """A step of size η in a direction that diversifies one teacher's output."""

    title = "ODS"

    name: Literal["ods"] = "ods"
    """Chooses this perturbation."""


class ConfODS(_OutputDiversified):
    """ODS times the teacher's confidence."""

    title = "ConfODS"

    name: Literal["conf_ods"] = "conf_ods"
    """Chooses this perturbation."""


class ODSEach(_OutputDiversified):
    """ODS from every teacher: each teaches its member where its own output is diversified."""

    needs_teaching = MEMBERS
    title = "ODS-each"

    name: Literal["ods_each"] = "ods_each"
    """Chooses this perturbation."""

    def teacher_gradients(self, members: int) -> int:
        return members


class TDivSDiv(StepOptions):
    """A step that makes two teachers differ, and the two members that they teach agree."""

    title = "TDiv–SDiv"

    name: Literal["tdiv_sdiv"] = "tdiv_sdiv"
    """Chooses this perturbation."""
    sdiv: bool = True
    """Whether the students' part counts; without it any student will do."""

    def teacher_gradients(self, members: int) -> int:
        return 1

    def needs_of_student(self) -> str:
        return MEMBERS if self.sdiv else ""


class Mixup(PerturbationOptions):
    """Mixtures of two images of the batch."""

    title = "mixup"

    name: Literal["mixup"] = "mixup"
    """Chooses this perturbation."""
    beta: Positive = 0.4
    """Both parameters of the Beta distribution of the second image's share."""


class HeldOut(PerturbationOptions):
    """Images that no teacher was trained on and nothing else uses: `images.held_out`."""

    needs_held_out = True
    title = "held-out"

    name: Literal["held_out"] = "held_out"
    """Chooses this perturbation."""


# --- the axes --------------------------------------------------------------------------------

AnyStudent = one_of(
    BatchEnsemble, Single, LatentBatchEnsemble, Hydra, MIMO, Packed, GaussianLogits, FlowMatching
)
AnyObjective = one_of(
    OneToOne,
    EnsembleMean,
    Labels,
    Dirichlet,
    ProxyDirichlet,
    GaussianLikelihood,
    FlowMatchingLoss,
)
AnyPerturbation = one_of(NoPerturbation, Gaussian, ODS, ConfODS, ODSEach, TDivSDiv, Mixup, HeldOut)
