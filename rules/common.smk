import errno
import hashlib
import json
import math
import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import quote

from snakemake.exceptions import WorkflowError

from ensdistill import InputError
from ensdistill.downloads import ANSWERS, ARCHIVES, HUMAN_ANSWERS, OFFICIAL_CORRUPTIONS, SOURCES
from ensdistill.digests import PACKAGE, code_digest, text_digest
from ensdistill.architectures import ARCHITECTURES, LIBRARIES, parse_architecture
from ensdistill.methods import named
from ensdistill.options import AnyStudent
from ensdistill.own_data import known_state
from ensdistill.predictions import PREDICTIONS
from ensdistill.reports import results
from ensdistill.studies import read_configuration
from ensdistill.workflow import folder

try:
    CONFIGURATION = read_configuration(config)
except InputError as error:
    raise WorkflowError(str(error)) from None

# Where a file lies: `results/…`, or below the prefix under which another workflow uses this one.
# Snakemake does this to the inputs, outputs, logs and benchmarks of rules; all else does it here.
placed = workflow.modifier.path_modifier.replace_prefix

STUDIES = CONFIGURATION.studies
RUN = CONFIGURATION.run
METHODS = sorted({method for study in STUDIES.values() for method in study.methods})

TABLES = [*(f"results.{ending}" for ending in ("csv", "md", "tex", "html")), "wide.md", "wide.html"]
RESULTS = results()
FIGURES = [name for name, result in RESULTS.items() if result.has_figure]
# What the first page is made of.
FINAL = [
    "tables/results.csv",
    "findings.csv",
    "claims.csv",
    *(f"figures/{name}.png" for name in FIGURES),
]


wildcard_constraints:
    study="|".join(STUDIES),
    method="|".join(METHODS),
    seed=r"\d+",


def teacher_files(study, pattern, count=None):
    """Files of the first `count` teachers of a study (all of the pool), {} being the network."""
    count = STUDIES[study].pool if count is None else count
    networks = [f"teachers/{seed}" for seed in range(count)]
    return [f"results/{study}/{pattern.format(network)}" for network in networks]


def trained_files(study, pattern):
    """Files of a study's students, every method and seed, {} being the network."""
    seeds = range(STUDIES[study].student_seeds)
    networks = [f"students/{method}/{seed}" for method in STUDIES[study].methods for seed in seeds]
    return [f"results/{study}/{pattern.format(network)}" for network in networks]


def trained_labels(wildcards):
    """The system of each of `trained_files`."""
    study = STUDIES[wildcards.study]
    labels = [method.label for method in study.methods.values()]
    return [label for label in labels for _ in range(study.student_seeds)]


def student_files(study, pattern):
    """Files of students, and behind them of what is judged beside, as far as it has such files."""
    return [*trained_files(study, pattern), *judged_files(study, pattern)]


def student_labels(wildcards):
    """The system of each of `student_files`; where these are fewer, of the first."""
    beside = [it.label for it in judged(STUDIES[wildcards.study]).values() for _ in it.files]
    return [*trained_labels(wildcards), *beside]


@cache
def code(script, files=(), **chosen):
    """A parameter that changes when a rule's script or the library code that it uses changes.

    `chosen` is what the script takes by name, as `code_digest` has it; `files` are Python files of
    the user's that architectures come from.
    """
    digest = code_digest(workflow.source_path(f"../workflow_scripts/{script}.py"), **chosen)
    return f"{digest} {text_digest(*files)}" if files else digest


def training(wildcards):
    """The arguments of `train_student`, or of `adopt`, that a study's configuration decides."""
    study = STUDIES[wildcards.study]
    method = method_of(wildcards)
    if elsewhere := elsewhere_of(wildcards):
        return adopting(wildcards, elsewhere)
    recipe = study.recipe(method) if method else study.teacher
    # Seeds apart from the teachers', or a single student would start as its teacher did. The same
    # for all methods, so that they are compared from the same start.
    seed = int(wildcards.seed) + (1000 if method else 0)
    return {
        "seed": seed,
        "parts": parts_of(wildcards),
        "recipe": recipe.model_dump(),
        "augmentation": study.augmentation.model_dump(),
        "precision": study.precision,
        **({"cuda_graphs": True} if study.cuda_graphs else {}),
        "origin": {
            "study": wildcards.study,
            "method": method or "teacher",
            "replicate": int(wildcards.seed),
        },
    }


