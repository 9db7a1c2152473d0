"""The forecast of a study: what its jobs are, what they take, and how they run on paper."""

import csv
import io
import itertools
import re
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ensdistill import InputError
from ensdistill.cli import app
from ensdistill.planning import plan as planning
from ensdistill.planning.counting import peak
from ensdistill.planning.data import data_of
from ensdistill.planning.forecast import Forecast, Start
from ensdistill.planning.jobs import Job, planned_jobs
from ensdistill.planning.measuring import Meter, neighbours
from ensdistill.planning.schedule import Task, critical_path, schedule
from ensdistill.studies import read_configuration
from tests.project import TINY, Project
from tests.test_init import write_images

CPU = torch.device("cpu")


def after(*numbers):
    return frozenset(numbers)


# --- the schedule ----------------------------------------------------------------------------


def test_independent_tasks_fill_the_cores():
    tasks = {number: Task(seconds) for number, seconds in enumerate([3, 3, 2, 2, 2])}
    # On two cores: 0 and 1 until 3, 2 and 3 until 5, 4 until 7.
    done = schedule(tasks, cores=2)
    assert done.starts == {0: 0, 1: 0, 2: 3, 3: 3, 4: 5}
    assert done.makespan == 7
    assert done.idle == pytest.approx(1 - 12 / 14)
    assert schedule(tasks, cores=1).makespan == 12
    assert schedule(tasks, cores=1).idle == 0


def test_a_task_waits_for_its_predecessors():
    tasks = {0: Task(1), 1: Task(5, after(0)), 2: Task(2, after(0)), 3: Task(1, after(1, 2))}
    done = schedule(tasks, cores=8)
    assert done.starts == {0: 0, 1: 1, 2: 1, 3: 6}
    assert critical_path(tasks) == [0, 1, 3]
    assert done.makespan == 7


def test_machines_with_too_few_cards_for_a_job_are_left_out():
    def planned(cards):
        job = Job(0, "teacher", {}, (), (), cards, cards, 0, frozenset())
        return [planning.Planned(job, Task(4, cards=cards), 0.0)]

    assert [*planning._on_paper(planned(2), cards=True)[0]] == [4, 16, 64]
    assert [*planning._on_paper(planned(100), cards=True)[0]] == [100]
    assert [*planning._on_paper(planned(2), cards=False)[0]] == [1, 4, 16, 64]


def test_cards_are_a_second_bound():
    tasks = {0: Task(4, cards=1), 1: Task(4, cards=1), 2: Task(1), 3: Task(3, cards=2)}
    done = schedule(tasks, cores=8, cards=2)
    assert done.starts == {0: 0, 1: 0, 2: 0, 3: 4}
    assert done.idle == pytest.approx(1 - (4 + 4 + 2 * 3) / (2 * 7))
    assert schedule(tasks, cores=8).makespan == 4  # cards do not count
    with pytest.raises(InputError, match="a job needs 2 cards, and there are 1"):
        schedule(tasks, cores=8, cards=1)


def test_a_task_with_all_cores_runs_alone_and_first_by_its_priority():
    # As `costs`: whatever the machine has; small ones do not wait for it once they run.
    tasks = {0: Task(1), 1: Task(2, after(0)), 2: Task(5, after(0), cores=1000, priority=1)}
    assert schedule(tasks, cores=4).starts == {0: 0, 2: 1, 1: 6}
    later = {**tasks, 3: Task(3)}  # which still runs when it could begin
    assert schedule(later, cores=4).starts == {0: 0, 3: 0, 1: 1, 2: 3}


def test_the_largest_input_comes_first():
    tasks = {0: Task(1, size=1), 1: Task(1, size=3), 2: Task(1, size=2)}
    assert schedule(tasks, cores=1).starts == {1: 0, 2: 1, 0: 2}


def test_no_schedule_beats_its_bounds_or_is_twice_the_best():
    rng = np.random.default_rng(0)
    for cores in (1, 2, 3, 7):
        tasks = {}
        for number in range(60):
            before = after(*rng.choice(number, min(number, 2), replace=False).tolist())
            tasks[number] = Task(float(rng.integers(1, 9)), before, int(rng.integers(1, 3)))
        done = schedule(tasks, cores)
        ends = {number: done.starts[number] + it.seconds for number, it in tasks.items()}
        assert all(done.starts[n] >= ends[it] for n, task in tasks.items() for it in task.after)
        for now in done.starts.values():
            busy = [n for n in tasks if done.starts[n] <= now < ends[n]]
            assert sum(min(tasks[n].cores, cores) for n in busy) <= cores
        chain = sum(tasks[it].seconds for it in critical_path(tasks))
        work = sum(it.seconds * min(it.cores, cores) for it in tasks.values())
        assert max(chain, work / cores) <= done.makespan
        # Graham's bound, with the cores that a task of two may have to wait for.
        assert done.makespan <= chain + work / max(1, cores - 1)


def test_no_tasks_take_no_time():
    assert schedule({}, cores=2).makespan == 0
    assert schedule({}, cores=2).idle == 0
    assert critical_path({}) == []


