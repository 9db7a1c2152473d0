import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ensdistill import InputError
from ensdistill.studies import Configuration, Study, parse_network_name, read_configuration

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
    """The good configuration with one value, at a place such as "network.name", set."""
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
    assert len(message) < 300
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
    assert set(sections) >= {"Study", "Images", "Network", "Recipe", "Method", "Distillation"}
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
    ("network.nmae", "resnet8", "unknown key 'network.nmae'; did you mean 'name'?"),
    ("memebers", 4, "unknown key 'memebers'; did you mean 'members'?"),
    ("teacher.learningrate", 0.1, "'teacher.learningrate'; did you mean 'learning_rate'?"),
    ("student.epoch", 3, "unknown key 'student.epoch'; did you mean 'epochs'?"),
    ("methods.kd.perturbaton", "ods", "'methods.kd.perturbaton'; did you mean 'perturbation'?"),
    ("methods.ods.lable", "KD", "'methods.ods.lable'; did you mean 'label'?"),
    ("images.colour", "red", "unknown key 'images.colour'; known are source, path, size, train"),
    ("zzz", 1, "unknown key 'zzz'; known are images, corruptions, out_of_distribution, network"),
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
    ("network", "resnet8"),
    ("network.name", 8),
    ("images", None),
    ("images.path", 5),
    ("images.path", [5]),
    ("methods", ["kd"]),
    ("methods", ["kd"] * 500),
    ("methods.kd", "KD"),
    ("methods.kd.label", 5),
    ("methods.kd.label", ["x" * 1000]),
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
    ("network.width", 0),
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
    ("methods.kd.alpha", 2),
    ("methods.kd.temperature", -1.0),
    ("methods.kd.eta", -0.1),
]
NO_SUCH_CHOICE = [
    ("images.source", "mnist", "'svhn', 'tinyimagenet' or 'folder', not \"mnist\""),
    ("out_of_distribution.source", "mnist", "'tinyimagenet' or 'folder', not \"mnist\""),
    ("corruptions.source", "c", "'copies' or 'official', not \"c\""),
    ("methods.kd.perturbation", "odz", "'none', 'gaussian', 'ods' or 'conf_ods', not \"odz\""),
    ("methods.kd.objective", "mse", "'cross_entropy', 'one_to_one' or 'ensemble_mean'"),
    ("methods.kd.network", "big", "'batch_ensemble' or 'single'"),
    ("student.schedule", "step", "'warmup_linear' or 'cosine'"),
    ("precision", "fp16", "'fp32' or 'bf16'"),
]


@pytest.mark.parametrize(("place", "value", "expected"), UNKNOWN_KEYS)
def test_an_unknown_key_is_named_with_what_may_be_meant(place, value, expected):
    message = complaint(changed(place, value))
    assert message.startswith("config.yaml, study 'digits': unknown key")
    assert expected in message


@pytest.mark.parametrize(("place", "value"), WRONG_TYPES + OUT_OF_RANGE)
def test_a_wrong_value_is_named_with_study_and_key(place, value):
    assert complaint(changed(place, value)).startswith(f"config.yaml, study 'digits': {place}: ")


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
def test_an_impossible_network_is_named(name):
    message = complaint(changed("network.name", name))
    assert message.startswith("config.yaml, study 'digits': network: ")
    assert repr(name) in message


TOGETHER = [
    ({"pool": 3}, "'pool' (3) is smaller than 'members' (4)"),
    ({"members": 6}, "'pool' (5) is smaller than 'members' (6)"),
    ({"teacher": {"epochs": 4}}, "teacher: 'warmup_epochs' is larger than 'epochs'"),
    ({"student": {"warmup_epochs": 301}}, "student: 'warmup_epochs' is larger than 'epochs'"),
    ({"images": {"source": "folder"}}, "images: 'path' and the source 'folder' need each other"),
    ({"images": {"path": "x"}}, "images: 'path' and the source 'folder' need each other"),
    ({"out_of_distribution": {"source": "folder"}}, "out_of_distribution: 'path' and the source"),
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
    ({"methods": {"1a": {"label": "X"}}}, "methods.1a: string should match pattern"),
    (
        {"methods": {"a": {"label": "X", "objective": "cross_entropy", "perturbation": "ods"}}},
        "methods.a: objective 'cross_entropy' uses no perturbation",
    ),
    (
        {"methods": {"a": {"label": "X", "network": "single"}}},
        "methods.a: objective 'one_to_one' needs network 'batch_ensemble'",
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
    assert read_one("methods.kd.eta", given).methods["kd"].eta == meant


def test_the_defaults_are_the_papers():
    study = Study()
    assert (study.network.name, study.members, study.distillation.alpha) == ("resnet32", 4, 0.9)
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
ALL_OWN = {"alpha": 0.0, "temperature": 3.0, "eta": 0}
METHODS = [
    (
        {"perturbation": "ods"},
        {"perturbation": "ods", "alpha": 0.5, "temperature": 2.0, "eta": 2 / 255},
    ),
    (
        {"perturbation": "gaussian", **ALL_OWN},
        {"perturbation": "gaussian", "alpha": 0.0, "temperature": 3.0, "eta": 0.0},
    ),
    (
        {"perturbation": "conf_ods", "temperature": 3.0},
        {"perturbation": "conf_ods", "alpha": 0.5, "temperature": 3.0, "eta": 2 / 255},
    ),
    ({}, {"alpha": 0.5, "temperature": 2.0}),
    (ALL_OWN, {"alpha": 0.0, "temperature": 3.0}),
    (
        {"objective": "ensemble_mean", "network": "single"},
        {"objective": "ensemble_mean", "alpha": 0.5, "temperature": 2.0},
    ),
    ({"objective": "cross_entropy"}, {"objective": "cross_entropy"}),
    ({"objective": "cross_entropy", **ALL_OWN}, {"objective": "cross_entropy"}),
]


@pytest.mark.parametrize(("own", "expected"), METHODS)
def test_a_method_has_its_own_settings_or_the_studys_and_only_those_it_uses(own, expected):
    config = changed("distillation", DISTILLATION)
    config["studies"]["digits"]["methods"]["kd"].update(own)
    settings = read_configuration(config).studies["digits"].method("kd")
    assert settings == {"objective": "one_to_one", "perturbation": "none", **expected}


# --- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("resnet8", ("resnet", 8, 1)),
        ("resnet32", ("resnet", 32, 1)),
        ("resnet-110", ("resnet", 110, 1)),
        ("wrn10x1", ("wrn", 10, 1)),
        ("wrn28x10", ("wrn", 28, 10)),
        ("wrn-28-10", ("wrn", 28, 10)),
        ("wrn16_4", ("wrn", 16, 4)),
    ],
)
def test_a_network_name_gives_family_depth_and_factor(name, parsed):
    assert parse_network_name(name) == parsed


@pytest.mark.parametrize(
    "name",
    ["resnet31", "resnet2", "resnet", "resnet32x2", " resnet32", "wrn4x1", "wrn28x0", "wrn28"],
)
def test_a_network_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=name):
        parse_network_name(name)


def test_the_depths_that_exist_are_those_of_three_equal_stages():
    def exists(name):
        try:
            return bool(parse_network_name(name))
        except ValueError:
            return False

    assert [n for n in range(60) if exists(f"resnet{n}")] == [6 * n + 2 for n in range(1, 10)]
    assert [n for n in range(60) if exists(f"wrn{n}x2")] == [6 * n + 4 for n in range(1, 10)]
