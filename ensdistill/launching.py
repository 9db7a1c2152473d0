"""Starts the processes that train one network together, and ends all of them when one fails.

PyTorch's elastic agent, which is what `torchrun` runs, starts and watches them. It computes nothing
itself, and holds the leases of their cards.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensdistill import DamagedFile, InputError
from ensdistill.devices import lease_cards, set_up
from ensdistill.jobs import ENDINGS, Interrupted, end_with_parent, interrupt, to_tell

logger = logging.getLogger(__name__)

GRACE = 60
"""Seconds in which processes that are asked to end must have saved their state: else SIGKILL."""


def train_together(
    processes: int, threads: int, resources: Mapping[str, Any], log: str, **arguments: Any
) -> None:
    """`train_student` by several processes, on as many cards, or on the CPU where there are none.

    Args:
        processes: how many.
        threads: of the CPU, for all of them together.
        resources: as of `devices.prepare`.
        log: file to which the first process logs; the others add their warnings.
        **arguments: of `train_student`, but its device; they are written as JSON, paths as texts.

    Raises:
        InputError: there are fewer cards than processes, or one of them was killed.
        Interrupted: SIGTERM or SIGINT came.
        Exception: what one of them has raised.
    """
    cards = lease_cards(processes, resources.get("jobs_per_gpu", 1))
    each = max(1, threads // processes)
    where = f"cards {', '.join(cards)}" if cards else f"the CPU, threads of each: {each}"
    logger.info("%d processes train together on %s", processes, where)
    # What they inherit. DistributedDataParallel would warn of what every step pays for.
    os.environ |= {"OMP_NUM_THREADS": str(each), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE)
    package = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, sys.path[1:])])
    _run(processes, json.dumps({"threads": each, "log": log, "arguments": arguments}, default=str))


def _run(processes: int, told: str) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "ensdistill.launching", told)
        except SignalException as ending:
            where = f"while {processes} processes trained; a rerun goes on from there"
            raise Interrupted(int(ending.sigval), where) from None
        except ChildFailedError as failed:
            raise _cause(list(failed.failures.values()), processes) from None


def _cause(failures: list[Any], processes: int) -> BaseException:
    """The error that made the others end."""
    for failure in failures:
        if failure.exitcode < 0 and -failure.exitcode not in ENDINGS:
            name = signal.Signals(-failure.exitcode).name
            return InputError(
                f"one of {processes} processes that train this network together was ended by "
                f"{name}, as the system does where the memory is full, and the others with it; a "
                "rerun goes on from the last state that was saved"
            )
    raised = [it for failure in failures if (it := _raised(failure)) is not None]
    # One that lost a process it waits for raises errors too.
    known = [error for error in raised if to_tell(error) is not None]
    for failure in failures:
        if not known and (number := abs(failure.exitcode) % 128) in ENDINGS:
            return Interrupted(number, f"while {processes} processes trained")
    return (known or raised or [RuntimeError(failures[0].message)])[0]


def _told(error: Exception) -> str:
    """What a process writes of its error: JSON, by which no code can come."""
    if isinstance(error, DamagedFile):
        return json.dumps({"path": str(error.path), "reason": error.reason})
    reason = f"{type(error).__name__}: {error}"
    return json.dumps({"sentence": to_tell(error), "reason": reason})


def _raised(failure: Any) -> Exception | None:
    """The error of which a process wrote that."""
    try:
        told = json.loads(failure.error_file_data["message"])
    except (KeyError, TypeError, ValueError):  # it has written none
        return None
    if "path" in told:
        return DamagedFile(told["path"], told["reason"])
    return InputError(told["sentence"]) if told["sentence"] else RuntimeError(told["reason"])


def main(told: str) -> None:
    """One of the processes."""
    for number in ENDINGS:
        signal.signal(number, interrupt)
    end_with_parent()
    known, rank = json.loads(told), int(os.environ["RANK"])
    _log_to(known["log"], rank)
    cards = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if cards:  # each sees one alone, and no device needs a number
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[rank]
    from ensdistill.distributed import leave
    from ensdistill.training import train_student

    try:
        processes = int(os.environ["WORLD_SIZE"])
        device = set_up(known["threads"])
        train_student(**known["arguments"], device=device, processes=processes)
        leave()
    except Interrupted as interruption:
        _pay_no_heed()
        sys.exit(128 + interruption.number)
    except Exception as error:
        _pay_no_heed()
        if to_tell(error) is None:
            logging.exception("process %d: unforeseen", rank)
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        path.write_text(json.dumps({"message": _told(error)}), encoding="ascii")
        sys.exit(1)


def _pay_no_heed() -> None:
    """Of signals, by which the others are ended: this process ends by itself."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def _log_to(path: str, rank: int) -> None:
    logging.basicConfig(
        filename=path,
        filemode="a",
        level=logging.WARNING,
        format=f"%(asctime)s %(levelname)s {f'process {rank}: ' if rank else ''}%(message)s",
    )
    logging.captureWarnings(True)
    logging.getLogger("ensdistill").setLevel(logging.WARNING if rank else logging.INFO)


if __name__ == "__main__":
    main(sys.argv[1])