# --- the jobs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project.new(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def jobs(project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        return planned_jobs(everything=True)


def test_the_jobs_are_those_that_snakemake_plans(project, jobs):
    told = project.run("--dry-run", "--forceall").stdout
    table = told.partition("Job stats:")[2].partition("\ntotal")[0]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.M)}
    assert counts.pop("all") == 1
    found = {}
    for job in jobs:
        found[job.rule] = found.get(job.rule, 0) + 1
    assert found == counts


def test_a_job_comes_after_those_that_make_its_input(jobs):
    by_number = {job.number: job for job in jobs}
    (student,) = (it for it in jobs if it.wildcards.get("method") == "kd")
    rules = sorted(by_number[number].rule for number in student.after)
    assert rules == ["images", "teacher", "teacher"]
    assert student.gpu == student.threads == 1
    (costs,) = (job for job in jobs if job.rule == "costs")
    assert costs.threads > 1000  # all that there are
    assert costs.priority == 1


# --- what they take --------------------------------------------------------------------------


def meter(speed=None, side=8):
    images = {"classes": ["a", "b", "c"], "mean": [0.5], "std": [0.2], "shape": (1, side, side)}
    return Meter(images, CPU, speed)


def test_counted_seconds_are_operations_over_speed():
    study = read_configuration({"run": ["tiny"], "studies": {"tiny": TINY}}).studies["tiny"]
    counted = meter(speed=1e6)
    # resnet8 of width 4 at 8×8, from its layers; its shortcuts have no weights.
    widths, sides = [4, 8, 16], [8, 4, 2]
    macs = 9 * 1 * widths[0] * sides[0] ** 2
    for place, (width, side) in enumerate(zip(widths, sides, strict=True)):
        inner = widths[max(place - 1, 0)]
        macs += 9 * (inner + width) * width * side**2
    macs += widths[-1] * 3
    recipe, augmentation = study.teacher.model_dump(), study.augmentation.model_dump()
    nobody = {"teachers": [], "backbone": None, "count": 200, "side": None}
    with counted.arithmetic():  # tensors have no numbers
        seconds = counted.prediction(study.parts(), 100)
        training = counted.training(study.parts(), recipe, augmentation, "fp32", **nobody)
    assert seconds == pytest.approx(2 * macs / 1e6)
    # Backwards twice as many, but for the images, of which no gradient is asked.
    first = 9 * 1 * widths[0] * sides[0] ** 2
    assert training.step == pytest.approx(64 * 2 * (3 * macs - first) / 1e6)
    assert training.start == 0
    really = counted.training(study.parts(), recipe, augmentation, "fp32", **nobody)
    assert really.step == training.step
    assert training.memory == pytest.approx(really.memory, rel=0.02)
    with counted.arithmetic():
        half = counted.training(study.parts(), recipe, augmentation, "fp32", **nobody, processes=2)
        small = {**recipe, "batch_size": 32}
        of_32 = counted.training(study.parts(), small, augmentation, "fp32", **nobody)
    assert half.step == pytest.approx(training.step / 2)
    assert half == of_32


def test_neighbours_train_meanwhile_and_never_longer():
    others = psutil.Process().children()
    with neighbours(2):
        both = [it for it in psutil.Process().children() if it not in others]
        assert len(both) == 2
    assert not any(it.is_running() for it in both)
    # Of a process that was killed no neighbours stay.
    code = "from ensdistill.planning.measuring import *\nwith neighbours(1): time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code]) as killed:
        while not (left := psutil.Process(killed.pid).children()):
            time.sleep(0.1)
        killed.kill()
    assert not psutil.wait_procs(left, 60)[1]


def test_memory_is_that_of_the_tensors_that_live_at_a_time():
    x = torch.ones(1000)

    def call():
        y = x * 2
        z = y + 1
        del y
        return z * 3 + x

    # z, its product and the sum; y is gone by then.
    assert peak(call, [x]) == 3 * 4000


def test_memory_grows_with_what_backward_needs():
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)])
    kept = [*layers.parameters()]

    def call(rows):
        def step():
            layers(torch.ones(rows, 64)).sum().backward()
            layers.zero_grad()

        return step

    few, more = peak(call(100), kept), peak(call(200), kept)
    # 100 more rows: the input and, of each of 5 layers, what tanh and the next layer keep.
    assert more - few >= 100 * 64 * 4 * 6
    assert more - few <= 100 * 64 * 4 * 6 + 2 * 100 * 64 * 4 * 2


def test_images_are_known_before_they_are_there(tmp_path):
    study = read_configuration({"run": ["tiny"], "studies": {"tiny": TINY}}).studies["tiny"]
    data = data_of(study, tmp_path / "images.h5", None)
    assert (data.shape, data.classes) == ((1, 8, 8), 10)
    assert (data.train, data.validation, data.test) == (200, 100, 100)
    assert data.shifted == 20 * (19 * 5 + 1) + 50 + 10


