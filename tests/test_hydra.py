"""Hydra against M explicit networks, and its two parts of a training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ensdistill.hydra import split
from ensdistill.inference import inference_forms
from ensdistill.networks import build_network, fold_batch_norms
from ensdistill.objectives import OBJECTIVES
from ensdistill.students import Step, build_student

M, B, K = 3, 4, 5
ARCHITECTURE = {
    "name": "resnet8", "num_classes": K, "in_channels": 3, "width": 4,
    "mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.3],
}  # fmt: skip
NAMES, CUTS = ("resnet8", "wrn10x2"), ("stage", "linear")


def shaken(module):
    """With other weights in each head, and statistics that are not the identity."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and "normalize" not in name:
            tensor.add_(torch.rand_like(tensor) * (0.5 if "running_var" in name else 0.1))


def student_of(name="resnet8", cut="stage", **options):
    torch.manual_seed(0)
    student = build_student("hydra", {**ARCHITECTURE, "name": name}, M, cut=cut, **options)
    shaken(student.network)
    return student.double()


def explicit(student):
    """M networks, each of the body and one head."""
    networks = []
    for head in student.network.heads:
        network = build_network(**student.spec["architecture"]).double()
        network.load_state_dict({**student.network.body.state_dict(), **head.state_dict()})
        networks.append(network)
    return networks


