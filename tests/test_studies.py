import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ensdistill import InputError
from ensdistill.architectures import parse_architecture
from ensdistill.methods import OLD_KEYS
from ensdistill.recipes import Recipe
from ensdistill.studies import Configuration, Study, read_configuration

ROOT = Path(__file__).parent.parent
GOOD = {
    "run": ["digits"],
    "studies": {
        "digits": {
            "images": {"source": "digits", "validation": 200},
            "methods": {"kd": {"label": "KD"}, "be": {"label": "BE"}},
        }
    },
}


def changed(place, value):
    """The good configuration with one value, at a place such as "architecture.name", set."""
    config = copy.deepcopy(GOOD)
    *path, last = place.split(".")
    node = config["studies"]["digits"]
    for key in path:
        node = node.setdefault(key, {})
    node[last] = value
    return config


def complaint(config):
    with pytest.raises(InputError) as caught:
        read_configuration(config)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 340
    assert caught.value.__cause__ is None
    assert message.startswith("config.yaml")
    return message


def read_one(place, value):
    return read_configuration(changed(place, value)).studies["digits"]


# --- the repository's own files --------------------------------------------------------------


def test_the_repositorys_configuration_is_valid():
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert set(read_configuration(config).studies) == set(config["studies"])


def test_the_exported_schema_is_up_to_date():
    exported = json.loads((ROOT / "config.schema.json").read_text())
    assert exported == Configuration.model_json_schema(), (
        "config.schema.json is out of date: python -m ensdistill.studies > config.schema.json"
    )


