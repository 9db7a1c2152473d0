"""The tiny study on a real SLURM, started here: `pytest -m slurm`, as root on Debian."""

import math
import re
import signal
import subprocess
import sys
import time
from itertools import combinations

import pytest

from tests.cluster import Cluster, why_not
from tests.project import METHODS, RECIPE, Project, without_times

FEW = {name: METHODS[name] for name in ("be", "kd")}

pytestmark = pytest.mark.slurm

PROFILE = ["--workflow-profile", "profiles/slurm"]
GRES = ["--profile", "profiles/slurm", "--workflow-profile", "profiles/slurm-gres"]
# This cluster has no accounting for sacct to ask, and tests are in a hurry.
QUICK = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
QUICK += ["--slurm-keep-successful-logs", "--latency-wait", "5"]
# The executor asks ten seconds later each time that no job has ended: here every second.
SNAKEMAKE = """
import asyncio
from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
RemoteExecutor.sleep = lambda self: asyncio.sleep(1)
main()
"""

TABLES = ["tables", *(f"results/tiny/figures/{name}.png" for name in ("de_curve", "reliability"))]
TEACHER, SECOND = (f"results/tiny/teachers/{seed}/weights.safetensors" for seed in (0, 1))
STUDENT = "results/tiny/students/be/0/weights.safetensors"


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("snakemake_executor_plugin_slurm")
    if reason := why_not():
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def local(cluster, tmp_path_factory):
    """A project of few jobs, whose tables this machine made itself."""
    project = few_jobs(tmp_path_factory.mktemp("local"))
    project.run(*TABLES)
    return project


def few_jobs(folder):
    project = Project.new(folder)
    project.change("studies", "tiny", "pool", value=2)
    project.change("studies", "tiny", "methods", value=FEW)
    return project


def new_project(folder, images_of):
    """A project that has its images and nothing else."""
    project = few_jobs(folder)
    project.file("").mkdir(parents=True)
    project.file("images.h5").write_bytes(images_of.file("images.h5").read_bytes())
    return project


@pytest.fixture(scope="module")
def run_out(cluster, local, tmp_path_factory):
    """A run that will need second attempts: a minute for longer training, and little memory."""
    project = new_project(tmp_path_factory.mktemp("run_out"), local)
    slow(project, epochs=700)
    little = ["teacher:runtime=attempt**5", "student:mem_mb=500*attempt**2"]
    run = start(cluster, project, "--set-resources", *little, "--", TEACHER, STUDENT)
    yield project, run
    run.kill()


@pytest.fixture(scope="module")
def submitted(cluster, run_out, tmp_path_factory):
    """A project whose tables the cluster made from nothing, while the other run goes on."""
    project = few_jobs(tmp_path_factory.mktemp("submitted"))
    show_cards(project)
    finish(start(cluster, project, *TABLES))
    return project


@pytest.fixture
def untrained(local, tmp_path):
    return new_project(tmp_path / "untrained", local)


def slow(project, epochs):
    """While there is a file `slow`, a teacher's epoch takes a tenth of a second longer.

    Its state is saved every second.
    """
    (project.folder / "slow").touch()
    project.edit("ensdistill/training.py", "SAVE_EVERY = 120", "SAVE_EVERY = 1")
    line = '            row["seconds"] = run.seconds\n'
    project.edit(
        "ensdistill/training.py",
        line,
        f"            time.sleep(Path('slow').exists() / 10)\n{line}",
    )
    recipe = {**RECIPE, "epochs": epochs, "validate_every": epochs}
    project.change("studies", "tiny", "teacher", value=recipe)


def show_cards(project):
    """Make jobs print which card is theirs."""
    line = "    torch.set_num_threads(threads)\n"
    shown = "    print('card:', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
    project.edit("ensdistill/devices.py", line, line + shown)


