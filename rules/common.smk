from functools import cache

from snakemake.exceptions import WorkflowError

from ensdistill import InputError
from ensdistill.provenance import code_digest
from ensdistill.studies import read_configuration

try:
    CONFIGURATION = read_configuration(config)
except InputError as error:
    raise WorkflowError(str(error)) from None

STUDIES = CONFIGURATION.studies
RUN = CONFIGURATION.run
METHODS = sorted({method for study in STUDIES.values() for method in study.methods})

TABLES = ["csv", "md", "tex", "html"]


wildcard_constraints:
    study="|".join(STUDIES),
    method="|".join(METHODS),
    seed=r"\d+",


def teacher_files(study, pattern, count=None):
    """Files of the first `count` teachers of a study (all of the pool), {} being the network."""
    count = STUDIES[study].pool if count is None else count
    networks = [f"teachers/{seed}" for seed in range(count)]
    return [f"results/{study}/{pattern.format(network)}" for network in networks]


def student_files(study, pattern):
    """Files of a study's students, every method and seed, {} being the network."""
    seeds = range(STUDIES[study].student_seeds)
    networks = [f"students/{method}/{seed}" for method in STUDIES[study].methods for seed in seeds]
    return [f"results/{study}/{pattern.format(network)}" for network in networks]


def student_labels(wildcards):
    """The system of each of `student_files`."""
    study = STUDIES[wildcards.study]
    labels = [method.label for method in study.methods.values()]
    return [label for label in labels for _ in range(study.student_seeds)]


@cache
def code(script):
    """A parameter that changes when the library code that a rule's script uses changes."""
    return code_digest(workflow.source_path(f"../workflow_scripts/{script}.py"))


def training(wildcards, role, seed, ensemble_size):
    """The arguments of `train_network` that a study's configuration decides."""
    study = STUDIES[wildcards.study]
    return {
        "seed": seed,
        "network": study.network.model_dump(),
        "ensemble_size": ensemble_size,
        "precision": study.precision,
        **study.augmentation.model_dump(),
        **getattr(study, role).model_dump(),
        "origin": {
            "study": wildcards.study,
            "method": wildcards.get("method", role),
            "replicate": int(wildcards.seed),
        },
    }


def archive(wildcards):
    """The download that a study's images come from, if any."""
    source = STUDIES[wildcards.study].images.source
    downloaded = source in ("cifar10", "cifar100")
    return {"archive": f"results/downloads/{source}.tar.gz"} if downloaded else {}


def teachers_of_student(wildcards):
    """Weights of the teachers that a method learns from; none if it learns from labels."""
    study = STUDIES[wildcards.study]
    if study.methods[wildcards.method].objective == "cross_entropy":
        return []
    return teacher_files(wildcards.study, "{}/weights.safetensors", study.members)


def student_training(wildcards):
    """The arguments of `train_network` for a student."""
    study = STUDIES[wildcards.study]
    method = study.methods[wildcards.method]
    ensemble_size = study.members if method.network == "batch_ensemble" else 1
    # Seeds apart from the teachers', or a plain student would start as its teacher did. The same
    # for all methods, so that they are compared from the same start.
    seed = 1000 + int(wildcards.seed)
    return training(wildcards, "student", seed, ensemble_size)


def student_logits(wildcards):
    """Logits files of all students."""
    return student_files(wildcards.study, "logits/{}.h5")


def ensemble_logits(wildcards):
    """Logits files of the teachers that teach."""
    return teacher_files(wildcards.study, "logits/{}.h5", STUDIES[wildcards.study].members)


def confidence_bins(wildcards):
    """Bins of calibration errors and figures."""
    return STUDIES[wildcards.study].confidence_bins


def history_labels(wildcards):
    """The system of each file of `histories`."""
    return ["teacher"] * STUDIES[wildcards.study].pool + student_labels(wildcards)


def histories(wildcards):
    """Histories of all teachers and students, in the order of the results table."""
    teachers = teacher_files(wildcards.study, "{}/history.csv")
    return teachers + student_files(wildcards.study, "{}/history.csv")
