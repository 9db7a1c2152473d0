"""What YAML makes of a text, and what is said of it."""

import copy
from pathlib import Path

import pytest
import yaml

from ensdistill import InputError
from ensdistill.config_errors import check_files
from ensdistill.studies import read_configuration

ROOT = Path(__file__).parent.parent
STUDY = {"methods": {"kd": {"label": "KD"}}}


def changed(place, value):
    """A configuration with one value, at a place such as "teacher.epochs", set."""
    study = copy.deepcopy(STUDY)
    *path, last = place.split(".")
    node = study
    for key in path:
        node = node.setdefault(key, {})
    node[last] = value
    return {"run": ["digits"], "studies": {"digits": study}}


def complaint(config):
    with pytest.raises(InputError) as caught:
        read_configuration(config)
    return str(caught.value)


def read_one(place, value):
    return read_configuration(changed(place, value)).studies["digits"]


NOTATIONS = [
    ("teacher.learning_rate", "1e-3", 0.001),
    ("student.weight_decay", "5E-4", 0.0005),
    ("student.momentum", "9e-1", 0.9),
    ("student.epochs", "1e2", 100),
    ("images.train", "1E3", 1000),
    ("images.validation", "+2.5e2", 250),
    ("distillation.temperature", "4e0", 4.0),
    ("distillation.alpha", ".5e0", 0.5),
    ("distillation.eta", "1e-3", 0.001),
    ("confidence_bins", "1e1", 10),
    ("analyses.train_images", "2e2", 200),
]


@pytest.mark.parametrize(("place", "written", "meant"), NOTATIONS)
def test_a_number_may_be_written_as_1e_3(place, written, meant):
    assert isinstance(yaml.full_load(written), str), "YAML 1.1 reads it as a number"
    found = read_one(place, written)
    for key in place.split("."):
        found = getattr(found, key)
    assert found == meant
    assert type(found) is type(meant)


def test_published_scores_may_be_written_as_1e_3_and_a_label_stays_a_text():
    config = changed("published", {"source": "x", "scores": {"1e-3": {"nll": "1e-3"}}})
    config["studies"]["digits"]["methods"]["kd"]["label"] = "1e-3"
    study = read_configuration(config).studies["digits"]
    assert study.published.scores == {"1e-3": {"nll": 0.001}}
    assert study.methods["kd"].label == "1e-3"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1", "1"),
        ("1.5", "1.5"),
        ("no", "false"),
        ("null", "null"),
        ("", "null"),
        ("2020-01-01", "2020-01-01"),
        ("12:30", "750"),
    ],
)
def test_a_text_that_yaml_reads_as_something_else_is_to_be_quoted(written, read):
    label = yaml.full_load(f"label: {written}")["label"]
    assert complaint(changed("methods.kd.label", label)) == (
        "config.yaml, study 'digits': methods.kd.label: input should be a valid string, "
        f"not {read}; write it in quotes"
    )
    assert read_one("methods.kd.label", written or "x").methods["kd"].label == (written or "x")


def test_a_truth_value_is_true_or_false():
    assert complaint(changed("augmentation.flip", "y")).endswith('not "y"; write true or false')


MISREAD = [
    ("a: 1\nb: 2\na: 3\n", ": the key 'a' is given twice, in lines 1 and 3"),
    ("a: {b: 1, 'b': 2}\n", ": the key 'b' is given twice, in lines 1 and 1"),
    ("x: [1, {y: 1,\n y: 2}]\n", ": the key 'y' is given twice, in lines 1 and 2"),
    (
        "x: &x {a: 1}\ny:\n  <<: *x\n  a: 2\n  a: 3\n",
        ": the key 'a' is given twice, in lines 4 and 5",
    ),
    ('{"a": 1,\n "a": 2}', ": the key 'a' is given twice, in lines 1 and 2"),
    ("x:\n  no: 1\n", ", line 2: the key 'no' is read as true or false: write \"no\""),
    ("1: 1\n", ", line 1: the key '1' is read as a number: write \"1\""),
    ("1.5: 1\n", ", line 1: the key '1.5' is read as a number: write \"1.5\""),
    ("~: 1\n", ", line 1: the key '~' is read as nothing: write \"~\""),
    ("2020-01-01: 1\n", ", line 1: the key '2020-01-01' is read as a date: write \"2020-01-01\""),
    ("[1, 2]: 1\n", ", line 1: the key is read as no text"),
    (
        "a:\n\tb: 1\n",
        ", line 2: found character '\\t' that cannot start any token; indent by spaces",
    ),
    ("a: {b: 1\nc: 2\n", ", line 2: "),
    ("a: b: c\n", ", line 1: mapping values are not allowed here"),
    ("a: \x07\n", ": not to be read as YAML ("),
    ("- a\n- b\n", ": has no keys at its top, such as 'run' and 'studies'"),
    ("# run: [x]\n", ": has no keys at its top, such as 'run' and 'studies'"),
    ("studies\n", ": has no keys at its top, such as 'run' and 'studies'"),
    ("[" * 10_000, ": not to be read as YAML ("),
]


@pytest.mark.parametrize(("content", "expected"), MISREAD)
def test_a_file_that_would_be_misread_is_refused_with_the_line(tmp_path, content, expected):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        check_files([tmp_path / "absent.yaml", path])
    message = str(caught.value)
    assert message.startswith(f"{path}{expected}")
    assert message.isprintable()


def test_what_yaml_allows_is_allowed(tmp_path):
    merged = "x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\nz: {a: 4, <<: *x}\n'no': [*x, *x]\n"
    bomb = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
    endless = "a: &a [*a]\n"
    for number, content in enumerate((merged, "\ufeffa: 1\n", f"l0: &l0 [x]\n{bomb}", endless)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(content, encoding="utf-8")
        check_files([path, ROOT / "config.yaml"])