def test_the_module_prints_the_exported_schema():
    command = [sys.executable, "-m", "ensdistill.studies"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    assert printed == (ROOT / "config.schema.json").read_bytes()


def test_every_key_and_section_of_the_schema_is_described():
    schema = Configuration.model_json_schema()
    sections = {"Configuration": schema, **schema["$defs"]}
    assert set(sections) >= {"Study", "Images", "Architecture", "Recipe", "Method", "ODS"}
    assert set(sections) >= {"Distillation", "RecipeChanges", "Single", "OneToOne"}
    bare = [
        f"{section}.{key}"
        for section, content in sections.items()
        for key, property_ in content["properties"].items()
        if not property_.get("description", "").strip()
    ]
    bare += [section for section, content in sections.items() if not content.get("description")]
    assert bare == []


def test_no_section_of_the_schema_lets_unknown_keys_pass():
    schema = Configuration.model_json_schema()
    sections = {"Configuration": schema, **schema["$defs"]}
    assert [name for name, content in sections.items() if content["additionalProperties"]] == []


def test_reading_a_configuration_needs_no_torch():
    code = (
        "import sys, ensdistill.studies; print(sorted({'torch', 'torchvision'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- complaints ------------------------------------------------------------------------------

UNKNOWN_KEYS = [
    ("architecture.nmae", "resnet8", "unknown key 'architecture.nmae'; did you mean 'name'?"),
    ("memebers", 4, "unknown key 'memebers'; did you mean 'members'?"),
    ("teacher.learningrate", 0.1, "'teacher.learningrate'; did you mean 'learning_rate'?"),
    ("student.epoch", 3, "unknown key 'student.epoch'; did you mean 'epochs'?"),
    ("methods.kd.perturbaton", "ods", "'methods.kd.perturbaton'; did you mean 'perturbation'?"),
    ("methods.ods.lable", "KD", "'methods.ods.lable'; did you mean 'label'?"),
    ("images.shade", "red", "unknown key 'images.shade'; known are source, path, columns, size"),
    ("zzz", 1, "unknown key 'zzz'; known are images, corruptions, out_of_distribution, archit"),
    ("methods.kd.recipe.epoch", 3, "'methods.kd.recipe.epoch'; did you mean 'epochs'?"),
]
WRONG_TYPES = [
    ("members", "4"),
    ("members", 4.0),
    ("members", True),
    ("members", None),
    ("images.validation", True),
    ("images.train", "all"),
    ("images.seed", False),
    ("teacher.momentum", True),
    ("teacher.learning_rate", "0.1"),
    ("teacher.epochs", "1.5e0"),
    ("teacher.learning_rate", "1e400"),
    ("student.epochs", 10.5),
    ("augmentation.flip", 1),
    ("augmentation.flip", "no"),
    ("distillation.temperature", "4"),
    ("distillation.eta", True),
    ("distillation.eta", [1, 255]),
    ("architecture", 8),
    ("architecture", None),
    ("architecture.name", 8),
    ("student_architecture", ["resnet8"]),
    ("images", None),
    ("images.path", 5),
    ("images.path", [5]),
    ("methods", ["kd"]),
    ("methods", ["kd"] * 500),
    ("methods.kd", "KD"),
    ("methods.kd.label", 5),
    ("methods.kd.label", ["x" * 1000]),
    ("methods.kd.student", None),
    ("methods.kd.objective", 5),
    ("methods.kd.perturbation", ["ods"]),
    ("methods.kd.recipe", "cosine"),
    ("methods.kd.recipe", None),
    ("methods.kd.recipe.learning_rate", "fast"),
]
OUT_OF_RANGE = [
    ("members", 1),
    ("pool", 0),
    ("student_seeds", 0),
    ("confidence_bins", 0),
    ("images.validation", 0),
    ("images.test", -1),
    ("images.size", 0),
    ("images.seed", -1),
    ("images.seed", 2**32),
    ("architecture.width", 0),
    ("student_architecture.width", -1),
    ("augmentation.crop_padding", -1),
    ("teacher.epochs", 0),
    ("teacher.batch_size", 0),
    ("teacher.learning_rate", 0),
    ("teacher.learning_rate", float("inf")),
    ("teacher.momentum", 1),
    ("student.weight_decay", -1e-4),
    ("student.warmup_epochs", 0),
    ("student.validate_every", 0),
    ("distillation.alpha", 1.1),
    ("distillation.alpha", float("nan")),
    ("distillation.temperature", 0),
    ("distillation.temperature", float("inf")),
    ("distillation.eta", -1),
    ("distillation.eta", "-1/255"),
    ("distillation.eta", float("inf")),
    ("distillation.eta", float("nan")),
    ("methods", {}),
    ("methods.kd.recipe.epochs", 0),
    ("methods.kd.recipe.momentum", 1),
]
NO_SUCH_CHOICE = [
    ("images.source", "mnist", "'svhn', 'tinyimagenet' or 'folder', not \"mnist\""),
    ("out_of_distribution.source", "mnist", "'tinyimagenet' or 'folder', not \"mnist\""),
    ("corruptions.source", "c", "'copies' or 'official', not \"c\""),
    ("methods.kd.perturbation", "odz", 'name "odz"; known are none, gaussian, ods, conf_ods'),
    ("methods.kd.objective", "mse", 'name "mse"; known are one_to_one, ensemble_mean, labels'),
    ("methods.kd.student", "big", 'unknown name "big"; known are batch_ensemble, single'),
    ("methods.kd.student", {"name": "big"}, 'unknown name "big"; known are batch_ensemble, single'),
    ("methods.kd.paper", "kd_odz", "'kd_gaussian', 'kd_ods' or 'kd_conf_ods', not \"kd_odz\""),
    ("methods.kd.recipe.schedule", "step", "'warmup_linear' or 'cosine'"),
    ("student.schedule", "step", "'warmup_linear' or 'cosine'"),
    ("precision", "fp16", "'fp32', 'tf32' or 'bf16', not \"fp16\""),
]


@pytest.mark.parametrize(("place", "value", "expected"), UNKNOWN_KEYS)
def test_an_unknown_key_is_named_with_what_may_be_meant(place, value, expected):
    message = complaint(changed(place, value))
    assert message.startswith("config.yaml, study 'digits': unknown key")
    assert expected in message


@pytest.mark.parametrize(("place", "value"), WRONG_TYPES + OUT_OF_RANGE)
def test_a_wrong_value_is_named_with_study_and_key(place, value):
    message = complaint(changed(place, value))
    assert message.startswith(f"config.yaml, study 'digits': {place}: ")
    assert "object to" not in message
    assert "instance" not in message


OF_A_METHOD = [
    ({"objective": {"name": "one_to_one", "alpha": 2}}, "objective.alpha: input should be less"),
    ({"objective": {"name": "ensemble_mean", "temperature": -1.0}}, "objective.temperature: "),
    ({"objective": {"name": "one_to_one", "temperature": "4"}}, "objective.temperature: input sh"),
    ({"perturbation": {"name": "ods", "eta": -0.1}}, "perturbation.eta: input should be greater"),
    ({"perturbation": {"name": "ods", "eta": "1/0"}}, "perturbation.eta: '1/0' is neither"),
    ({"perturbation": {"name": "conf_ods", "temperature": 0}}, "perturbation.temperature: input"),
    ({"perturbation": {"eta": 0.1}}, "perturbation: the key 'name' is missing"),
    ({"objective": {}}, "objective: the key 'name' is missing"),
    (
        {"student": {"name": "single", "architecture": "resnet31"}},
        "student.architecture.name: 'resnet31' does not exist",
    ),
    (
        {"student": {"name": "batch_ensemble", "architecture": {"width": 0}}},
        "student.architecture.width: input should be greater",
    ),
]
UNKNOWN_OPTIONS = [
    ({"objective": {"name": "one_to_one", "alfa": 0.5}}, "objective.alfa'; did you mean 'alpha'?"),
    ({"objective": {"name": "labels", "alpha": 0.5}}, "objective.alpha'; known are name"),
    ({"perturbation": {"name": "ods", "etta": 0.1}}, "perturbation.etta'; did you mean 'eta'?"),
    ({"perturbation": {"name": "none", "eta": 0.1}}, "perturbation.eta'; known are name"),
    (
        {"perturbation": {"name": "gaussian", "temperature": 2.0}},
        "perturbation.temperature'; known are name, eta, single_pass",
    ),
    (
        {"student": {"name": "single", "archtecture": "resnet8"}},
        "student.archtecture'; did you mean 'architecture'?",
    ),
    (
        {"student": {"name": "single", "architecture": {"nmae": "resnet8"}}},
        "student.architecture.nmae'; did you mean 'name'?",
    ),
]


@pytest.mark.parametrize(("own", "expected"), OF_A_METHOD)
def test_a_wrong_option_of_a_methods_part_is_named(own, expected):
    message = complaint(changed("methods.kd", {"label": "KD", **own}))
    assert message.startswith(f"config.yaml, study 'digits': methods.kd.{expected}")


@pytest.mark.parametrize(("own", "expected"), UNKNOWN_OPTIONS)
def test_an_option_that_a_part_does_not_have_is_named_with_those_it_has(own, expected):
    message = complaint(changed("methods.kd", {"label": "KD", **own}))
    assert message == f"config.yaml, study 'digits': unknown key 'methods.kd.{expected}"


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("network", {"name": "resnet8"}, "'network' is now 'architecture'"),
        ("network", "resnet8", "'network' is now 'architecture'"),
        ("methods.kd.network", "single", "methods.kd: 'network' is now 'student'"),
        ("methods.kd.alpha", 0.5, "methods.kd: 'alpha' is now an option of the objective: {name:"),
        ("methods.kd.temperature", 2.0, "methods.kd: 'temperature' is now an option of the obj"),
        ("methods.kd.eta", "1/255", "methods.kd: 'eta' is now an option of the perturbation: {n"),
        (
            "methods.kd.objective",
            "cross_entropy",
            "methods.kd: objective 'cross_entropy' is now 'l",
        ),
        (
            "methods.kd.objective",
            {"name": "cross_entropy"},
            "methods.kd: objective 'cross_entropy' is now 'labels'",
        ),
    ],
)
def test_a_key_of_an_earlier_version_is_answered_with_the_new_one(place, value, expected):
    message = complaint(changed(place, value))
    assert message.startswith(f"config.yaml, study 'digits': {expected}")


