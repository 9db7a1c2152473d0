"""What is fast equals what is plain: the published algorithm, written out in `benchmarks.plain`."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import plain
from benchmarks.measurements import steps, write_and_judge
from benchmarks.roofline import Operations
from benchmarks.rows import Bench, table
from benchmarks.scale import JUDGED, Files, Scale, write
from benchmarks.workloads import CONF_ODS, DISTILLATION, FROM_LABELS, RECIPE, Shape, Workload, sgd
from ensdistill.learning import learning, train_step
from ensdistill.networks import fold_batch_norms
from ensdistill.students import Step

CPU = torch.device("cpu")
SHAPES = {
    "resnet8": Shape("resnet8", 8, images=6, teacher_images=6),
    "wrn10x2": Shape("wrn10x2", 8, images=6, teacher_images=6),
}
TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-3, "atol": 1e-5},
}


@pytest.fixture(params=SHAPES)
def workload(request):
    return Workload(SHAPES[request.param], CPU)


def close(ours, theirs, dtype):
    torch.testing.assert_close(ours, theirs, **TOLERANCES[dtype])


def plain_sgd(network):
    """Factors r and s at half the rate, and without weight decay."""
    named = dict(network.named_parameters())
    factors = [named.pop(name) for name in [*named] if name.endswith((".r", ".s"))]
    others = {"params": named.values(), "weight_decay": RECIPE["weight_decay"]}
    groups = [others, {"params": factors, "lr": RECIPE["learning_rate"] / 2}]
    return torch.optim.SGD(groups, RECIPE["learning_rate"], RECIPE["momentum"])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_steps_of_a_student_equal_the_plain_ones(workload, dtype, form):
    networks = workload.networks
    student, plain_student = (
        networks[name].to(dtype).train() for name in ("batch_ensemble", "plain_student")
    )
    plain_teachers = [it.to(dtype) for it in networks["plain_teachers"]]
    teachers = []
    for teacher in plain_teachers:  # folded in the precision in which they are compared
        network = workload.build("single").network.to(dtype).eval().requires_grad_(False)
        network.load_state_dict(teacher.state_dict())
        teachers.append(fold_batch_norms(network))
    how = learning(teachers, **CONF_ODS)
    optimizer, plain_optimizer = sgd(student), plain_sgd(plain_student)
    ours, theirs, host, its_host = (torch.Generator().manual_seed(5) for _ in range(4))
    batches = workload.batches(6)
    for _ in range(3):
        x, y = next(batches)
        x = x.to(dtype)
        step = Step(student, teachers, x, y, 0.0, ours, host)
        measured = train_step(step, how, optimizer, "fp32")
        source = torch.randint(len(teachers), (), generator=its_host).item()
        w = torch.empty(len(x), 10, dtype=dtype).uniform_(-1, 1, generator=theirs)
        loss, logits = plain.student_loss(
            plain_student, plain_teachers, source, w, x, y, **DISTILLATION
        )
        plain_loss, _ = plain.train_step(loss, logits, y, plain_optimizer)
        close(measured["loss"].item(), plain_loss, dtype)
        for key, value in plain_student.state_dict().items():
            close(student.network.state_dict()[key], value, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_steps_of_a_teacher_equal_the_plain_ones(workload, dtype):
    single, other = (workload.networks[it].to(dtype).train() for it in ("single", "plain_single"))
    optimizer, plain_optimizer = sgd(single), plain_sgd(other)
    batches = workload.batches(6)
    for _ in range(3):
        x, y = next(batches)
        x = x.to(dtype)
        step = Step(single, [], x, y, 0.0, workload.generator, workload.host)
        measured = train_step(step, learning([], **FROM_LABELS), optimizer, "fp32")
        logits = other(x)
        loss, accuracy = plain.train_step(F.cross_entropy(logits, y), logits, y, plain_optimizer)
        close(measured["loss"].item(), loss, dtype)
        assert measured["accuracy"].item() == pytest.approx(100 * accuracy)
        for key, value in other.state_dict().items():
            close(single.network.state_dict()[key], value, dtype)


def test_folded_batch_norms_change_no_logits_and_no_input_gradients(workload):
    single, other = (workload.networks[it].double().eval() for it in ("single", "plain_single"))
    network = single.network
    torch.manual_seed(1)
    for norm in (it for it in network.modules() if isinstance(it, torch.nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            torch.nn.init.normal_(tensor)
        torch.nn.init.uniform_(norm.running_var, 0.1, 2)
    other.load_state_dict(network.state_dict())
    count = sum(isinstance(it, torch.nn.BatchNorm2d) for it in network.modules())
    folded = fold_batch_norms(network)
    assert sum(isinstance(it, torch.nn.BatchNorm2d) for it in folded.modules()) < count / 1.5
    results = []
    for it in (folded, other):
        x = torch.rand(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        logits = it(x.requires_grad_())
        results.append((logits, *torch.autograd.grad(logits[:, 3].sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, torch.float64)


def test_the_roofline_counts_arithmetic_and_memory_of_every_kind_of_operation():
    x, weight = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3, requires_grad=True)
    rate, bandwidth = 1e6, 1e3
    with Operations(rate, bandwidth) as seen:
        F.relu(F.conv2d(x, weight, padding=1)).sum().backward()
    forward = 2 * (2 * 4 * 5 * 5) * (3 * 3 * 3)  # of each output's multiply–adds
    assert seen.flop["convolution"] == 2 * forward  # the images need no gradient
    out, gradient = 4 * (2 * 4 * 5 * 5), 4 * (4 * 3 * 3 * 3)
    read = 4 * (2 * 3 * 5 * 5) + gradient
    assert seen.bytes["convolution"] == (read + out) + (out + read + gradient)
    assert seen.bytes["ReLU"] == 2 * out + 3 * out
    assert seen.flop["ReLU"] == 0
    assert seen.roofline["ReLU"] == pytest.approx(5 * out / bandwidth)
    longest = max(forward / rate, (read + out) / bandwidth)
    longest += max(forward / rate, (out + read + gradient) / bandwidth)
    assert seen.roofline["convolution"] == pytest.approx(longest)
    assert seen.bytes["views"] == 0
    assert all(seconds > 0 for seconds in seen.seconds.values())


def test_rows_of_the_benchmark_hold_what_they_say():
    bench = Bench(["input_pipeline_small", "teacher_step_fp32"])
    shape = Shape("resnet8", 8, channels=1, images=4, teacher_images=4, flip=False, rounds=3)
    steps(bench, "small", Workload(shape, CPU))
    rows = [row | {"hardware": "a CPU"} for row in json.loads(json.dumps(bench.rows))]
    assert [row["name"] for row in rows] == ["teacher_step_fp32_small", "input_pipeline_small"]
    for row in rows:
        assert 0 < row["ours_s"] < 10
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert f"| `{row['name']}` |" in table(rows, {"convolution": 0.75, "all else": 0.25})
    assert rows[0]["precision"] == "fp32"
    assert rows[0]["n"] == 3


def test_what_the_benchmark_judges_are_files_as_a_study_has_them(tmp_path):
    """Its files are invented, and claims and tables change what they read."""
    size = Scale(classes=5, students=1, images=50, teachers=4)
    found = write_and_judge(size)
    assert found["write"] > 0
    assert len(found["judge"]) == 3
    write(str(tmp_path), size)
    for name, judge in JUDGED.items():
        assert judge(Files(str(tmp_path), size)) is not None, name
