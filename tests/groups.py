"""Real groups of processes on this machine, forked from the test, so that they need not import anything again."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bdh_mlflow import host
from bdh_mlflow.distributed import Group
from bdh_mlflow.training import processes

FORK = multiprocessing.get_context("fork")
JOB_S = 60.0
SILENT_S = 6.0  # after all others have answered; they wait three seconds for a sign of life


def in_group(size: int, body: Callable[[Group], Any], patience_s: float = 30.0) -> list[Any]:
    """What `body` returns on each rank, or the error that it raised; None for a rank that was killed or stopped."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank in range(size):
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_run, args=(Path(folder), rank, size, patience_s, body, sender))
            process.start()
            sender.close()
            jobs.append((process, receiver))
        found: dict[int, Any] = {}
        deadline = time.monotonic() + JOB_S
        while len(found) < size and time.monotonic() < deadline:
            for rank, (_, receiver) in enumerate(jobs):
                if rank not in found and receiver.poll(0.05):
                    try:
                        found[rank] = pickle.loads(receiver.recv_bytes())
                    except EOFError:
                        found[rank] = None
                    if len(found) == size - 1:
                        deadline = min(deadline, time.monotonic() + SILENT_S)
        for process, _ in jobs:
            process.kill()  # one that was stopped for good
            process.join()
    return [found.get(rank) for rank in range(size)]


def _run(folder: Path, rank: int, size: int, patience_s: float, body: Callable[[Group], Any], sender: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        found = body(processes.meet(folder, rank, size, patience_s))
    except BaseException as error:  # also KeyboardInterrupt
        error.add_note(traceback.format_exc())
        found = error
    sender.send_bytes(pickle.dumps(found))  # plain pickle: multiprocessing's would hand over tensors by files that end with the process
    host.leave(0)