OWN = {"source": "folder", "path": "/nowhere/at/all", "size": 64, "train": 9, "validation": 3}


def test_own_images_that_are_not_there_need_their_numbers(tmp_path):
    def data(classes, **images):
        config = {"run": ["own"], "studies": {"own": {"images": {**OWN, **images}}}}
        study = read_configuration(config).studies["own"]
        return data_of(study, tmp_path / "images.h5", classes)

    for arguments in ({"classes": None, "test": 4}, {"classes": 5}):
        with pytest.raises(InputError, match="/nowhere/at/all does not exist: to plan without"):
            data(**arguments)
    assert data(5, test=4).shape == (3, 64, 64)
    assert data(5, test=4).test == 4


def test_own_images_are_counted_wherever_they_lie(tmp_path):
    def data(path, **images):
        images = {"source": "folder", "path": path, "validation": 2, **images}
        config = {"run": ["own"], "studies": {"own": {"images": images}}}
        study = read_configuration(config).studies["own"]
        found = data_of(study, tmp_path / "images.h5", None)
        return found.shape, found.classes, found.train, found.validation, found.test

    for split, count in (("train", 5), ("test", 2)):
        write_images(tmp_path / split / split, {"a": count, "b": count}, (8, 8))
    folders = [str(tmp_path / split) for split in ("train", "test")]
    assert data(folders) == ((3, 8, 8), 2, 8, 2, 4)
    rows = [f"{path},{path.parent.name}" for path in (tmp_path / "train").rglob("*.*")]
    (tmp_path / "all.csv").write_text("\n".join(["file,kind", *rows]))
    columns = {"path": "file", "label": "kind"}
    assert data(str(tmp_path / "all.csv"), columns=columns) == ((3, 8, 8), 2, 6, 2, 2)


def test_an_analysis_takes_as_long_as_it_looks_at_images():
    def seconds(rule, **analyses):
        study = {**TINY, "analyses": analyses}
        study = read_configuration({"run": ["tiny"], "studies": {"tiny": study}}).studies["tiny"]
        data = data_of(study, "not/there.h5", None)
        nothing = dict.fromkeys(("networks", "tables"), Start(0.0, 0.0))
        forecast = Forecast(study, data, meter(speed=1e6), nothing, {})
        return forecast.cost(Job(0, rule, {}, (), (), 1, 1, 0, frozenset())).seconds

    few = {"perturbed_images": 10, "train_images": 20}
    for rule, key in (("perturbed", "perturbed_images"), ("transferred", "train_images")):
        assert seconds(rule, **{**few, key: 100}) == pytest.approx(
            seconds(rule, **few) * 100 / few[key], rel=1e-6
        )
        # All 200 images that there are.
        assert seconds(rule, **{**few, key: 1000}) == seconds(rule, **{**few, key: 200})


# --- the command -----------------------------------------------------------------------------


def planned(project, monkeypatch, jobs, *arguments):
    monkeypatch.chdir(project.folder)
    if jobs is not None:
        monkeypatch.setattr(planning, "planned_jobs", lambda *_: jobs)
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_plan_of_a_study(project, monkeypatch, jobs, tmp_path):
    output = tmp_path / "plan.csv"
    done = planned(project, monkeypatch, jobs, "--flops", "1e12", "-o", str(output))
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    assert len(rows) == len(jobs)
    assert "Without a forecast" not in done.output
    seconds = {row["job"]: float(row["seconds"]) for row in rows}
    assert min(seconds.values()) > 0
    # The longest chain ends at the page, and a machine of 64 cards is bound by it.
    assert re.search(r"images → .+ → page$", done.output, re.M)
    ends = [float(row["start_64_cards"]) + float(row["seconds"]) for row in rows]
    alone = [float(row["start_1_cards"]) + float(row["seconds"]) for row in rows]
    assert max(ends) <= max(alone) <= sum(seconds.values())
    for one, other in itertools.pairwise(sorted(rows, key=lambda it: float(it["start_1_cards"]))):
        if one["cards"] == other["cards"] == "1":
            gap = float(other["start_1_cards"]) - float(one["start_1_cards"])
            assert gap >= float(one["seconds"]) - 0.11


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "config.yaml: there is none in this folder; `ensdistill init` begins one"),
        ("run: [a, b", "config.yaml, line 1: "),
        ("{}", "config.yaml: the key 'run' is missing"),
        ("run: [a]\nstudies: {a: {memberz: 3}}", "study 'a': unknown key 'memberz'"),
    ],
)
def test_a_wrong_configuration_is_told_in_a_sentence(tmp_path, monkeypatch, config, sentence):
    monkeypatch.chdir(tmp_path)
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(InputError, match=re.escape(sentence)) as raised:
        planning.plan([], False, None, None)
    assert "\n" not in str(raised.value)


def test_what_snakemake_cannot_plan_is_told_in_its_words(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    with pytest.raises(InputError, match="No rule to produce results/tiny/nothing") as raised:
        planned_jobs(["results/tiny/nothing"])
    assert "\n" not in str(raised.value)
