import ast
import hashlib
import shutil
from pathlib import Path

import pytest

import ensdistill
from ensdistill import digests
from ensdistill.digests import attributes, code_digest
from ensdistill.reports import results

ROOT = Path(__file__).parent.parent
RESULTS = results()

# --- attributes ------------------------------------------------------------------------------

KNOWN = {"study": "digits", "seed": 0, "method": {"eta": 1 / 255, "alpha": 0.9}, "path": ["a", "b"]}


def test_attributes_are_what_is_known_its_digest_and_the_versions():
    import torch

    made = attributes(**KNOWN)
    digest = made.pop("digest")
    assert len(digest) == 64
    versions = {"ensdistill": ensdistill.__version__, "torch": torch.__version__.split("+")[0]}
    made["torch"] = made["torch"].split("+")[0]
    assert made == {**KNOWN, **versions}
    reordered = dict(reversed(KNOWN.items()))
    assert attributes(**reordered)["digest"] == digest


@pytest.mark.parametrize(
    "change",
    [
        {"study": "digit"},
        {"seed": 1},
        {"seed": "0"},
        {"seed": None},
        {"method": {"eta": 1 / 255, "alpha": 0.90001}},
        {"method": {"eta": 1 / 255}},
        {"path": ["b", "a"]},
        {"added": None},
    ],
)
def test_the_digest_changes_with_anything_known(change):
    assert attributes(**{**KNOWN, **change})["digest"] != attributes(**KNOWN)["digest"]


# --- code digests of a small package ---------------------------------------------------------

PACKAGE = {
    "steps": '''
        """What steps do."""

        from collections.abc import Callable

        from ensdistill import InputError, rates
        from ensdistill.layers import Dense as Layer
        from ensdistill.registry import SOURCES
        from ensdistill.files import atomic

        FACTOR = 0.5
        """Shown to the user."""

        WEIGHTS = [1]
        WEIGHTS += [2]


        def run(x):
            """Run."""
            # a comment
            with atomic(x):
                return SOURCES["plain"](x) * FACTOR + rates.slow(x) + late(x) + WEIGHTS[0]


        def late(x):
            from ensdistill.deferred import shift

            return Layer().forward(shift(x))


        async def waiting(x):
            return x


        def unrelated(x):
            return x + 100
    ''',
    "registry": """
        from ensdistill.plain import plain

        SOURCES = {"plain": plain}


        def added(x):
            return x - 1


        SOURCES.update(added=added)

        if True:
            SOURCES["other"] = len
    """,
    "plain": """
        def plain(x):
            return helper(x)


        def helper(x, offset=3):
            return x + offset
    """,
    "layers": '''
        class Base:
            """A base."""

            size = 4
            """Of the layer."""

            def forward(self, x):
                """Forward."""
                return x * self.size


        class Dense(Base):
            pass


        class Other(Base):
            def forward(self, x):
                return 77
    ''',
    "rates": """
        LIMIT = 9


        def slow(x):
            return min(x, LIMIT)


        def fast(x):
            return 55 * x
    """,
    "deferred": """
        def shift(x):
            return x << 1
    """,
    "files": """
        def atomic(path):
            return path
    """,
    "jobs": """
        def job(snakemake):
            return snakemake
    """,
    "__init__": """
        class InputError(Exception):
            pass
    """,
}
SCRIPT = """
    from ensdistill.jobs import job
    from ensdistill.steps import run

    with job(snakemake):
        run(snakemake.input)
"""


def write_code(path, text):
    path.write_text("\n".join(line.removeprefix("    " * 2) for line in text.splitlines()))


@pytest.fixture
def small(tmp_path, monkeypatch):
    package = tmp_path / "ensdistill"
    package.mkdir()
    for name, text in PACKAGE.items():
        write_code(package / f"{name}.py", text)
    monkeypatch.setattr(digests, "PACKAGE", package)
    write_script(tmp_path / "script.py", SCRIPT)
    return package


def write_script(path, text):
    path.write_text("\n".join(line.removeprefix("    ") for line in text.splitlines()))
    return path


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


