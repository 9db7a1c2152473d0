"""What networks say around images, batch by batch, image by image and class by class by hand."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from ensdistill import analysis
from ensdistill.analysis import (
    jacobian_distances,
    logit_jacobians,
    perturbed_logits,
    sweep_logits,
    transfer_logits,
)
from ensdistill.perturbations import conf_ods_direction, ods_direction
from ensdistill.students import Student, build_student

ETA, TAU, SEED, K = 0.05, 2.0, 3, 5
SETTINGS = {"seed": SEED, "batch_size": 8}
PERTURBED = {
    "gaussian": {"name": "gaussian", "eta": ETA},
    "ods": {"name": "ods", "eta": ETA, "temperature": TAU},
    "conf_ods": {"name": "conf_ods", "eta": ETA, "temperature": TAU},
}
SETS = ["clean", *PERTURBED]
BATCHES = (slice(0, 8), slice(8, 16), slice(16, 22))


ARCHITECTURE = {"name": "resnet8", "num_classes": K, "in_channels": 1, "width": 4}


def student(seed, members=1, kind="batch_ensemble"):
    """A frozen student in eval mode whose batch normalisation is not the identity."""
    torch.manual_seed(seed)
    made = build_student(kind if members > 1 else "single", ARCHITECTURE, members)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teachers():
    return [student(seed).network for seed in range(3)]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (22, 1, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def arrays(teachers, images):
    return perturbed_logits(teachers, images, perturbations=PERTURBED, **SETTINGS)


def drawn(name, teachers, images):
    """x and ε of each batch, source and direction drawn as in training."""
    generator, host = (torch.Generator().manual_seed(SEED) for _ in range(2))
    for batch in BATCHES:
        x = images[batch].float() / 255
        source = teachers[torch.randint(len(teachers), (), generator=host).item()]
        if name == "gaussian":
            yield x, torch.empty_like(x).normal_(generator=generator)
        else:
            direction = {"ods": ods_direction, "conf_ods": conf_ods_direction}[name]
            yield x, direction(source, x, TAU, generator=generator)


def answers(networks, x):
    with torch.no_grad():
        return torch.stack([network(x) for network in networks], dim=1)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_the_images_moved_by_one_source_per_batch(arrays, teachers, images, name):
    if name == "clean":
        moved = images.float() / 255
    else:
        pairs = drawn(name, teachers, images)
        moved = torch.cat([torch.clamp(x + ETA * epsilon, 0, 1) for x, epsilon in pairs])
    close(arrays[f"{name}/logits"], answers(teachers, moved))
    close(arrays[f"{name}/examples"], moved[:8], atol=1e-6)


def test_the_seed_decides(arrays, teachers, images):
    again = perturbed_logits(teachers, images, perturbations=PERTURBED, **SETTINGS)
    settings = {**SETTINGS, "seed": SEED + 1}
    other = perturbed_logits(teachers, images, perturbations=PERTURBED, **settings)
    for name in SETS:
        key = f"{name}/logits"
        np.testing.assert_array_equal(arrays[key], again[key])
        assert (name == "clean") == np.array_equal(arrays[key], other[key])


def of_every_teacher(step, *, eta):
    """The input of teacher j is x + (j+1)·η."""
    return torch.stack([step.x + (j + 1) * eta for j in range(len(step.teachers))])


def test_an_input_for_every_teacher_is_taken_in_turn_and_asked_of_all(
    teachers, images, monkeypatch
):
    monkeypatch.setitem(analysis.PERTURBATIONS, "each", of_every_teacher)
    options = {"each": {"name": "each", "eta": ETA}}
    made = perturbed_logits(teachers, images, perturbations=options, **SETTINGS)
    moved = torch.stack([image / 255 + (n % 3 + 1) * ETA for n, image in enumerate(images)])
    close(made["each/logits"], answers(teachers, moved))
    close(made["each/examples"], moved[:8], atol=1e-6)
    swept = sweep_logits(teachers, images, etas=[ETA], perturbations=options, **SETTINGS)
    np.testing.assert_array_equal(swept["each/logits"][0], made["each/logits"])


@pytest.mark.parametrize("count", [5, 13, 22, 30])
@pytest.mark.parametrize("half", [False, True])
def test_held_out_images_come_in_turn(teachers, images, monkeypatch, count, half):
    # Themselves, each once; or something made of them and of each image.
    function = (lambda step: (step.x + step.held_out) / 2) if half else lambda step: step.held_out
    monkeypatch.setitem(analysis.PERTURBATIONS, "others", function)
    held_out = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    options = {"perturbations": {"others": {"name": "others"}}, **SETTINGS}
    made = perturbed_logits(teachers, images, held_out=held_out, **options)
    moved = torch.stack([held_out[n % count] / 255 for n in range(22)])
    moved = (images / 255 + moved) / 2 if half else moved[:count]
    close(made["others/logits"], answers(teachers, moved))
    close(made["others/examples"], moved[:8], atol=1e-6)
    assert len(made["clean/logits"]) == 22


def test_a_sweep_moves_images_along_the_same_directions_at_every_size(arrays, teachers, images):
    etas = [0.01, ETA, 0.3]
    swept = sweep_logits(teachers, images, etas=etas, perturbations=PERTURBED, **SETTINGS)
    assert list(swept) == [f"{name}/logits" for name in PERTURBED]
    for name in PERTURBED:
        x, epsilon = map(torch.cat, zip(*drawn(name, teachers, images), strict=True))
        for eta, logits in zip(etas, swept[f"{name}/logits"], strict=True):
            close(logits, answers(teachers, torch.clamp(x + eta * epsilon, 0, 1)))
        # At the study's own size: what rule `perturbed` stores.
        np.testing.assert_array_equal(swept[f"{name}/logits"][1], arrays[f"{name}/logits"])


def test_transfer_asks_every_network_where_every_source_leads(teachers, images):
    made = transfer_logits(teachers, images, eta=ETA, temperature=TAU, **SETTINGS)
    x = images.float() / 255
    generator = torch.Generator().manual_seed(SEED)
    w, noise = [], []
    for batch in BATCHES:
        w.append(torch.empty(len(x[batch]), K).uniform_(-1, 1, generator=generator))
        noise.append(torch.empty(len(x[batch]), 64).normal_(generator=generator))
    w, noise = torch.cat(w), torch.cat(noise).numpy()
    close(made["clean/logits"], answers(teachers, x))
    directions = [ods_direction(source, x, TAU, w) for source in teachers]
    for source, direction in enumerate(directions):
        moved = torch.clamp(x + ETA * direction, 0, 1)
        close(made["ods/logits"][source], answers(teachers, moved), atol=1e-4)
    flat = [direction.flatten(1).numpy() for direction in directions]
    for n in range(len(x)):
        for i in range(3):
            for j in range(3):
                expected = flat[i][n] @ flat[j][n] / 64  # of norm √D each
                assert made["cosines"][n, i, j] == pytest.approx(expected, abs=1e-4)
            expected = flat[i][n] @ noise[n] / (8 * np.linalg.norm(noise[n]))
            assert made["random_cosines"][n, i] == pytest.approx(expected, abs=1e-4)


def test_random_directions_are_nearly_orthogonal_to_ods(teachers):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8)
    cosines = transfer_logits(teachers, images, eta=ETA, temperature=TAU)["random_cosines"]
    # In D dimensions a random cosine has mean 0 and mean square 1/D.
    assert cosines.mean() == pytest.approx(0, abs=0.02)
    assert np.square(cosines).mean() == pytest.approx(1 / 64, rel=0.3)


def jacobian(student, image):
    """(M, K, D) of one image by one backward pass per member and class."""
    image = image[None].clone().requires_grad_()
    logits = student(image)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.autograd.grad(logits[j, 0, k], image, retain_graph=True)[0].flatten()
                    for k in range(logits.shape[2])
                ]
            )
            for j in range(logits.shape[0])
        ]
    )


@pytest.mark.parametrize("kind", ["batch_ensemble", "mimo", "packed", "hydra"])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("elements", [2**22, 700, 1])
def test_jacobians_equal_one_backward_pass_per_logit(monkeypatch, members, elements, kind):
    # 4 images of 64 pixels: with 700 elements two classes at a time (one, for 3 members).
    monkeypatch.setattr(analysis, "JACOBIAN_ELEMENTS", elements)
    made = student(7, members, kind).double()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    expected = torch.stack([jacobian(made, image) for image in x])
    assert expected.abs().amax((0, 2, 3)).min() > 1e-2
    np.testing.assert_allclose(logit_jacobians(made, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elements", [2**22, 2 * 3 * K * 64, 1])
def test_jacobian_distances_equal_loops_over_images_and_members(monkeypatch, images, elements):
    # Images all at once, two at a time, and one at a time.
    monkeypatch.setattr(analysis, "JACOBIAN_ELEMENTS", elements)
    teachers = [student(seed) for seed in range(3)]
    students = {"be/0": student(4, members=3), "single/0": student(5), "teacher/0": teachers[1]}
    students["sampled/0"] = student(6, members=4)
    found = jacobian_distances(teachers, students, images[:5])
    assert set(found) == {f"{name}/{kind}" for name in students for kind in ("error", "cosine")}

    exact = {id(made): deepcopy(made).double() for made in [*teachers, *students.values()]}
    for n, image in enumerate(images[:5].double() / 255):
        for name, made in students.items():
            own = jacobian(exact[id(made)], image).numpy()
            if len(own) == 4:  # not one for each teacher: their mean
                own = own.mean(0, keepdims=True)
            for j, teacher in enumerate(teachers):
                a = own[j if len(own) > 1 else 0]
                b = jacobian(exact[id(teacher)], image)[0].numpy()
                error = np.linalg.norm(a - b, "fro") / np.linalg.norm(b, "fro")
                cosine = np.trace(a @ b.T) / (np.linalg.norm(a, "fro") * np.linalg.norm(b, "fro"))
                assert found[f"{name}/error"][n, j] == pytest.approx(error, rel=1e-4)
                assert found[f"{name}/cosine"][n, j] == pytest.approx(cosine, abs=1e-4)


def test_the_mean_of_many_members_takes_one_pass_of_what_they_share():
    class Sampled(Student):
        members = 32

        def __init__(self):
            super().__init__()
            self.network, self.seen = student(3).network, []
            self.samples = torch.randn(32, 1, K)

        def member_logits(self, x):
            self.seen.append(x.shape)
            return self.network(x) * self.samples.exp() + self.samples

    made = Sampled().double()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    expected = torch.stack([jacobian(made, image) for image in x]).mean(1, keepdim=True)
    made.seen.clear()
    found = logit_jacobians(made, x, mean=True)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert made.seen == [x.shape]


@pytest.mark.parametrize("options", [{"rank": 2}, {"width": 16}], ids=["gaussian", "flow"])
def test_samples_of_logits_are_compared_by_their_mean(options, images):
    kind = "gaussian_logits" if "rank" in options else "flow_matching"
    torch.manual_seed(0)
    made = build_student(kind, ARCHITECTURE, 3, samples=5, **options)
    made = made.eval().requires_grad_(False).double()
    x = images[:3].double() / 255
    expected = torch.stack([jacobian(made, image) for image in x]).mean(1, keepdim=True)
    found = logit_jacobians(made, x, mean=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 1e-3


def test_a_student_equal_to_its_teacher_has_its_jacobian(images):
    teachers = [student(seed) for seed in range(3)]
    found = jacobian_distances(teachers, {"0": teachers[0]}, images[:4])
    np.testing.assert_array_equal(found["0/error"][:, 0], 0)
    np.testing.assert_allclose(found["0/cosine"][:, 0], 1, rtol=1e-6)
    assert found["0/error"][:, 1:].min() > 0.1
