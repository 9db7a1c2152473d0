"""A real SLURM of nodes with four pretended GPUs each, on this machine's loopback, for tests."""

import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun")
SBIN = "/usr/sbin:/sbin"

# Memory is only pretended too, so that what jobs ask for is not bounded by this machine; that a
# job uses no more than it asked for is checked every second.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdTimeout=20
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory,CR_LLN
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=10
InactiveLimit=0
NodeName=DEFAULT CPUs=8 RealMemory=64000 Gres=gpu:4
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What this machine lacks for a cluster of its own; None if nothing."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    path = f"{os.environ['PATH']}:{SBIN}"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)"
    running = {process.info["name"] for process in psutil.process_iter(["name"])}
    configured = Path("/etc/slurm/slurm.conf").exists() or "SLURM_CONF" in os.environ
    if configured or running & {"slurmctld", "slurmd"}:
        return "this machine belongs to a SLURM cluster, which tests leave alone"
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.mknod(f"{folder}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            Path(folder, "null").write_text("")
    except OSError as error:
        return f"device files for pretended GPUs cannot be made: {error}"
    return None


class Cluster:
    """munged, slurmctld and slurmds in a folder of their own; `environment` makes jobs go there."""

    def __init__(self, nodes: tuple[str, ...] = ("node",)):
        self.nodes = nodes
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.daemons: list[subprocess.Popen] = []
        (self.folder / "bin").mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}:{SBIN}",
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "TMPDIR": str(self.folder),  # where jobs leave their leases of cards
        }
        # The executor keeps SLURM's variables from the srun inside of its jobs.
        shim = self.folder / "bin" / "srun"
        real = shutil.which("srun", path=f"{os.environ['PATH']}:{SBIN}")
        shim.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {real} "$@"\n')
        shim.chmod(0o755)

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            if len(self.daemons) > 2:
                self.run("scancel", "--user=root", check=False)
                self.wait_until(lambda: not self.run("squeue", "-h"), "the last jobs' ends")
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
                daemon.wait(30)
            for process in self._processes():  # whose parent ended first: SLURM lost sight of them
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(self.folder)

    def _start(self) -> None:
        folder = self.folder
        host = socket.gethostname().split(".")[0]
        for name in ("controller", *self.nodes):
            (folder / name).mkdir()
        for card in range(4):  # clones of /dev/null
            os.mknod(folder / f"gpu{card}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
        control, *ports = _free_ports(1 + len(self.nodes))
        here = f"NodeHostname={host} NodeAddr=127.0.0.1"
        pairs = zip(self.nodes, ports, strict=True)
        nodes = "\n".join(f"NodeName={node} {here} Port={port}" for node, port in pairs)
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, port=control, nodes=nodes, folder=folder)
        )
        self.run("mungekey", "--create", f"--keyfile={folder}/munge.key")
        options = ("key-file", "log-file", "pid-file", "seed-file", "socket")
        files = [f"--{option}={folder}/munge.{option.split('-')[0]}" for option in options]
        self._daemon("munged", "--foreground", "--force", *files)
        self.wait_until((folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-i")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node)
        idle = [f"{node} idle" for node in self.nodes]
        self.wait_until(
            lambda: self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines() == idle,
            "nodes",
        )

    def kill_node(self, node: str) -> None:
        """End a node without a word to anyone, as a failure of its power does."""
        daemon = next(daemon for daemon in self.daemons if daemon.args[-1] == node)
        self.daemons.remove(daemon)
        daemon.kill()
        for process in self._processes(SLURMD_NODENAME=node):
            with suppress(psutil.Error):
                if (parent := process.parent()).name() == "slurmstepd":
                    parent.kill()
                process.kill()
        daemon.wait()

    def _processes(self, **environment: str) -> Iterator[psutil.Process]:
        """All that run in this cluster, and in such an environment."""
        here = {"SLURM_CONF": self.environment["SLURM_CONF"], **environment}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if here.items() <= process.environ().items():
                    yield process

    def _daemon(self, *command) -> None:
        with open(self.folder / f"{command[0]}-{len(self.daemons)}.log", "w") as log:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the tests
                )
            )

    def wait_until(self, true, what) -> None:
        deadline = time.monotonic() + 120
        while not true():
            if time.monotonic() > deadline or any(d.poll() is not None for d in self.daemons):
                logs = [path.read_text()[-1000:] for path in self.folder.glob("*.log")]
                raise RuntimeError("\n".join([f"no {what}", *logs]))
            time.sleep(0.1)

    def run(self, *command, check=True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def jobs(self) -> list[dict[str, str]]:
        """Every job that was ever submitted, as `scontrol show job` tells it."""
        lines = self.run("scontrol", "--oneliner", "show", "job").splitlines()
        pairs = [[part.partition("=") for part in line.split()] for line in lines if "=" in line]
        return [{key: value for key, _, value in one} for one in pairs]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