HARMLESS = [
    ("steps", "# a comment", "# another comment"),
    ("steps", "# a comment\n", "\n\n"),
    ("steps", '"""What steps do."""', '"""Other words."""'),
    ("steps", '"""Run."""', '"""Other words."""'),
    ("steps", '"""Run."""\n', "\n"),
    ("steps", '"""Shown to the user."""', '"""Other words."""'),
    ("steps", "x + 100", "x + 101"),
    ("steps", "async def waiting(x):\n    return x", "async def waiting(x):\n    return 5"),
    ("steps", "collections.abc import Callable", "collections.abc import Mapping"),
    ("steps", "def unrelated(x):", "\n\n\ndef new(x):\n    return 7\n\n\ndef unrelated(x):"),
    ("layers", '"""A base."""', '"""Other words."""'),
    ("layers", '"""Of the layer."""', '"""Other words."""'),
    ("layers", '"""Forward."""', '"""Other words."""'),
    ("layers", "return 77", "return 78"),
    ("rates", "55 * x", "56 * x"),
    ("files", "return path", "return None"),
    ("jobs", "return snakemake", "return None"),
    ("__init__", "pass", "status = 1"),
]
HARMFUL = {
    "a formula in a function": ("steps", "* FACTOR", "/ FACTOR"),
    "a constant": ("steps", "FACTOR = 0.5", "FACTOR = 0.6"),
    "an extended constant": ("steps", "WEIGHTS += [2]", "WEIGHTS += [3]"),
    "through a registry": ("plain", "return helper(x)", "return helper(-x)"),
    "a default argument, two modules on": ("plain", "offset=3", "offset=4"),
    "the registry": ("registry", '{"plain": plain}', '{"plain": abs}'),
    "a registering call": ("registry", "return x - 1", "return x - 2"),
    "a conditional registration": ("registry", "= len", "= max"),
    "an inherited method under another name": ("layers", "x * self.size", "x + self.size"),
    "a class attribute": ("layers", "size = 4", "size = 5"),
    "a new base": ("layers", "class Dense(Base)", "class Dense(Other)"),
    "a function named after a dot": ("rates", "min(x, LIMIT)", "max(x, LIMIT)"),
    "a constant behind it": ("rates", "LIMIT = 9", "LIMIT = 8"),
    "an import inside a function": ("deferred", "x << 1", "x << 2"),
}


@pytest.mark.parametrize(("module", "old", "new"), HARMLESS)
def test_a_digest_is_blind_to_what_changes_nothing(small, module, old, new):
    before = code_digest(small.parent / "script.py")
    edit(small / f"{module}.py", old, new)
    assert code_digest(small.parent / "script.py") == before


@pytest.mark.parametrize("what", HARMFUL)
def test_a_digest_changes_with_what_is_used(small, what):
    module, old, new = HARMFUL[what]
    before = code_digest(small.parent / "script.py")
    edit(small / f"{module}.py", old, new)
    assert code_digest(small.parent / "script.py") != before


MODULE_USES = {
    # what the script says: whether `fast`, and whether `slow`, of rates.py counts
    "rates.fast(1)": (True, False),
    "rates.fast(1) + rates.slow(1)": (True, True),
    "getattr(rates, name)": (True, True),
    "rates.slow(getattr(rates, name))": (True, True),
    "slow = rates.fast(1)": (True, False),
}


@pytest.mark.parametrize("use", MODULE_USES)
def test_of_a_module_counts_what_is_named_after_a_dot_or_all_if_it_stands_alone(small, use):
    script = write_script(small.parent / "other.py", f"from ensdistill import rates\n\n{use}\n")
    before = code_digest(script)
    text = (small / "rates.py").read_text()
    changes = []
    for old in ("55 * x", "min(x, LIMIT)"):
        (small / "rates.py").write_text(text.replace(old, "0"))
        changes.append(code_digest(script) != before)
    assert tuple(changes) == MODULE_USES[use]


def test_a_name_passed_on_by_another_module_is_followed(small):
    script = write_script(
        small.parent / "other.py", "from ensdistill.registry import plain\nplain(1)"
    )
    before = code_digest(script)
    edit(small / "plain.py", "offset=3", "offset=4")
    assert code_digest(script) != before


REGISTRY = {
    "choices": """
        from ensdistill.plain import helper

        STUDENTS = {"one": helper, "other": abs}


        def build(name):
            return STUDENTS[name]
    """,
    "inner/__init__": "",
    "inner/first": """
        def table(x):
            return x + 1


        def draw(x):
            return x + 2
    """,
    "inner/second": """
        from ensdistill.inner.first import draw


        def table(x):
            return draw(x)
    """,
}


@pytest.fixture
def chooser(small):
    """A script that takes an entry of a registry, and a function of a subpackage, by name."""
    (small / "inner").mkdir()
    for name, text in REGISTRY.items():
        write_code(small / f"{name}.py", text)
    return write_script(
        small.parent / "chooser.py",
        """
    from ensdistill import inner
    from ensdistill.choices import build

    build(name), getattr(inner, name)
    """,
    )