def images(*shape):
    return torch.rand(*shape, 3, 8, 8, dtype=torch.float64)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_body_and_head_are_the_network_to_the_bit(name, cut, bfloat16):
    network = build_network(**{**ARCHITECTURE, "name": name})
    whole = copy.deepcopy(network)
    body, head = split(network, cut)
    x = torch.rand(B, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        ours, theirs = head(body(x)), whole(x)
    assert torch.equal(ours, theirs)
    assert ours.dtype == torch.float32
    of_head = {"stage": {"blocks.2", "head", "final_norm"}, "linear": {"head"}}[cut]
    for key in whole.state_dict():
        here = any(key.startswith(f"{it}.") for it in of_head)
        assert (key in head.state_dict(), key in body.state_dict()) == (here, not here), key


@pytest.mark.parametrize("name", NAMES)
def test_heads_may_begin_with_any_block(name):
    student = student_of(name, "blocks.1").eval()
    networks = [network.eval() for network in explicit(student)]
    of_heads = {
        key.split(".")[1] for key in student.network.heads[0].state_dict() if "blocks" in key
    }
    assert of_heads == {"1", "2"}
    x = images(B)
    expected = torch.stack([network(x) for network in networks])
    close(student(x), expected)
    for form in inference_forms(student):
        torch.testing.assert_close(form(x), expected, rtol=1e-8, atol=1e-8)


def test_there_is_no_other_cut():
    with pytest.raises(ValueError, match="'stage' or 'linear' layer, not 'block'"):
        build_student("hydra", ARCHITECTURE, M, cut="block")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_it_equals_explicit_networks_forward_and_backward(name, cut, training):
    student = student_of(name, cut).train(training)
    networks = [network.train(training) for network in explicit(student)]
    x = images(B)
    ours, theirs = student(x), torch.stack([network(x) for network in networks])
    close(ours, theirs)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for key, parameter in student.network.body.named_parameters():
        close(parameter.grad, sum(it.get_parameter(key).grad for it in networks))
    for head, network in zip(student.network.heads, networks, strict=True):
        for key, parameter in head.named_parameters():
            close(parameter.grad, network.get_parameter(key).grad)


@pytest.mark.parametrize("cut", CUTS)
def test_members_may_have_images_of_their_own_which_the_body_sees_together(cut):
    student = student_of(cut=cut)
    rows = []
    student.network.body.stem.register_forward_hook(lambda *seen: rows.append(len(seen[1][0])))
    own = images(M, B)
    student(own)
    student(own[0])
    assert rows == [M * B, B]
    student.eval()
    networks = [network.eval() for network in explicit(student)]
    close(student(own), torch.stack([net(x) for net, x in zip(networks, own, strict=True)]))


def heads_are_equal(student):
    first, *others = [head.state_dict() for head in student.network.heads]
    return all(torch.equal(it[key], first[key]) for it in others for key in first)


def learn(student, steps=1):
    groups = student.parameter_groups(0.1, 0.01)
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    target = torch.randn(M, B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        (student.train()(images(B)) - target).square().mean().backward()
        optimizer.step()


def test_head_0_learns_alone_then_it_is_copied_once_and_all_learn():
    student = student_of(together=0.5)
    x = images(B)
    student.set_progress(0.0)
    before = copy.deepcopy(student.network.state_dict())
    learn(student, 2)
    for key, value in student.network.state_dict().items():
        waits = key.startswith(("heads.1", "heads.2")) or "normalize" in key
        assert torch.equal(value, before[key]) == waits, key
    student.eval()
    expected = explicit(student)[0].eval()
    for shown, answer in ((x, expected(x)[None].expand(M, -1, -1)), (own := images(M, B), None)):
        answer = torch.stack([expected(it) for it in own]) if answer is None else answer
        close(student(shown), answer)
    student.set_progress(0.49)
    assert not heads_are_equal(student)
    head = copy.deepcopy(student.network.heads[0].state_dict())
    student.set_progress(0.5)
    assert heads_are_equal(student)
    for key, value in student.network.heads[2].state_dict().items():
        assert torch.equal(value, head[key]), key
    learn(student)
    assert not heads_are_equal(student)
    learnt = copy.deepcopy(student.network.state_dict())
    student.set_progress(0.75)
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, learnt[key]), key


def test_at_first_its_gradient_is_that_of_the_mean_teacher():
    """mean_j KL(p_j ‖ q) and KL(p̄ ‖ q) differ by what does not depend on q."""
    student, temperature = student_of(together=0.5), 3.0
    student.set_progress(0.0)
    teachers = [build_network(**ARCHITECTURE).double().eval() for _ in range(M)]
    x, generators = images(B), (torch.Generator(), torch.Generator())
    step = Step(student, teachers, x, torch.arange(B), 0.0, *generators)
    loss = OBJECTIVES["one_to_one"](step, x, alpha=1.0, temperature=temperature)["loss"]
    learning = [*student.network.body.parameters(), *student.network.heads[0].parameters()]
    ours = torch.autograd.grad(loss, learning)
    twin = explicit(student)[0].train()
    with torch.no_grad():
        mean = sum(F.softmax(teacher(x) / temperature, 1) for teacher in teachers) / M
    log_q = F.log_softmax(twin(x) / temperature, 1)
    expected = temperature**2 * (mean * (mean.log() - log_q)).sum(1).mean()
    names = [it for part in (student.network.body, student.network.heads[0])
             for it, _ in part.named_parameters()]  # fmt: skip
    theirs = torch.autograd.grad(expected, [twin.get_parameter(name) for name in names])
    for mine, their in zip(ours, theirs, strict=True):
        close(mine, their)


def test_what_is_stored_in_the_first_part_has_head_0_everywhere():
    student = student_of(together=0.5)
    student.set_progress(0.25)
    learn(student)
    assert not heads_are_equal(student)
    alone = student.eval()(x := images(B))
    assert student.predictor() is student
    assert heads_are_equal(student)
    again = build_student(**student.spec).double().eval()
    again.network.load_state_dict(student.network.state_dict())
    close(again(x), alone)
    student.set_progress(0.5)
    learn(student)
    stored = copy.deepcopy(student.network.state_dict())
    student.predictor()
    assert all(torch.equal(value, stored[k]) for k, value in student.network.state_dict().items())


@pytest.mark.parametrize(("saved_at", "copies"), [(0.4, True), (0.6, False)])
def test_a_training_that_goes_on_copies_once(saved_at, copies):
    student = student_of(together=0.5)
    for progress in (0.0, saved_at):
        student.set_progress(progress)
        learn(student)
    again = build_student(**student.spec).double()
    again.load_state_dict(copy.deepcopy(student.state_dict()))
    again.set_progress(0.6)
    assert heads_are_equal(again) == copies


def test_from_the_start_together_no_head_waits():
    student = student_of(together=0.0)
    student.set_progress(0.0)
    assert len(torch.unique(student(images(B)))) == M * B * K


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_batch_norms_can_be_folded(name, cut):
    student, x = student_of(name, cut).eval(), images(B)
    expected = student(x)
    norms = sum(isinstance(it, nn.BatchNorm2d) for it in student.modules())
    fold_batch_norms(student.network)
    assert sum(isinstance(it, nn.BatchNorm2d) for it in student.modules()) < norms
    close(student(x), expected)
