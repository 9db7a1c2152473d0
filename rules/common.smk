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


def student_files(study, method, pattern):
    """Files of a method's students of every seed, {} being the network."""
    networks = [f"students/{method}/{seed}" for seed in range(STUDIES[study].student_seeds)]
    return [f"results/{study}/{pattern.format(network)}" for network in networks]


def all_student_files(study, pattern):
    """Files of all students, grouped by the label of their method."""
    return {
        method.label: student_files(study, name, pattern)
        for name, method in STUDIES[study].methods.items()
    }


@cache
def code(script):
    """A parameter that changes when the library code that a rule's script uses changes."""
    return code_digest(workflow.source_path(f"../workflow_scripts/{script}.py"))


def training(wildcards, role, system, seed, ensemble_size):
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
            "system": system,
            "replicate": int(wildcards.seed),
        },
    }