def chosen_digest(script, entry="one", function="first.table"):
    return code_digest(script, STUDENTS=[entry], inner=[function])


@pytest.mark.parametrize(
    ("module", "old", "new", "counts"),
    [
        ("choices", '"other": abs', '"other": len', False),
        ("choices", '"other": abs', '"other": abs, "third": len', False),
        ("choices", '"one": helper, "other": abs', '"other": abs, "one": helper', False),
        ("choices", '"one": helper', '"one": len', True),
        ("plain", "x + offset", "x - offset", True),
        ("inner/first", "x + 1", "x + 3", True),
        ("inner/first", "x + 2", "x + 3", False),
        ("inner/second", "draw(x)", "draw(-x)", False),
    ],
)
def test_of_a_registry_and_of_a_subpackage_counts_what_is_chosen(chooser, module, old, new, counts):
    before = chosen_digest(chooser)
    edit(chooser.parent / "ensdistill" / f"{module}.py", old, new)
    assert (chosen_digest(chooser) != before) == counts


def test_modules_of_a_subpackage_are_followed_into_each_other(chooser):
    before = chosen_digest(chooser, function="second.table")
    edit(chooser.parent / "ensdistill/inner/first.py", "x + 2", "x + 3")
    assert chosen_digest(chooser, function="second.table") != before


def test_each_entry_has_a_digest_of_its_own_and_one_that_is_not_there_has_none(chooser):
    found = {chosen_digest(chooser, entry) for entry in ("one", "other")}
    assert len(found) == 2
    with pytest.raises(KeyError):
        chosen_digest(chooser, "third")


# --- code digests of the real scripts --------------------------------------------------------

RESNET, WRN = {"ARCHITECTURES": ["resnet"]}, {"ARCHITECTURES": ["wrn"]}
SINGLE, SHARED = {"STUDENTS": ["single"]}, {"STUDENTS": ["batch_ensemble", "single"]}


def taught(objective, perturbation, architectures=("resnet",)):
    """What train.py takes by name for a BatchEnsemble and its teachers."""
    parts = {"OBJECTIVES": [objective], "PERTURBATIONS": [perturbation]}
    return "train", {"ARCHITECTURES": architectures, **SHARED, **parts}


# Jobs of one script that take other entries of the registries by name.
JOBS = {
    "teacher": ("train", {**taught("labels", "none")[1], **SINGLE}),
    "kd_single": ("train", {**taught("ensemble_mean", "none")[1], **SINGLE}),
    "be": taught("labels", "none"),
    "kd": taught("one_to_one", "none"),
    "kd_gaussian": taught("one_to_one", "gaussian"),
    "kd_ods": taught("one_to_one", "ods"),
    "kd_conf_ods": taught("one_to_one", "conf_ods"),
    "kd_of_wrn": taught("one_to_one", "none", ("resnet", "wrn")),
    "logits:single": ("logits", RESNET | SINGLE),
    "logits:shared": ("logits", RESNET | {"STUDENTS": ["batch_ensemble"]}),
    "logits:wrn": ("logits", WRN | SINGLE),
}
STUDENTS = "kd_single be kd kd_of_wrn"
LOGITS = "logits:single logits:shared logits:wrn"