def test_the_new_places_of_old_keys_can_be_written_as_told():
    """The examples in those answers are valid, and mean what they say."""
    examples = [yaml.safe_load(told.partition(": ")[2]) for told in OLD_KEYS.values()]
    (student, alpha, tau, eta) = examples
    assert student is None  # 'student' itself
    assert read_one("methods.kd.objective", alpha).parts("kd")["objective"]["alpha"] == 0.9
    assert read_one("methods.kd.objective", tau).parts("kd")["objective"]["temperature"] == 4.0
    assert read_one("methods.kd.perturbation", eta).parts("kd")["perturbation"]["eta"] == 1 / 255


@pytest.mark.parametrize(("place", "value", "expected"), NO_SUCH_CHOICE)
def test_an_unknown_choice_is_answered_with_the_known_ones(place, value, expected):
    message = complaint(changed(place, value))
    assert message.startswith(f"config.yaml, study 'digits': {place}: ")
    assert expected in message


@pytest.mark.parametrize("eta", ["1/0", "abc", "", "1/2/3", "1e400", "nan", "inf"])
def test_an_eta_that_is_no_number_is_named(eta):
    message = complaint(changed("distillation.eta", eta))
    assert message == (
        f"config.yaml, study 'digits': distillation.eta: {eta!r} is neither a number nor a "
        "fraction such as 1/255"
    )


@pytest.mark.parametrize(
    "name", ["resnet31", "resnet2", "wrn28", "wrn27x10", "vgg16", "", "wrn28x0"]
)
def test_an_impossible_architecture_is_named(name):
    for place, value in (
        ("architecture.name", name),
        ("architecture", name),
        ("student_architecture", name),
    ):
        message = complaint(changed(place, value))
        key = place.removesuffix(".name")
        assert message.startswith(f"config.yaml, study 'digits': {key}.name: ")
        assert repr(name) in message


