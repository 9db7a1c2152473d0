"""Every student at every perturbation that goes with it: trained, killed, resumed, stored."""

from functools import partial

import numpy as np
import pytest
import torch

from ensdistill import training
from ensdistill.batches import TrainingBatches
from ensdistill.learning import learning
from ensdistill.objectives import OBJECTIVES
from ensdistill.perturbations import PERTURBATIONS
from ensdistill.predictions import PREDICTIONS, PROBS
from ensdistill.state import TrainingState
from ensdistill.students import STUDENTS, build_student, predict
from ensdistill.studies import Study
from ensdistill.training import fit
from ensdistill.weights import load_student, save_student
from tests.test_methods import MORE, student_for

MEMBERS, CLASSES, EPOCHS, STEPS = 2, 4, 4, 2
ARCHITECTURE = {"name": "resnet8", "num_classes": CLASSES, "in_channels": 1, "width": 4}
STRATEGIES = [
    "none",
    "gaussian",
    "ods",
    "conf_ods",
    "ods_each",
    {"name": "ods_each", "single_pass": True},
    "tdiv_sdiv",
    "mixup",
    "held_out",
]
STUDY = Study.model_validate(
    {
        "members": MEMBERS,
        "images": {"held_out": 8},
        "student": {
            "epochs": EPOCHS,
            "batch_size": 6,
            "warmup_epochs": 1,
            "validate_every": 1,
            "learning_rate": 0.05,
            "clip_norm": 1.0,
        },
        "methods": {"other": {"label": "other", "student": "single"}},
        "grid": {
            "students": [
                *({"name": name, **MORE.get(name, {})} for name in STUDENTS),
                *(
                    {"student": student_for(name), "objective": name, "label": name}
                    for name in ("dirichlet", "proxy_dirichlet")
                ),
            ],
            "perturbations": STRATEGIES,
        },
    }
)


class Kill(Exception):
    """Stands for SIGKILL: nothing is done in answer to it."""


def trained(method, state=None, fatal=None):
    """A student of the method: its predictor, and its history without times.

    Args:
        fatal: the step before which the training is killed; None for a whole training.
    """
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(20) % CLASSES
    parts = STUDY.parts(method)
    torch.manual_seed(0)
    teachers = [
        build_student("single", ARCHITECTURE, 1).network.eval().requires_grad_(False)
        for _ in range(MEMBERS)
    ]
    backbone = build_student("single", ARCHITECTURE, 1)
    student = build_student(**parts["student"], architecture=ARCHITECTURE, members=parts["members"])
    if "backbone" in parts:
        student.start_from(backbone)
    how = learning(
        teachers,
        parts["objective"],
        parts["perturbation"],
        probs=partial(PROBS[parts["prediction"]], attributes=parts),
        single_pass=parts.get("single_pass", False),
        held_out=TrainingBatches(images[12:], labels[12:], 6, 1, True),
    )
    steps = iter(range(EPOCHS * STEPS))

    def killed(step, x_distill, objective=how.objective):
        if next(steps) == fatal:
            raise Kill
        return objective(step, x_distill)

    object.__setattr__(how, "objective", killed)
    predictor, history = fit(
        student,
        how,
        (images[:12], labels[:12]),
        (images, labels),
        STUDY.recipe(method),
        state=state,
        seed=3,
        crop_padding=1,
        flip=True,
        precision="fp32",
    )
    return predictor, [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def same(first, second):
    (one, rows), (other, others) = first, second
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name
        else:
            assert value == states[1][name]
    np.testing.assert_equal(rows, others)


@pytest.mark.parametrize("method", [name for name in STUDY.methods if name != "other"])
def test_a_method_trains_to_the_same_bits_twice_and_after_a_kill(method, tmp_path, monkeypatch):
    whole = trained(method)
    predictor, history = whole
    assert len(history) == EPOCHS
    assert all(np.isfinite(row["loss"]) for row in history)
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    # In the second half of the training some students are in another phase.
    for fatal in (3, EPOCHS * STEPS - 1):
        state = TrainingState(tmp_path / f"{fatal}.pt", "same")
        with pytest.raises(Kill):
            trained(method, state, fatal)
        same(trained(method, state), whole)

    save_student(tmp_path / "weights.safetensors", predictor, STUDY.parts(method))
    loaded = load_student(tmp_path / "weights.safetensors")
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    logits = predict(loaded, images)
    np.testing.assert_array_equal(logits, predict(predictor, images))
    parts = STUDY.parts(method)
    prediction = PREDICTIONS[parts["prediction"]].stored(logits, parts)
    np.testing.assert_allclose(prediction.probs().sum(1), 1, rtol=1e-9)
    if logits.shape[1] == 1 and parts["prediction"] == "mixture":
        assert prediction.diversity() is None
    else:
        assert (prediction.diversity() >= -1e-12).all()


def test_the_factorial_has_every_student_objective_and_perturbation():
    methods = STUDY.methods.values()
    assert {it.student.name for it in methods} == STUDENTS.keys()
    assert {it.perturbation.name for it in methods} == PERTURBATIONS.keys()
    unused = {"labels", "ensemble_mean"} & OBJECTIVES.keys()
    assert {it.objective.name for it in methods} >= OBJECTIVES.keys() - unused