def entries(*parts):
    """Which entries of the registries some `Study.parts` use; their code alone counts."""
    architectures = [parse_architecture(it["architecture"]["name"]) for it in parts]
    files = {given["path"] for _, given in architectures if "path" in given}
    for path in files:
        if not os.path.exists(path):
            raise WorkflowError(f"config.yaml: the architecture file {path} does not exist")
    return {
        "ARCHITECTURES": tuple(sorted({family for family, _ in architectures})),
        "STUDENTS": tuple(sorted({it["student"]["name"] for it in parts})),
        **({"files": tuple(sorted(files))} if files else {}),
    }


def training_code(wildcards):
    """A parameter that changes when code changes that trains or adopts this network."""
    if elsewhere := elsewhere_of(wildcards):
        return code("train", MAKERS=("adopted",), **entries_of(wildcards))
    study = STUDIES[wildcards.study]
    check_sources(study)
    parts = parts_of(wildcards)
    method = study.methods.get(method_of(wildcards))
    asked = study.parts_of_pool() if method and method.objective.needs_teachers else []
    backbone = [study.parts(parts["backbone"])] if "backbone" in parts else []
    return code(
        "train",
        MAKERS=("trained",),
        **entries(parts, *asked, *backbone),
        OBJECTIVES=(parts["objective"]["name"],),
        PERTURBATIONS=(parts["perturbation"]["name"],),
        PROBS=(parts["prediction"],),
    )


def network_code(wildcards):
    """A parameter that changes when code changes that computes a network's logits."""
    return code("logits", **entries_of(wildcards))


def analysis_code(function, sized=False):
    """A parameter function: it changes with a function of ensdistill.analysis and what it uses."""

    def digest(wildcards):
        study = STUDIES[wildcards.study]
        used = entries(*study.parts_of_pool())
        perturbations = ("none", *study.perturbations(sized))
        return code("analyse", analysis=(function,), PERTURBATIONS=perturbations, **used)

    return digest


def distances_code(wildcards):
    """A parameter that changes when code changes that compares Jacobians of all networks."""
    return code("distances", **entries_of_all(STUDIES[wildcards.study]))


def cost_of(study, method=None, teacher=0):
    """What decides the cost of a method's students, or of a teacher.

    Of a number such as η or τ it only matters whether it is 0: a changed one times nothing anew.
    """
    parts = study.parts(method, teacher)
    recipe = study.recipe(method) if method else study.teacher
    kept = ["student", "members", "architecture", "backbone", "single_pass", "held_out"]
    axes = {
        axis: {
            key: float(value != 0) if isinstance(value, float) else value
            for key, value in parts[axis].items()
        }
        for axis in ("objective", "perturbation")
    }
    learns = method and study.methods[method].objective.needs_teachers
    return {
        "parts": {**{key: parts[key] for key in kept if key in parts}, **axes},
        "teachers": study.members if learns else 0,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        **({"label": study.methods[method].label} if method else {}),
    }


def systems_of(wildcards):
    """The arguments of `cost_table` that a study's configuration decides."""
    study = STUDIES[wildcards.study]
    return {
        "teacher": cost_of(study),
        "methods": {method: cost_of(study, method) for method in study.methods},
        "pool": study.pool,
        "time_limit": study.costs.seconds,
        **costs_elsewhere(study),
    }


def costs_code(wildcards):
    """A parameter that changes when code changes that a study's systems predict or learn by."""
    study = STUDIES[wildcards.study]
    parts = [study.parts(), *map(study.parts, study.methods)]
    objectives, perturbations = (
        tuple(sorted({it[axis]["name"] for it in parts})) for axis in ("objective", "perturbation")
    )
    used = entries_of_all(study)
    return code("costs", **used, OBJECTIVES=objectives, PERTURBATIONS=perturbations)


@cache
def first_page():
    """Parameters of the first page: what is on it, what it looks like, and its code."""
    captions = Path(os.path.relpath(folder()), "report")  # of Snakemake's report, too
    look = [it for it in (PACKAGE / "page").iterdir() if it.suffix in (".jinja", ".css", ".js")]
    return {
        "study": on_the_page,
        "titles": {name: RESULTS[name].title for name in FIGURES},
        "captions": str(captions),
        "look": text_digest(*look, *(captions / f"{name}.rst" for name in FIGURES)),
        "code": code("page"),
    }