TOGETHER = [
    (
        {"cuda_graphs": True, "gpus_per_job": 2},
        "'cuda_graphs' is for one GPU, and 'gpus_per_job' asks for more",
    ),
    (
        {"gpus_per_job": 3, "teacher": {"batch_size": 64}},
        "teacher: a batch_size of 64 images is no multiple of 'gpus_per_job' (3)",
    ),
    ({"pool": 3}, "'pool' (3) is smaller than 'members' (4)"),
    ({"members": 6}, "'pool' (5) is smaller than 'members' (6)"),
    ({"teacher": {"epochs": 4}}, "teacher: 'warmup_epochs' is larger than 'epochs'"),
    ({"student": {"warmup_epochs": 301}}, "student: 'warmup_epochs' is larger than 'epochs'"),
    ({"images": {"source": "folder"}}, "images: 'path' and the source 'folder' need each other"),
    ({"images": {"path": "x"}}, "images: 'path' and the source 'folder' need each other"),
    ({"images": {"columns": {"label": "x"}}}, "images: 'columns' needs a 'path'"),
    ({"images": {"size": 8, "resize": 9}}, "images: 'resize' needs a 'path'"),
    (
        {"images": {"source": "folder", "path": "x", "size": 8, "resize": 7}},
        "images: 'resize' needs a 'size' that is not larger",
    ),
    (
        {"images": {"source": "folder", "path": "x", "resize": 7}},
        "images: 'resize' needs a 'size' that is not larger",
    ),
    ({"out_of_distribution": {"source": "folder"}}, "out_of_distribution: 'path' and the source"),
    ({"out_of_distribution": []}, "out_of_distribution: list should have at least 1 item"),
    (
        {"out_of_distribution": [{"source": "svhn"}, {"source": "svhn", "images": 5}]},
        "two sets of 'out_of_distribution' are called 'svhn'",
    ),
    (
        {"out_of_distribution": [{"source": "svhn"}, {"source": "mnist"}]},
        "out_of_distribution.1.source: input should be 'photographs'",
    ),
    (
        {"out_of_distribution": [{}, {"source": "svhn", "imags": 5}]},
        "unknown key 'out_of_distribution.1.imags'; did you mean 'images'?",
    ),
    ({"out_of_distribution": {"name": "a/b"}}, "out_of_distribution.name: string should match"),
    (
        {"out_of_distribution": {"source": "digits"}},
        "'out_of_distribution' and 'images' have one source, 'digits'",
    ),
    ({"corruptions": {"source": "official"}}, "corruptions of source 'official' need images of"),
    (
        {"images": {"source": "cifar10", "test": 100}, "corruptions": {"source": "official"}},
        "corruptions of source 'official' need images of",
    ),
    ({"methods": {"a": {"label": "X"}, "b": {"label": "X"}}}, "the label 'X' in 'methods'"),
    ({"methods": {"a": {"label": "DE-4"}}}, "the label 'DE-4' in 'methods' is already taken"),
    ({"methods": {"a": {"label": "teacher"}}}, "the label 'teacher' in 'methods' is already"),
    ({"methods": {"a": {}}}, "the key 'methods.a.label' is missing"),
    ({"methods": {"a": {"label": ""}}}, "methods.a.label: '' is no name: write one line"),
    ({"methods": {"a": {"label": " \t"}}}, r"methods.a.label: ' \t' is no name"),
    ({"methods": {"a": {"label": "A\nB"}}}, r"methods.a.label: 'A\nB' is no name"),
    (
        {"methods": {"a": {"label": "A", "paper": "kd"}, "b": {"label": "B", "paper": "kd"}}},
        "two of 'methods' have paper: kd",
    ),
    (
        {"methods": {"a": {"label": "A", "paper": "kd_odds"}}},
        "methods.a.paper: input should be 'be'",
    ),
    ({"methods": {"1a": {"label": "X"}}}, "methods.1a: string should match pattern"),
    (
        {"methods": {"a": {"label": "X", "objective": "labels", "perturbation": "ods"}}},
        "methods.a: objective 'labels' asks no teachers, so perturbation 'ods' has no use",
    ),
    (
        {"methods": {"a": {"label": "X", "student": "single", "objective": "one_to_one"}}},
        "methods.a: objective 'one_to_one' needs a student with members, such as 'batch_ensemble',"
        " not 'single'",
    ),
    (
        {"methods": {"a": {"label": "X", "paper": "kd"}, "b": {"label": "Y", "paper": "kd"}}},
        "two of 'methods' have paper: kd",
    ),
    (
        {"methods": {"a": {"label": "X", "perturbation": "held_out"}}},
        "methods.a: perturbation 'held_out' needs 'images.held_out', the number of images",
    ),
    (
        {"methods": {"a": {"label": "X", "student": {"name": "flow_matching", "backbone": "b"}}}},
        "methods.a: there is no method 'b' to be its 'backbone'",
    ),
    (
        {
            "methods": {
                "a": {"label": "X", "student": {"name": "flow_matching", "backbone": "b"}},
                "b": {"label": "Y"},
            }
        },
        "methods.a: its 'backbone' 'b' must be a student that is one network, such as 'single'",
    ),
    (
        {"methods": {"a": {"label": "X", "student": "flow_matching"}}},
        "the key 'methods.a.student.backbone' is missing",
    ),
    (
        {"grid": {"students": ["single"], "perturbations": ["ods_each"]}},
        "grid: perturbation 'ods_each' goes with none of the others",
    ),
    ({"grid": {"students": [], "perturbations": ["none"]}}, "grid.students: list should have at"),
    (
        {"grid": {"students": ["singel"], "perturbations": ["none"]}},
        'grid.students.0.student: unknown name "singel"; known are batch_ensemble, single',
    ),
    (
        {
            "methods": {"single_none": {"label": "X"}},
            "grid": {"students": ["single"], "perturbations": ["none"]},
        },
        "'single_none' is a method of 'methods' and of 'grid'",
    ),
    (
        {
            "methods": {"a": {"label": "KD"}},
            "grid": {"students": ["batch_ensemble"], "perturbations": ["none"]},
        },
        "the label 'KD' in 'methods' is already taken",
    ),
    (
        {"methods": {"a": {"label": "X", "recipe": {"epochs": 3}}}},
        "methods.a.recipe: 'warmup_epochs' is larger than 'epochs'",
    ),
    (
        {
            "student": {"epochs": 4, "warmup_epochs": 4},
            "methods": {"b": {"label": "Y"}, "a": {"label": "X", "recipe": {"warmup_epochs": 5}}},
        },
        "methods.a.recipe: 'warmup_epochs' is larger than 'epochs'",
    ),
]


@pytest.mark.parametrize(("study", "expected"), TOGETHER)
def test_values_that_do_not_fit_together_are_named(study, expected):
    message = complaint({"run": ["digits"], "studies": {"digits": study}})
    assert message.startswith(f"config.yaml, study 'digits': {expected}")


WHOLE = [
    ({**GOOD, "run": ["absent"]}, "'run' names the study 'absent', which 'studies' does not have"),
    ({**GOOD, "run": []}, "run: list should have at least 1 item, not []"),
    ({**GOOD, "run": "digits"}, 'run: input should be a valid list, not "digits"'),
    ({**GOOD, "rnu": []}, "unknown key 'rnu'; did you mean 'run'?"),
    ({"rnu": ["digits"], "studies": GOOD["studies"]}, "unknown key 'rnu'; did you mean 'run'?"),
    ({"run": ["digits"]}, "the key 'studies' is missing"),
    ({"studies": GOOD["studies"]}, "the key 'run' is missing"),
    ({**GOOD, "studies": {}}, "studies: dictionary should have at least 1 item, not {}"),
    ({}, "the key 'run' is missing"),
    (None, "input should be a valid dictionary, not null"),
]