# A definition, the jobs that a change of it must rerun, and those that it must not rerun.
REACH = {
    "perturbations._ods": (
        "kd_ods kd_conf_ods analyse:perturbed_logits",
        f"teacher kd_single be kd kd_gaussian {LOGITS} evaluate:scores evaluate:reliability images",
    ),
    "perturbations.conf_ods_direction": (
        "kd_conf_ods analyse:perturbed_logits",
        f"teacher kd_single be kd kd_gaussian kd_ods {LOGITS} evaluate:scores",
    ),
    "perturbations.gaussian": (
        "kd_gaussian analyse:perturbed_logits",
        f"teacher be kd kd_ods kd_conf_ods {LOGITS} evaluate:scores",
    ),
    "perturbations.none": (
        "teacher kd_single be kd analyse:perturbed_logits",
        f"kd_gaussian kd_ods kd_conf_ods {LOGITS}",
    ),
    "perturbations._moved": (
        "kd_gaussian kd_ods kd_conf_ods analyse:perturbed_logits",
        f"teacher kd_single be kd {LOGITS}",
    ),
    "objectives.distillation_loss": (
        "kd_single kd kd_gaussian kd_ods kd_conf_ods",
        f"teacher be {LOGITS} analyse:perturbed_logits evaluate:scores",
    ),
    "objectives.one_to_one": ("kd kd_ods", f"teacher be kd_single {LOGITS}"),
    "objectives.ensemble_mean": ("kd_single", f"teacher be kd kd_ods {LOGITS}"),
    "objectives.labels": (
        "teacher be",
        f"kd_single kd kd_ods {LOGITS} analyse:perturbed_logits evaluate:scores",
    ),
    "objectives.member_cross_entropy": (
        f"teacher {STUDENTS}",
        f"{LOGITS} analyse:perturbed_logits evaluate:scores",
    ),
    "students.Single": (
        f"teacher {STUDENTS} logits:single logits:wrn",
        "logits:shared evaluate:scores table images",
    ),
    "students.BatchEnsemble": (
        "be kd kd_ods logits:shared",
        "teacher kd_single logits:single logits:wrn evaluate:scores table images",
    ),
    "students.teacher_logits": (
        "kd_single kd kd_ods analyse:perturbed_logits analyse:transfer_logits",
        f"teacher be {LOGITS} distances",
    ),
    "students.predictions": (
        f"teacher {STUDENTS} {LOGITS}",
        "analyse:perturbed_logits distances evaluate:scores images",
    ),
    "weights.load_student": (
        f"teacher {STUDENTS} {LOGITS} analyse:perturbed_logits distances",
        "evaluate:scores images table",
    ),
    "training.fit": (
        f"teacher {STUDENTS}",
        f"{LOGITS} analyse:perturbed_logits evaluate:scores images",
    ),
    "learning.learning_rate_factor": (
        f"teacher {STUDENTS}",
        f"{LOGITS} analyse:perturbed_logits evaluate:scores images",
    ),
    "calibration.ece": (
        "evaluate:scores evaluate:reliability evaluate:corruptions",
        f"teacher {STUDENTS} {LOGITS} analyse:perturbed_logits images evaluate:jacobians",
    ),
    "metrics.nll": (
        f"evaluate:scores teacher {STUDENTS}",
        f"{LOGITS} analyse:perturbed_logits images",
    ),
    "metrics.disagreement": (
        # A kind of prediction counts as a whole wherever predictions are read.
        "evaluate:scores evaluate:diversity_students evaluate:reliability",
        f"teacher {STUDENTS} {LOGITS} figure:reliability",
    ),
    "batch_ensemble.BatchEnsembleConv2d": (
        f"{STUDENTS} {LOGITS}",
        "evaluate:scores evaluate:reliability table images",
    ),
    "networks.PreActivationBlock": (
        f"teacher {STUDENTS} {LOGITS} analyse:perturbed_logits",
        "evaluate:scores table images",
    ),
    "networks.wrn": (
        "kd_of_wrn logits:wrn",
        "teacher be kd_single kd logits:single logits:shared evaluate:scores images",
    ),
    "networks.resnet": (
        f"teacher {STUDENTS} logits:single logits:shared",
        "logits:wrn evaluate:scores images",
    ),
    "architectures.parse_architecture": (
        f"teacher {STUDENTS} {LOGITS}",
        "evaluate:scores evaluate:reliability images table",
    ),
    "methods.Method": ("", f"teacher {STUDENTS} {LOGITS} analyse:perturbed_logits images"),
    "studies.Study": (
        "",
        f"teacher {STUDENTS} {LOGITS} analyse:perturbed_logits evaluate:scores images download",
    ),
    "sources.folder": (
        "images shifted",
        f"download teacher {STUDENTS} {LOGITS} analyse:perturbed_logits evaluate:scores",
    ),
    "downloads.download": (
        "download",
        f"images shifted teacher {STUDENTS} {LOGITS} evaluate:scores",
    ),
    "corruptions.corrupt": (
        "shifted",
        f"images download teacher {STUDENTS} {LOGITS} evaluate:scores",
    ),
    "drawing.grid_of_panels": (
        "figure:reliability",
        f"figure:examples table evaluate:scores evaluate:reliability teacher {STUDENTS}",
    ),
    "reports.corruptions.draw": (
        "figure:corruptions",
        "figure:reliability evaluate:corruptions table claims",
    ),
    "reports.sweep.table": ("evaluate:sweep", "figure:sweep evaluate:transfer table claims"),
    "reports.sweep.mean_kl": ("evaluate:sweep evaluate:transfer", "figure:sweep evaluate:scores"),
    **dict.fromkeys(
        ("costs.take_turns", "inference.SideBySide", "operations.training_macs"),
        ("costs", f"teacher {STUDENTS} {LOGITS} evaluate:scores table"),
    ),
    "tables.to_latex": ("table", f"figure:de_curve evaluate:scores teacher {STUDENTS}"),
    "hdf5.write_hdf5": (
        "",
        f"images {LOGITS} analyse:perturbed_logits teacher {STUDENTS} evaluate:scores table",
    ),
    "analysis.transfer_logits": ("analyse:transfer_logits", "analyse:sweep_logits distances"),
    "analysis.logit_jacobians": ("distances", "analyse:transfer_logits evaluate:jacobians"),
    "bootstrap.interval": ("claims evaluate:sweep", "evaluate:scores analyse:sweep_logits table"),
    "jobs.job": (
        "",
        f"images {LOGITS} analyse:perturbed_logits teacher {STUDENTS} evaluate:scores table",
    ),
}