def on_the_page(wildcards):
    """What the first page says of a study's configuration."""
    study = STUDIES[wildcards.study]
    labels = {name: method.label for name, method in study.methods.items()}
    unused = {"methods", "grid", "published", "deploy", "gpus_per_job"}
    return study.model_dump(exclude=unused) | {"methods": labels}


def judging_code(script, beside=True, **chosen):
    """A parameter function: it changes with code that judges the predictions of a study.

    Also with that of what is judged beside the students, if it reads that.
    """

    def digest(wildcards):
        study = STUDIES[wildcards.study]
        check_sources(study)
        systems = (study.parts(), *map(study.parts, study.methods))
        kinds = {parts["prediction"] for parts in systems}
        kinds |= {*PREDICTIONS} if study.judge and beside else set()  # their files say which
        return code(script, PREDICTIONS=tuple(sorted(kinds)), **chosen)

    return digest


def parts_of(wildcards):
    """The parts of a job's network, as far as the configuration says them; else of a teacher."""
    study, method = STUDIES[wildcards.study], method_of(wildcards)
    if elsewhere := elsewhere_of(wildcards):
        return adopted_parts(study, elsewhere)
    return known_parts(wildcards.study, method, place_of(wildcards) if study.teachers else 0)


@cache
def known_parts(study, method, place):
    """The parts of a method, or of a teacher: the same for all seeds."""
    return STUDIES[study].parts(method) if method else STUDIES[study].parts(teacher=place)


def place_of(wildcards):
    """Which teacher or seed a job is about; the first, if it is about none alone."""
    return int(Path(wildcards.get("network", wildcards.get("seed", "0"))).name)


def method_of(wildcards):
    """The method of a job's student; None for a teacher."""
    role, *rest = Path(wildcards.get("network", ".")).parts or [""]
    return rest[0] if role == "students" else wildcards.get("method")


def archives_of(*sections):
    """The downloads that the sources of a study's sections are read from, if any."""
    sources = dict.fromkeys(section.source for section in sections)
    archives = [archive for it in sources if it in SOURCES for archive in SOURCES[it].archives]
    return [f"results/downloads/{archive}" for archive in archives]


def reading_code(script, *sections):
    """A parameter that changes with code that reads the sources of a study's sections."""
    known = sorted({section.source for section in sections} & SOURCES.keys())
    readers = sorted({SOURCES[it].reader for it in known})
    return code(script, sources=tuple(readers), SOURCES=tuple(known))


@cache
def own_data(study):
    """A parameter that changes when a study's own images do, and where that is noted; else None."""
    images = STUDIES[study].images
    return state_of(f"{study}-images", images, labelled=True) if images.path else None


@cache
def own_others(study):
    """The same of its own images out of distribution, by the name of their set."""
    return {
        others.name: state_of(f"{study}-out_of_distribution-{others.name}", others, labelled=False)
        for others in STUDIES[study].out_of_distribution
        if others.path
    }


def state_of(name, section, labelled):
    """What is known of a section's own images, and where that is noted."""
    place = placed(f"results/{name}.json").removeprefix("results/")
    record = f".snakemake/own_data/{quote(place, safe=' ')}"
    columns = section.columns.model_dump() if labelled else None
    state = known_state(record, section.path, labelled=labelled, columns=columns)
    return {"record": record, "state": state}


def official_corruptions(wildcards):
    """The download of a study's corrupted images, unless they are made here."""
    study = STUDIES[wildcards.study]
    if study.corruptions.source != "official":
        return []
    return [f"results/downloads/{OFFICIAL_CORRUPTIONS[study.images.source]}"]


def human_answers(wildcards):
    """The download of what people answered of a study's test images, if they are the asked ones."""
    images = STUDIES[wildcards.study].images
    if images.source not in HUMAN_ANSWERS or images.test is not None:
        return []
    return [f"results/downloads/{HUMAN_ANSWERS[images.source]}"]


def shift(wildcards):
    """What decides a study's shifted images."""
    study = STUDIES[wildcards.study]
    sections = study.model_dump(include={"corruptions", "out_of_distribution"})
    return {**sections, "seed": study.images.seed}


def teachers_of_student(wildcards):
    """Weights of the teachers that a method learns from; none if it learns from labels."""
    study = STUDIES[wildcards.study]
    if not study.methods[wildcards.method].objective.needs_teachers:
        return []
    return teacher_files(wildcards.study, "{}/weights.safetensors", study.members)