@pytest.mark.parametrize(("config", "expected"), WHOLE)
def test_a_wrong_whole_is_named(config, expected):
    assert complaint(config) == f"config.yaml: {expected}"


def test_an_empty_study_and_a_study_with_an_impossible_name_are_named():
    assert "study 'digits': input should be a valid dictionary, not null" in complaint(
        {**GOOD, "studies": {"digits": None}}
    )
    assert "study '10'" in complaint({**GOOD, "studies": {10: {}}})
    assert "study 'a/b'" in complaint({**GOOD, "studies": {"a/b": {}}})


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("1/255", 1 / 255),
        ("13/255", 13 / 255),
        (" 1/255 ", 1 / 255),
        ("0.05", 0.05),
        (0.05, 0.05),
        (0, 0.0),
        (1, 1.0),
    ],
)
def test_eta_is_a_number_or_a_fraction(given, meant):
    eta = read_one("distillation.eta", given).distillation.eta
    assert eta == meant
    assert isinstance(eta, float)
    own = read_one("methods.kd.perturbation", {"name": "ods", "eta": given})
    assert own.methods["kd"].perturbation.eta == meant
    assert own.parts("kd")["perturbation"]["eta"] == meant


def test_the_defaults_are_the_papers():
    study = Study()
    assert study.architecture.model_dump() == {"name": "resnet32", "width": 16}
    assert (study.members, study.distillation.alpha) == (4, 0.9)
    assert study.distillation.eta == 1 / 255
    assert (study.teacher.batch_size, study.teacher.learning_rate) == (256, 0.2)
    assert (study.student.batch_size, study.student.learning_rate) == (64, 0.05)
    for recipe in (study.teacher, study.student):
        assert (recipe.epochs, recipe.weight_decay, recipe.momentum) == (300, 5e-4, 0.9)
    assert list(study.methods) == ["be", "kd_single", "kd", "kd_gaussian", "kd_ods", "kd_conf_ods"]


def test_a_changed_key_of_the_teachers_recipe_keeps_the_teachers_other_defaults():
    teacher = read_one("teacher.epochs", 200).teacher
    assert (teacher.epochs, teacher.batch_size, teacher.learning_rate) == (200, 256, 0.2)


def test_the_limits_themselves_are_allowed():
    recipe = {"epochs": 5, "warmup_epochs": 5, "momentum": 0, "weight_decay": 0}
    own = {"members": 2, "pool": 2, "teacher": recipe, "distillation": {"alpha": 1, "eta": 0}}
    study = read_configuration({"run": ["x"], "studies": {"x": own}}).studies["x"]
    assert (study.members, study.pool, study.teacher.warmup_epochs) == (2, 2, 5)


def test_a_study_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Study().members = 5


DISTILLATION = {"alpha": 0.5, "temperature": 2.0, "eta": "2/255"}
SHARED = {"alpha": 0.5, "temperature": 2.0}
MOVED = {"eta": 2 / 255, "temperature": 2.0}
METHODS = [
    ({}, {"name": "one_to_one", **SHARED}, {"name": "none"}),
    ({"objective": "labels"}, {"name": "labels"}, {"name": "none"}),
    (
        {"objective": "ensemble_mean", "student": "single"},
        {"name": "ensemble_mean", **SHARED},
        {"name": "none"},
    ),
    (
        {"perturbation": "gaussian"},
        {"name": "one_to_one", **SHARED},
        {"name": "gaussian", "eta": 2 / 255},
    ),
    ({"perturbation": "ods"}, {"name": "one_to_one", **SHARED}, {"name": "ods", **MOVED}),
    (
        {"perturbation": {"name": "ods", "eta": 0}},
        {"name": "one_to_one", **SHARED},
        {"name": "ods", "eta": 0.0, "temperature": 2.0},
    ),
    (
        {"objective": {"name": "one_to_one", "alpha": 0.0}, "perturbation": "gaussian"},
        {"name": "one_to_one", "alpha": 0.0, "temperature": 2.0},
        {"name": "gaussian", "eta": 2 / 255},
    ),
    (  # the perturbation's τ is the objective's
        {"objective": {"name": "one_to_one", "temperature": 3.0}, "perturbation": "conf_ods"},
        {"name": "one_to_one", "alpha": 0.5, "temperature": 3.0},
        {"name": "conf_ods", "eta": 2 / 255, "temperature": 3.0},
    ),
    (  # unless told
        {
            "objective": {"name": "one_to_one", "temperature": 3.0},
            "perturbation": {"name": "conf_ods", "temperature": 5.0},
        },
        {"name": "one_to_one", "alpha": 0.5, "temperature": 3.0},
        {"name": "conf_ods", "eta": 2 / 255, "temperature": 5.0},
    ),
]


@pytest.mark.parametrize(("own", "objective", "perturbation"), METHODS)
def test_a_method_has_its_own_options_or_the_studys_and_only_those_it_uses(
    own, objective, perturbation
):
    config = changed("distillation", DISTILLATION)
    config["studies"]["digits"]["methods"]["kd"].update(own)
    parts = read_configuration(config).studies["digits"].parts("kd")
    assert parts["objective"] == objective
    assert parts["perturbation"] == perturbation
    assert parts["members"] == (1 if own.get("student") == "single" else 4)
    assert parts["student"] == {"name": own.get("student", "batch_ensemble")}