def start(cluster, project, *arguments, profile=PROFILE):
    return subprocess.Popen(
        [sys.executable, "-c", SNAKEMAKE, *profile, *QUICK, *arguments],
        # A shell that starts tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        cwd=project.folder,
        env={**cluster.environment, "PYTHONPATH": str(project.folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def both_train(run, project):
    """Wait until both teachers have saved a state; the states."""
    states = [project.file(f"teachers/{seed}/state.pt") for seed in (0, 1)]
    deadline = time.monotonic() + 300
    while not all(state.exists() for state in states):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.1)
    return states


def finish(process):
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-4000:]
    return output


def jobs_of(cluster, project, rule=""):
    """The SLURM jobs of a project, oldest first, with what each wrote."""
    jobs = [job for job in cluster.jobs() if job["WorkDir"] == str(project.folder)]
    for job in jobs:
        log = next(project.folder.glob(f".snakemake/slurm_logs/**/{job['JobId']}.log"))
        job["log"] = log.read_text()
    return [job for job in jobs if job["Comment"].startswith(f"rule_{rule}")]


def asked(job):
    """CPUs, memory [MB], time limit and cards."""
    cpus, memory = re.match(r"cpu=(\d+),mem=(\d+)M,node=1", job["TRES"]).groups()
    return int(cpus), int(memory), job["TimeLimit"], job.get("TresPerJob", job.get("TresPerNode"))


def test_results_are_those_of_a_local_run_to_the_byte(local, submitted):
    names = [f"{kind}.h5" for kind in ("images", *(f"logits/teachers/{i}" for i in range(2)))]
    names += [f"logits/students/{name}/0.h5" for name in FEW]
    names += [f"students/{name}/0/weights.safetensors" for name in FEW]
    names += [f"teachers/{seed}/weights.safetensors" for seed in range(2)]
    names += ["metrics/scores.csv", "metrics/reliability.csv"]
    for name in names:
        assert submitted.file(name).read_bytes() == local.file(name).read_bytes(), name
    tables = (without_times(it.file("tables/results.csv")) for it in (submitted, local))
    assert next(tables) == next(tables)
    assert submitted.planned(*TABLES) == set(), "a local run would make something again"


def test_jobs_ask_for_what_their_rules_say(cluster, submitted):
    images = submitted.file("images.h5").stat().st_size / 2**20
    weights = submitted.file("teachers/0/weights.safetensors").stat().st_size / 2**20
    card = "gres:gpu:1"
    [made] = jobs_of(cluster, submitted, "images")
    assert asked(made) == (1, 4000, "01:00:00", None)
    teachers = jobs_of(cluster, submitted, "teacher")
    assert len(teachers) == 2
    for job in teachers:
        assert asked(job) == (1, math.ceil(4000 + 4 * images), "00:21:00", card)
    [kd] = jobs_of(cluster, submitted, "student_wildcards_tiny_kd_0")
    assert asked(kd) == (1, math.ceil(4000 + 4 * (images + 2 * weights)), "00:21:00", card)
    assert len(jobs_of(cluster, submitted, "logits")) == 4


def test_short_jobs_go_together(cluster, submitted):
    *single, group = jobs_of(cluster, submitted)
    assert len(single) == 3 + 2 + 2 + 4  # images, shifted and costs, teachers, students, logits
    rules = {"scores", "table", "figure_de_curve", "reliability", "figure_reliability"}
    assert set(re.findall(r"^localrule (\w+):", group["log"], re.MULTILINE)) == rules
    # One after another: the sum of their times, the CPUs and memory of one.
    cpus, memory, limit, cards = asked(group)
    assert (cpus, limit, cards) == (1, "00:57:00", None)
    assert 2000 < memory < 2100


def test_jobs_at_the_same_time_have_different_cards(cluster, submitted):
    cards = {}
    for job in jobs_of(cluster, submitted):
        if found := re.search(r"^card: (\d)$", job["log"], re.MULTILINE):
            cards[job["JobId"]] = (job["StartTime"], job["EndTime"], found[1])
    assert len(cards) == 1 + 2 + 2 + 4  # costs, teachers, students, logits
    together = [
        (one[2], other[2])
        for one, other in combinations(cards.values(), 2)
        if max(one[0], other[0]) < min(one[1], other[1])
    ]
    assert together
    assert all(one != other for one, other in together)


def test_too_little_time_or_memory_is_enough_at_a_later_attempt(cluster, run_out):
    project, run = run_out
    finish(run)
    first, second = jobs_of(cluster, project, "teacher")
    assert [asked(job)[2] for job in (first, second)] == ["00:01:00", "00:32:00"]
    assert [job["JobState"] for job in (first, second)] == ["TIMEOUT", "COMPLETED"]
    assert "error: interrupted by SIGTERM" in first["log"]
    log = project.file("logs/teachers/0.log").read_text()
    assert int(re.search(r"going on from epoch (\d+)", log)[1]) > 1
    first, second = jobs_of(cluster, project, "student")
    assert [asked(job)[1:3] for job in (first, second)] == [(500, "00:21:00"), (2000, "00:41:00")]
    assert "exceeded memory limit" in first["log"]
    assert second["JobState"] == "COMPLETED"


def test_an_interrupted_run_cancels_its_jobs_and_the_next_goes_on(cluster, untrained):
    slow(untrained, epochs=600)
    run = start(cluster, untrained, TEACHER, SECOND)
    states = both_train(run, untrained)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=300)
    assert run.returncode != 0
    cluster.wait_until(lambda: not cluster.run("squeue", "-h"), "end of the jobs")
    assert [job["JobState"] for job in jobs_of(cluster, untrained)] == ["CANCELLED", "CANCELLED"]
    (untrained.folder / "slow").unlink()
    finish(start(cluster, untrained, TEACHER, SECOND))
    for seed in (0, 1):
        log = untrained.file(f"logs/teachers/{seed}.log").read_text()
        assert int(re.search(r"going on from epoch (\d+)", log)[1]) > 1
    assert not any(state.exists() for state in states)


def test_sites_that_accept_only_gres_are_asked_by_gres(cluster, untrained):
    show_cards(untrained)
    finish(start(cluster, untrained, TEACHER, profile=GRES))
    [job] = jobs_of(cluster, untrained)
    assert job["TresPerNode"] == "gres:gpu:1"
    assert "TresPerJob" not in job, "--gpus"
    assert re.search(r"^card: \d$", job["log"], re.MULTILINE)


def test_downloads_run_where_snakemake_runs(cluster, untrained):
    script = untrained.folder / "workflow_scripts" / "download.py"
    script.write_text("open(snakemake.output[0], 'w').write('pretended')\n")
    archive = "results/downloads/cifar-10-python.tar.gz"
    finish(start(cluster, untrained, archive))
    assert (untrained.folder / archive).read_text() == "pretended"
    assert jobs_of(cluster, untrained) == []