def logits_of_teachers(wildcards):
    """Logits of the teachers that a method learns from; none if it learns from labels."""
    study = STUDIES[wildcards.study]
    if not study.methods[wildcards.method].objective.needs_teachers:
        return []
    return teacher_files(wildcards.study, "logits/{}.h5", study.members)


def cards(study):
    """The cards that a study's configuration asks for: of the first student of each method."""
    methods = STUDIES[study].deploy.methods
    return [f"results/{study}/deployed/{method}/0/README.md" for method in methods]


def exported(wildcards):
    """The exported file that a card tells of: if the study asks for it, or if there is one."""
    path = "results/{study}/deployed/{method}/{seed}/model.onnx".format(**wildcards)
    exists = os.path.exists(placed(path))
    return [path] if STUDIES[wildcards.study].deploy.export or exists else []


def backbone_of_student(wildcards):
    """Weights of the student of the same seed that a student starts from, if it does."""
    backbone = STUDIES[wildcards.study].backbone(wildcards.method)
    if backbone is None:
        return []
    return [f"results/{wildcards.study}/students/{backbone}/{wildcards.seed}/weights.safetensors"]


def of_pool(pattern):
    """An input function: files of all teachers, {} being the network."""
    return lambda wildcards: teacher_files(wildcards.study, pattern)


def of_ensemble(pattern):
    """An input function: files of the teachers that teach."""
    return lambda wildcards: teacher_files(
        wildcards.study, pattern, STUDIES[wildcards.study].members
    )


def of_trained(pattern):
    """An input function: files of the students that are trained here."""
    return lambda wildcards: trained_files(wildcards.study, pattern)


def of_students(pattern):
    """An input function: files of all students, in the order of the results table."""
    return lambda wildcards: student_files(wildcards.study, pattern)


def result_input(pattern):
    """Files that a result reads, as `ensdistill.reports` explains: a path or an input function."""
    if pattern == "{human}":
        return human_answers
    for mark, files in (
        ("{pool}", of_pool),
        ("{ensemble}", of_ensemble),
        ("{students}", of_students),
    ):
        if mark in pattern:
            return files(pattern.replace(mark, "{}"))
    return f"results/{{study}}/{pattern}"


def reported(study):
    """The files of a study for the report that exist, with all that Snakemake then looks for."""
    table = ["tables/results.csv", "tables/results.html", "tables/wide.html"]
    needed = {name: table for name in table}
    needed |= {page: [page] for page in ("claims.html", "findings.html")}
    for name in FIGURES:
        figure = f"figures/{name}.png"
        of_table = "tables/results.csv" in RESULTS[name].drawn_from
        needed[figure] = [figure, *(table if of_table else [])]
    needed["index.html"] = ["index.html", *{file for files in needed.values() for file in files}]
    return [
        f"results/{study}/{name}"
        for name, files in needed.items()
        if all(os.path.exists(placed(f"results/{study}/{file}")) for file in files)
    ]


def final_state(wildcards):
    """A parameter that changes with the final files of a study, whichever there are by now."""
    files = [Path(placed(f"results/{wildcards.study}/{name}")) for name in FINAL]
    stats = [(str(it), it.stat().st_size, it.stat().st_mtime_ns) for it in files if it.exists()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def settings_of(names):
    """A parameter function: those settings of a study that a result takes."""

    def settings(wildcards):
        study = STUDIES[wildcards.study]
        known = {
            "n_bins": study.confidence_bins,
            "members": study.members,
            "sets": [others.name for others in study.out_of_distribution],
            "labels": labels_of_weights(study),
            "families": study.families(),
            **({"judged": [it.label for it in judged(study).values()]} if study.judge else {}),
            "paper": {
                method.paper: {"name": name, "label": method.label}
                for name, method in study.methods.items()
                if method.paper
            },
        }
        return {name: known[name] for name in names if name in known}

    return settings


def distillation(wildcards):
    """The study's η and τ."""
    return STUDIES[wildcards.study].distillation.model_dump(include={"eta", "temperature"})


def perturbation_titles(sized=False):
    """A parameter function: what figures call a study's perturbations."""
    return lambda wildcards: STUDIES[wildcards.study].perturbation_titles(sized)


def eta_sweep(wildcards):
    """Sizes η around the study's own, for the perturbations that have a size."""
    study = STUDIES[wildcards.study]
    eta = study.distillation.eta or 1 / 255
    return {
        "etas": [eta * factor for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)],
        "perturbations": study.perturbations(sized=True),
    }