@pytest.mark.parametrize("axis", ["student", "objective", "perturbation"])
def test_a_name_alone_is_a_section_without_options(axis):
    names = {"student": "batch_ensemble", "objective": "ensemble_mean", "perturbation": "ods"}
    ways = names[axis], {"name": names[axis]}
    alone, section = (read_one(f"methods.kd.{axis}", way) for way in ways)
    assert alone == section
    assert getattr(alone.methods["kd"], axis).name == names[axis]


@pytest.mark.parametrize(
    ("of_students", "of_method", "expected"),
    [
        (None, None, {"name": "resnet8", "width": 16}),
        ("resnet14", None, {"name": "resnet14", "width": 16}),
        (None, {"name": "wrn10x2", "width": 4}, {"name": "wrn10x2", "width": 4}),
        ({"name": "resnet14", "width": 8}, "resnet20", {"name": "resnet20", "width": 16}),
    ],
)
def test_the_architecture_is_the_methods_or_the_students_or_the_teachers(
    of_students, of_method, expected
):
    config = changed("architecture", "resnet8")
    study = config["studies"]["digits"]
    study["student_architecture"] = of_students
    if of_method:
        study["methods"]["kd"]["student"] = {"name": "batch_ensemble", "architecture": of_method}
    read = read_configuration(config).studies["digits"]
    assert read.parts("kd")["architecture"] == expected
    others = {"name": "resnet8", "width": 16} if of_students is None else None
    assert others is None or read.parts("be")["architecture"] == others
    assert read.parts()["architecture"] == {"name": "resnet8", "width": 16}


def test_a_teacher_is_a_single_network_that_learns_from_labels():
    assert Study().parts() == {
        "student": {"name": "single"},
        "members": 1,
        "architecture": {"name": "resnet32", "width": 16},
        "objective": {"name": "labels"},
        "perturbation": {"name": "none"},
        "prediction": "mixture",
    }


def test_a_methods_recipe_is_the_students_with_its_changes():
    own = {"epochs": 7, "schedule": "cosine", "weight_decay": None}
    config = changed("student", {"epochs": 50, "weight_decay": 1e-3})
    config["studies"]["digits"]["methods"]["kd"]["recipe"] = own
    study = read_configuration(config).studies["digits"]
    expected = Recipe(epochs=7, schedule="cosine", weight_decay=1e-3)
    assert study.recipe("kd") == expected
    assert study.recipe("be") == Recipe(epochs=50, weight_decay=1e-3) == study.student


def test_every_setting_of_a_recipe_can_be_a_methods_own():
    changes = {
        "epochs": 9, "batch_size": 3, "learning_rate": 0.5, "momentum": 0.1, "nesterov": True,
        "weight_decay": 0.2, "clip_norm": 3.0,
        "schedule": "cosine", "warmup_epochs": 2, "validate_every": 4,
    }  # fmt: skip
    adamw = {"optimizer": "adamw", "nesterov": False}
    assert changes.keys() | adamw.keys() == Recipe.model_fields.keys()
    for own in (changes, changes | adamw):
        assert read_one("methods.kd.recipe", own).recipe("kd") == Recipe(**own)


def test_an_optimizer_is_chosen_for_teachers_students_and_a_method():
    for key, of in (
        ("teacher", lambda study: [study.teacher]),
        ("student", lambda study: [study.student, *map(study.recipe, study.methods)]),
        ("methods.kd.recipe", lambda study: [study.recipe("kd")]),
    ):
        study = read_one(key, {"optimizer": "adamw"})
        assert {it.optimizer for it in of(study)} == {"adamw"}
        others = {study.teacher.optimizer, study.student.optimizer, study.recipe("be").optimizer}
        assert "sgd" in others
    with pytest.raises(InputError, match="teacher: 'nesterov' goes with the optimizer 'sgd' alone"):
        read_one("teacher", {"optimizer": "adamw", "nesterov": True})


def test_what_came_later_is_dumped_only_where_it_is_asked_for():
    study = read_one("teacher", {})
    assert study.teacher.model_dump().keys() == Recipe.model_fields.keys() - {"optimizer"}
    assert study.augmentation.model_dump() == {"crop_padding": 4, "flip": True}
    policy = {"name": "rand_augment", "magnitude": 5}
    own = {"random_resized_crop": [0.25, 1], "policy": policy, "flip": False}
    dumped = read_one("augmentation", own).augmentation.model_dump()
    whole = {**policy, "operations": 2}
    assert dumped == {"crop_padding": 4, **own, "policy": whole}
    alone = read_one("augmentation", {"policy": "trivial_augment"}).augmentation.model_dump()
    assert alone["policy"] == {"name": "trivial_augment"}
    for wrong in ([0.5, 0.2], [0, 1], [0.5], 0.5, [0.1, 2]):
        with pytest.raises(InputError, match=r"augmentation\.random_resized_crop"):
            read_one("augmentation", {"random_resized_crop": wrong})


def test_teachers_are_analysed_at_the_papers_perturbations_with_the_studys_options():
    config = changed("distillation", DISTILLATION)
    config["studies"]["digits"]["methods"]["kd"]["perturbation"] = {"name": "ods", "eta": "9/255"}
    expected = {
        "gaussian": {"name": "gaussian", "eta": 2 / 255},
        "ods": {"name": "ods", **MOVED},
        "conf_ods": {"name": "conf_ods", **MOVED},
    }
    assert read_configuration(config).studies["digits"].perturbations() == expected


