"""What config.yaml may say of networks from elsewhere, and how it is refused."""

import pytest

from ensdistill import InputError
from ensdistill.studies import read_configuration


def read(**study):
    return read_configuration({"run": ["a"], "studies": {"a": study}}).studies["a"]


def fails(**study):
    with pytest.raises(InputError) as caught:
        read(**study)
    return str(caught.value).removeprefix("config.yaml, study 'a': ")


def test_the_pool_and_those_that_teach_follow_from_the_list():
    files = ["a.pt", "b.pt", "c.pt"]
    study = read(teachers=files)
    assert (study.pool, study.members) == (3, 3)
    study = read(teachers=files, members=2, pool=3)
    assert (study.pool, study.members) == (3, 2)
    assert fails(teachers=files, pool=4) == "'pool' is 4, and 'teachers' lists 3"
    assert fails(teachers=files, members=4) == "'pool' (3) is smaller than 'members' (4)"
    assert (read().pool, read().members) == (5, 4)


def test_each_teacher_may_have_its_own_architecture():
    study = read(architecture="resnet14", teachers=["a.pt", {"architecture": "wrn10x2"}])
    names = [study.parts(teacher=place)["architecture"]["name"] for place in (0, 1)]
    assert names == ["resnet14", "wrn10x2"]
    assert study.parts("kd")["architecture"]["name"] == "resnet14"
    assert [study.own(place).weights for place in (0, 1)] == ["a.pt", None]


def test_a_study_without_them_is_dumped_as_it_was():
    assert not {"teachers", "judge"} & read().model_dump().keys()
    study = read(teachers=["a.pt", "b.pt"], judge={"x": {"label": "X", "logits": "x.h5"}})
    assert {"teachers", "judge"} <= study.model_dump().keys()


def test_what_is_judged_says_which_files_there_are_of_it():
    of_logits, all_files = {"logits/{}.h5"}, {"{}/weights.safetensors"}
    shifted = {"logits/shifted/{}.h5"}
    judge = read(
        judge={
            "a": {"label": "A", "logits": ["a0.h5", "a1.h5"]},
            "b": {"label": "B", "logits": "b.h5", "shifted": "c.h5"},
            "c": {"label": "C", "weights": "c.pt"},
        }
    ).judge
    assert [judge[name].has for name in "abc"] == [
        of_logits,
        of_logits | shifted,
        of_logits | shifted | all_files,
    ]
    assert [judge[name].files for name in "abc"] == [["a0.h5", "a1.h5"], ["b.h5"], ["c.pt"]]


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"archtecture": "resnet8"}, "unknown key 'teachers.1.archtecture'; did you mean 'archi"),
        ({"architecture": "resnet9"}, "teachers.1.architecture.name: 'resnet9' does not exist"),
        ({"architecture": {"name": "resnet8", "with": 3}}, "did you mean 'width'?"),
        (3, "teachers.1: input should be a valid dictionary, not 3"),
        ({"prefixes": {"a": "b"}}, "teachers.1: 'prefixes' is about 'weights', and there is none"),
        ({"weights": "x", "mean": [1]}, "teachers.1: 'mean' and 'std' need each other"),
        ({"weights": "x", "mean": [1], "std": [1, 2]}, "have a number per channel each"),
        ({"weights": "x", "mean": [0], "std": [0]}, "teachers.1.std.0: input should be greater"),
        ({"weights": "x", "classes": ["a", "a"]}, "teachers.1: 'classes' has a name twice"),
    ],
)
def test_a_wrong_teacher_is_named(teacher, said):
    assert said in fails(teachers=["a.pt", teacher])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"label": "KD", "weights": "a"}, "the label 'KD' of judge.x is already taken"),
        ({"label": "DE-3", "weights": "a"}, "the label 'DE-3' of judge.x is already taken"),
        ({"label": "X", "weights": "a", "logits": "b"}, "one of 'weights' and 'logits' is needed"),
        ({"label": "X"}, "judge.x: one of 'weights' and 'logits' is needed, not both"),
        ({"label": "X", "logits": ["a", "b"], "shifted": "c"}, "'shifted' needs a file for each"),
        ({"label": "X", "logits": "a", "prefixes": {}}, "judge.x: 'prefixes' is about 'weights'"),
        ({"labels": "X", "logits": "a"}, "unknown key 'judge.x.labels'; did you mean 'label'?"),
    ],
)
def test_a_wrong_entry_of_what_is_judged_is_named(entry, said):
    assert said in fails(judge={"x": entry})


def test_names_and_labels_are_taken_once():
    entry = {"label": "X", "weights": "a"}
    assert fails(judge={"kd": entry}) == "'kd' is a name in 'methods' and in 'judge'"
    assert "the label 'X' of judge.y is already" in fails(judge={"x": entry, "y": entry})
    published = {"source": "s", "scores": {"X": {"nll": 1.0}}}
    assert read(judge={"x": entry}, published=published).published is not None