# What a job asks a cluster's scheduler for; local runs pay no heed. Everything is asked for
# anew at each attempt, times its number: what was too little is more the next time.

FLOPS = 4e12
"""Additions and multiplications per second that networks are assumed to reach: a quarter of what
a V100, a card of 2017, can do in float32. A CPU core reaches a thirtieth of it."""


def short(wildcards):
    """The group of a short job, where a profile puts such jobs together (`group-components`).

    Elsewhere there is none: with each finished job Snakemake looks at all inputs of a group.
    """
    grouped = "tables" in workflow.group_settings.group_components
    return "tables" if grouped or not workflow.is_main_process else None


def sizes_mb(input):
    """Sizes of input files. Snakemake's own way, which knows remote files, warns in a report.

    It also looks at every file until one is not there; here the first such one says that the
    sizes are not known yet.
    """
    missing = next((path for path in input if not os.path.exists(path)), None)
    if missing is None:
        return [os.path.getsize(path) / 2**20 for path in input]
    if workflow.storage_settings.default_storage_provider is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), missing)
    return input.size_files_mb


MOST_MB = 32_000
"""Memory that a job asks for at first: more images than fit there are read in the background."""


def growing(base, per_mb=0):
    """A resource function: `base`, and `per_mb` for each MB of input, times the attempt."""

    def amount(wildcards, input, attempt):
        growth = per_mb * sum(sizes_mb(input)) if per_mb else 0
        return math.ceil(attempt * min(base + growth, MOST_MB))

    return amount


def together(wildcards):
    """The processes that train a network, each on a card of its own: no part of any digest."""
    return 1 if elsewhere_of(wildcards) else STUDIES[wildcards.study].gpus_per_job


def training_memory(wildcards, input, attempt):
    """A resource function: each process that trains has the images, and PyTorch, for itself."""
    return together(wildcards) * growing(4000, 4)(wildcards, input, attempt)


def computing(passes):
    """A resource function: the minutes of a network's passes over the images of the first input.

    `passes(wildcards)` counts forward passes; a backward pass is as long as two.
    """

    def minutes(wildcards, input, attempt):
        study = STUDIES[wildcards.study]
        architecture = parts_of(wildcards)["architecture"]
        pixels = sizes_mb(input)[0] * 2**20 / 3  # a byte per channel, hardly compressible
        flops = pixel_flops(architecture, study.images.size) * pixels * passes(wildcards)
        return math.ceil(attempt * (20 + flops / FLOPS / 60))

    return minutes


def pixel_flops(architecture, side):
    """Additions and multiplications of a network's forward pass, for each pixel of an image.

    Of this package's architectures by a formula, since to import PyTorch would take each dry run
    seconds: a 3×3 convolution has 9·width² multiplications a pixel, and a later stage has half the
    sides and twice the width. Others are counted, where a cluster or a plan asks.
    """
    family, sizes = parse_architecture(architecture["name"])
    if family not in LIBRARIES:
        depth, width = sizes.get("depth", 20), architecture["width"] * sizes.get("widen", 1)
        return 2 * depth * 9 * width**2
    if not (workflow.is_main_process and workflow.non_local_exec_or_dryrun):
        return 0
    return counted_flops(json.dumps(architecture), side or 224)


@cache
def counted_flops(architecture, side):
    from ensdistill.operations import pixel_macs

    try:
        return 2 * pixel_macs(json.loads(architecture), side)
    except InputError as error:
        raise WorkflowError(str(error)) from None


def training_passes(wildcards):
    """Forward and backward, every epoch: of every member, and of the teachers."""
    study = STUDIES[wildcards.study]
    if "method" not in wildcards.keys():
        return 3 * study.teacher.epochs
    method, members = study.methods[wildcards.method], study.parts(wildcards.method)["members"]
    teachers = study.members if method.objective.needs_teachers else 0
    gradients = 3 * method.perturbation.teacher_gradients(study.members)
    student = 3 * method.passes * members
    return study.recipe(wildcards.method).epochs * (student + teachers + gradients)


def ensemble_passes(count):
    """So many passes of every member."""
    return lambda wildcards: count * STUDIES[wildcards.study].members