def test_a_grid_stands_behind_the_methods_or_alone():
    grid = {"students": ["batch_ensemble", "single"], "perturbations": ["none", "ods"]}
    names = ["batch_ensemble_none", "batch_ensemble_ods", "single_none", "single_ods"]
    study = Study.model_validate({"grid": grid})
    assert list(study.methods) == names
    own = {"label": "mine", "perturbation": "gaussian"}
    both = Study.model_validate({"grid": grid, "methods": {"mine": own}})
    assert list(both.methods) == ["mine", *names]


def test_methods_of_a_grid_that_are_the_papers_say_so_once():
    students = ["batch_ensemble", "single", {"student": "batch_ensemble", "objective": "labels"}]
    grid = {"students": students, "perturbations": ["none", "ods", {"name": "ods", "eta": 0.1}]}
    with pytest.raises(ValidationError):  # two sizes of one perturbation have one name
        Study.model_validate({"grid": grid})
    grid["perturbations"] = ["none", {"name": "ods", "eta": 0.1}, "conf_ods"]
    mine = {"label": "KD of mine", "paper": "kd"}
    study = Study.model_validate({"grid": grid, "methods": {"mine": mine}})
    assert {name: it.paper for name, it in study.methods.items() if it.paper} == {
        "mine": "kd",
        "single_none": "kd_single",
        "batch_ensemble_conf_ods": "kd_conf_ods",
        "batch_ensemble_labels_none": "be",
    }


def test_a_published_recipe_stands_between_the_studys_and_the_methods_own():
    proxy = {"label": "Proxy", "student": "single", "objective": "proxy_dirichlet"}
    study = Study.model_validate(
        {
            "student": {"epochs": 40, "momentum": 0.5, "batch_size": 32},
            "distillation": {"temperature": 4.0},
            "methods": {
                "common": {**proxy, "label": "A"},
                "own": {**proxy, "label": "B", "recipe": "published", "perturbation": "ods"},
                "changed": {
                    **proxy,
                    "label": "C",
                    "recipe": {"published": True, "epochs": 7},
                    "objective": {"name": "proxy_dirichlet", "temperature": 3.0},
                },
            },
        }
    )
    published = {"batch_size": 128, "learning_rate": 0.05, "weight_decay": 5e-4}
    assert study.recipe("common") == study.student
    assert study.recipe("own") == Recipe(epochs=250, momentum=0.5, **published)
    assert study.recipe("changed") == Recipe(epochs=7, momentum=0.5, **published)
    temperatures = [study.parts(it)["objective"]["temperature"] for it in study.methods]
    assert temperatures == [4.0, 2.0, 3.0]
    assert study.parts("own")["perturbation"]["temperature"] == 2.0


def test_parts_say_what_a_student_starts_from_and_what_its_logits_mean():
    flow = {"label": "EDFM", "student": {"name": "flow_matching", "backbone": "one"}}
    proxy = {"label": "Proxy", "student": "single", "objective": "proxy_dirichlet"}
    study = Study.model_validate(
        {"methods": {"one": {"label": "KD-single", "student": "single"}, "f": flow, "p": proxy}}
    )
    assert study.backbone("one") is None
    assert study.parts("f")["backbone"] == study.backbone("f") == "one"
    assert "backbone" not in study.parts("f")["student"]
    assert study.parts("f")["prediction"] == "mixture"
    assert study.parts("p")["prediction"] == "dirichlet"
    assert study.parts("p")["concentration_offset"] == 1.0


def test_only_methods_at_held_out_images_are_given_them():
    grid = {"students": ["single"], "perturbations": ["none", "held_out"]}
    study = Study.model_validate({"grid": grid, "images": {"held_out": 9}})
    assert study.parts("single_held_out")["held_out"] is True
    assert "held_out" not in study.parts("single_none") | study.parts()


def test_every_perturbation_of_a_study_has_a_title():
    grid = {"students": ["batch_ensemble"], "perturbations": ["none", "ods_each", "mixup"]}
    study = Study.model_validate({"grid": grid})
    assert study.perturbation_titles() == {
        "gaussian": "Gaussian",
        "ods": "ODS",
        "conf_ods": "ConfODS",
        "ods_each": "ODS-each",
        "mixup": "mixup",
    }
    assert study.perturbations().keys() == study.perturbation_titles().keys()
    sized = {"gaussian", "ods", "conf_ods", "ods_each"}  # what has no η is not swept
    assert study.perturbations(sized=True).keys() == sized
    assert study.perturbation_titles(sized=True).keys() == sized


TAGGED = "vit_tiny_patch16_224.augreg_in21k"

# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("resnet8", ("resnet", {"depth": 8})),
        ("resnet32", ("resnet", {"depth": 32})),
        ("resnet-110", ("resnet", {"depth": 110})),
        ("wrn10x1", ("wrn", {"depth": 10, "widen": 1})),
        ("wrn28x10", ("wrn", {"depth": 28, "widen": 10})),
        ("wrn-28-10", ("wrn", {"depth": 28, "widen": 10})),
        ("wrn16_4", ("wrn", {"depth": 16, "widen": 4})),
        ("timm:resnet18", ("timm", {"model": "resnet18"})),
        ("timm:vit_tiny_patch16_224.augreg_in21k", ("timm", {"model": TAGGED})),
        ("torchvision:resnet50", ("torchvision", {"model": "resnet50"})),
        ("file:models/mine.py:build", ("file", {"path": "models/mine.py", "function": "build"})),
    ],
)
def test_a_name_gives_family_depth_and_factor(name, parsed):
    assert parse_architecture(name) == parsed