def change(path, name):
    """Append a statement to a function or class."""
    tree = ast.parse(path.read_text())
    *_, node = (it for it in tree.body if getattr(it, "name", None) == name)  # behind overloads
    node.body += ast.parse("changed = True").body
    path.write_text(ast.unparse(tree))


MODULE_OF = {"evaluate": "reports", "analyse": "analysis", "figure": "reports"}
"""From which module or package a script takes a function by name."""
FUNCTION = {"evaluate": "{}.table", "figure": "{}.draw"}
"""Of which name, if a script takes it from a result's file."""


def digests_of(names):
    """Digests by a name of `JOBS`, `script`, or `script:function` if it takes one by name."""

    def job(name):
        script, _, function = name.partition(":")
        if not function:
            return script, {}
        chosen = RESULTS[function].chosen if function in RESULTS else {}
        return script, {MODULE_OF[script]: [FUNCTION.get(script, "{}").format(function)], **chosen}

    jobs = {name: JOBS[name] if name in JOBS else job(name) for name in names}
    return {
        name: code_digest(ROOT / f"workflow_scripts/{script}.py", **chosen)
        for name, (script, chosen) in jobs.items()
    }


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A copy of the package to be edited, and the digests of the scripts before that."""
    copy = tmp_path_factory.mktemp("copy") / "ensdistill"
    shutil.copytree(digests.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "PACKAGE", copy)
        named = {name for row in REACH.values() for names in row for name in names.split()}
        scripts = {path.stem for path in (ROOT / "workflow_scripts").glob("*.py")}
        yield copy, digests_of(named | scripts)


@pytest.mark.parametrize("definition", REACH)
def test_a_change_reruns_the_jobs_that_use_it_and_no_others(real, definition):
    package, before = real
    must, must_not = (set(scripts.split()) for scripts in REACH[definition])
    module, _, name = definition.rpartition(".")
    path = package / f"{module.replace('.', '/')}.py"
    text = path.read_text()
    change(path, name)
    after = digests_of(must | must_not)
    path.write_text(text)
    assert {script for script in after if after[script] != before[script]} == must


@pytest.mark.parametrize(
    ("old", "new", "must"),
    [
        ("METRICS: dict[str, Metric] = {", '{} "another": ECE,', "evaluate:scores table"),
        (
            "lambda it: nll(it.probs",
            "lambda it: 2 * nll(it.probs",
            "evaluate:scores table evaluate:corruptions figure:corruptions figure:de_curve",
        ),
    ],
)
def test_one_more_metric_concerns_just_what_shows_all_of_them(real, old, new, must):
    package, before = real
    results = {name for name in before if ":" in name or name == "table"}
    edit(package / "metrics.py", old, new.replace("{}", old))
    after = digests_of(results)
    edit(package / "metrics.py", new.replace("{}", old), old)
    assert {name for name in results if after[name] != before[name]} == set(must.split())


def test_formatting_the_whole_package_anew_reruns_nothing(real):
    package, before = real
    for path in package.rglob("*.py"):
        path.write_text(ast.unparse(ast.parse(path.read_text())))
    assert digests_of(before) == before


def test_every_script_reaches_code_of_its_own(real):
    found = set(real[1].values())
    assert len(found) == len(real[1]) > 8
    assert hashlib.sha256(b"").hexdigest() not in found


def test_the_package_imports_itself_only_in_ways_that_digests_follow():
    for path in [*(ROOT / "ensdistill").rglob("*.py"), *(ROOT / "workflow_scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
                assert "ensdistill" not in names, f"{path.name}: write 'from ensdistill import …'"
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: a relative import"
                ours = (node.module or "").split(".")[0] == "ensdistill"
                assert not (ours and node.names[0].name == "*"), f"{path.name}: a star import"