@pytest.mark.parametrize(
    "name",
    [
        *("resnet31", "resnet2", "resnet", "resnet32x2", " resnet32", "wrn4x1", "wrn28x0", "wrn28"),
        *("timm:", "timm:a b", "timm:hf-hub:x/y", "timm:local-dir:/x", "torchvision:a.b", "hub:x"),
        *("file:mine.py", "file:mine:build", "file:mine.py:", "file:a.py:1x", "file:a.py:b:c"),
    ],
)
def test_an_architecture_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=name):
        parse_architecture(name)


def test_the_depths_that_exist_are_those_of_three_equal_stages():
    def exists(name):
        try:
            return bool(parse_architecture(name))
        except ValueError:
            return False

    assert [n for n in range(60) if exists(f"resnet{n}")] == [6 * n + 2 for n in range(1, 10)]
    assert [n for n in range(60) if exists(f"wrn{n}x2")] == [6 * n + 4 for n in range(1, 10)]


OF_LIBRARIES = [
    ({"name": "timm:resnet18", "width": 8}, "'width' is no option of 'timm:resnet18'"),
    ({"name": "file:a.py:b", "width": 16}, "'width' is no option of 'file:a.py:b'"),
    ({"name": "resnet8", "pretrained": True}, "'pretrained' is no option of 'resnet8'"),
    ({"name": "wrn10x2", "options": {"a": 1}}, "'options' is no option of 'wrn10x2'"),
    (
        {"name": "timm:resnet18", "pretrained": 1},
        "architecture.pretrained: input should be a valid boolean, not 1",
    ),
    ({"name": "timm:resnet18", "options": [1]}, "architecture.options: input should be"),
    (
        {"name": "file:a.py:b", "pretrained": True},
        "'pretrained' of 'file:a.py:b' must be a file of weights",
    ),
    ("file:../a.py:b", "'../a.py' must lie in the folder where snakemake runs"),
    ("file:/etc/a.py:b", "'/etc/a.py' must lie in the folder where snakemake runs"),
    ("file:~/a.py:b", "'~/a.py' must lie in the folder where snakemake runs"),
    ("file:models/../../a.py:b", "'models/../../a.py' must lie in the folder where snakemake"),
]


@pytest.mark.parametrize(("value", "expected"), OF_LIBRARIES)
@pytest.mark.parametrize("place", ["architecture", "student_architecture", "a method"])
def test_an_option_of_another_architecture_is_named(place, value, expected):
    own = {"name": "batch_ensemble", "architecture": value}
    place, value = ("methods.kd.student", own) if place == "a method" else (place, value)
    message = complaint(changed(place, value))
    assert message.startswith("config.yaml, study 'digits': ")
    assert expected in message


@pytest.mark.parametrize(
    "packed", [{"student": "packed"}, {"student": {"name": "packed", "architecture": "timm:x"}}]
)
def test_a_packed_ensemble_of_a_librarys_network_is_refused(packed):
    config = changed("methods.mine", {"label": "P", **packed})
    if packed == {"student": "packed"}:
        config["studies"]["digits"]["student_architecture"] = "torchvision:x"
    message = complaint(config)
    assert "methods.mine: student 'packed' is made of this package's own architectures" in message
    own = {"name": "packed", "architecture": "resnet8"}
    config = changed("methods.mine", {"label": "P", "student": own})
    config["studies"]["digits"]["architecture"] = "timm:x"
    assert read_configuration(config).studies["digits"].parts("mine")["architecture"] == {
        "name": "resnet8",
        "width": 16,
    }


@pytest.mark.parametrize(
    ("given", "dumped"),
    [
        ("timm:resnet18", {"name": "timm:resnet18"}),
        ({"name": "timm:resnet18", "pretrained": False}, {"name": "timm:resnet18"}),
        (
            {"name": "timm:resnet18", "pretrained": "a.pth", "options": {"layers": [1, 1]}},
            {"name": "timm:resnet18", "pretrained": "a.pth", "options": {"layers": [1, 1]}},
        ),
        ("resnet8", {"name": "resnet8", "width": 16}),
    ],
)
def test_an_architectures_options_are_dumped_where_they_are_not_their_defaults(given, dumped):
    study = read_one("architecture", given)
    assert study.parts()["architecture"] == study.parts("kd")["architecture"] == dumped


@pytest.mark.parametrize(
    ("given", "dumped"),
    [
        ({"name": "batch_ensemble"}, {"name": "batch_ensemble"}),
        ({"name": "batch_ensemble", "init": "normal", "std": 0.5}, {"name": "batch_ensemble"}),
        ({"name": "batch_ensemble", "init": "signs"}, {"name": "batch_ensemble", "init": "signs"}),
        ({"name": "batch_ensemble", "std": 0.1}, {"name": "batch_ensemble", "std": 0.1}),
    ],
)
def test_the_start_of_factors_is_dumped_where_it_is_not_the_papers(given, dumped):
    assert read_one("methods.kd.student", given).parts("kd")["student"] == dumped


def test_an_unknown_start_of_factors_is_named():
    message = complaint(changed("methods.kd.student", {"name": "batch_ensemble", "init": "zeros"}))
    assert "methods.kd.student.init: input should be 'normal', 'signs' or 'ones'" in message
    message = complaint(changed("methods.kd.student", {"name": "batch_ensemble", "std": 0}))
    assert "methods.kd.student.std: input should be greater than 0" in message
