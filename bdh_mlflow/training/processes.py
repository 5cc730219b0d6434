"""The processes of a training: started here on this machine, or by torchrun on one or more, and met.

`started` makes this process rank 0 and starts the others beside it. They meet through a file and talk over the loopback interface, so
nothing of it can be reached from other machines. `joined` is for a process that torchrun, or another launcher that sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT, has started.
"""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from bdh_mlflow import host
from bdh_mlflow.distributed import ALONE, CONNECTING_S, PATIENCE_S, Group, World, backend
from bdh_mlflow.errors import BdhError, ConfigError
from bdh_mlflow.files import first_line

FOLLOWER = "bdh_mlflow.training.follower"
MEETING_S = 600.0  # for processes that are started at different times on different machines
POLL_S = 0.02
ELSEWHERE = "192.0.2.1"  # an address that no machine has (RFC 5737): what leads to it leads to other machines
ENDING_S = 1.0  # between a lost connection and the end of the process behind it
LEAVING_S = 10.0  # for a process that has nothing left to do
LAUNCHED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class Job(NamedTuple):
    """What a launcher starts again when a process has died.   id: the same for every start.   restarted: whether this is not the first."""

    id: str
    restarted: bool


_jobs: list[Job] = []


def launched() -> bool:
    """Whether a launcher such as torchrun has started this process as one of several."""
    return all(os.environ.get(name) for name in LAUNCHED_BY)


def job() -> Job | None:
    """The launcher's job that this process belongs to, on rank 0; None without one."""
    return _jobs[-1] if _jobs else None


def speaks() -> bool:
    """Whether this process is the one that talks to the user."""
    return not launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined(patience_s: float = PATIENCE_S) -> Iterator[World]:
    """The world that the launcher's variables describe.   Raises BdhError where the others cannot be met."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _take_device(int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if interface := _interface(size):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        store = _launchers_store(rank, size)
        if rank == 0:
            _jobs.append(_job_of(store))
        world: World = ALONE
        if size > 1:
            world = _connected(PrefixStore(_gathered(store, rank, size), store), rank, size, patience_s)
    except (RuntimeError, ValueError) as error:
        raise BdhError(
            f"rank {rank} of {size} cannot meet the others at {place}: {first_line(error)}. Another job may be using the port, or the "
            f"machines may not reach each other (GLOO_SOCKET_IFNAME names the network interface)"
        ) from None
    yield world


@contextlib.contextmanager
def started(processes: int, patience_s: float = PATIENCE_S) -> Iterator[World]:
    """This process as rank 0 of as many, the others started on this machine and ended with it.   Raises ConfigError, BdhError."""
    if processes == 1:
        yield ALONE
        return
    _take_device(0, processes)
    folder, before = Path(tempfile.mkdtemp(prefix="bdh-processes-")), torch.get_num_threads()
    threads = before if os.environ.get("OMP_NUM_THREADS") else max(1, before // processes)
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    followers: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in range(1, processes):
            words = host.python_module(FOLLOWER, str(folder), str(rank), str(processes), str(patience_s))
            env = {**os.environ, "OMP_NUM_THREADS": str(threads), "LOCAL_RANK": str(rank)}
            followers[rank] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env)
        _wait_for(folder, followers)
        yield meet(folder, 0, processes, patience_s, followers)
    finally:
        _end(followers)
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(before)
        shutil.rmtree(folder, ignore_errors=True)


def meet(folder: Path, rank: int, size: int, patience_s: float, followers: Mapping[int, "subprocess.Popen[bytes]"] | None = None) -> Group:
    """The world of `size` processes of this machine that meet in a folder.   followers: those that this process has started.

    Raises BdhError where they do not meet.
    """
    _take_device(rank, size)
    if rank:
        (folder / f"started-{rank}").touch()
    ending = functools.partial(_ending, followers or {})
    try:
        return _connected(FileStore(str(folder / "store"), size), rank, size, patience_s, ending)
    except RuntimeError as error:
        ended = [f"rank {peer} {way} before it could meet the others" for peer in range(size) if (way := ending(peer))]
        raise BdhError("; ".join(ended) or f"rank {rank} of {size} cannot meet the others: {first_line(error)}") from None


def _interface(size: int) -> str | None:
    """The network interface by which this machine reaches the others; None where that cannot be told.

    Gloo takes the address that the host's own name has, which on many machines (Debian's 127.0.1.1) is one that others cannot reach.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        return _LOOPBACK
    for target in (os.environ["MASTER_ADDR"], ELSEWHERE):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # chooses a route, and sends nothing
            own = probe.getsockname()[0]
            for name, addresses in psutil.net_if_addrs().items():
                if not own.startswith("127.") and any(each.address == own for each in addresses):
                    return str(name)
    return None


def _launchers_store(rank: int, size: int) -> TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT: of the launcher's agent, which keeps it when it starts the processes again, or of rank 0."""
    address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=MEETING_S)
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(address, port, size, is_master=rank == 0 and not of_agent, timeout=timeout, multi_tenant=True)


def _job_of(store: TCPStore) -> Job:
    """By a name that the first start leaves in the store. The launcher's own says little: users give many jobs the same."""
    new = uuid.uuid4().hex
    name = store.compare_set("bdh/job", "", new).decode()
    return Job(name, name != new)


def _gathered(store: TCPStore, rank: int, size: int) -> str:
    """A name for this start of the processes, the same on each rank, when all are there.   Raises BdhError naming those that are not.

    Under the same names in the store gloo finds the addresses of processes that are dead (torch 2.13.0 keeps its store over restarts), and
    TORCHELASTIC_RESTART_COUNT counts on each node for itself (pytorch/pytorch#108158). So each rank says hello with a number of its own,
    and rank 0, whose name it is, welcomes that number.
    """
    until = time.monotonic() + MEETING_S
    if rank:
        own = uuid.uuid4().hex
        store.set(f"bdh/hello/{rank}", own)
        name = _awaited(store, f"bdh/welcome/{rank}/{own}", until)
        store.set(f"bdh/{name}/{rank}", "")
        _awaited(store, f"bdh/{name}/go", until)
        return f"bdh/{name}"
    name, welcomed = uuid.uuid4().hex, dict[int, bytes]()
    while missing := [other for other in range(1, size) if not store.check([f"bdh/{name}/{other}"])]:
        for other in missing:
            if store.check([f"bdh/hello/{other}"]) and (hello := store.get(f"bdh/hello/{other}")) != welcomed.get(other):
                welcomed[other] = hello
                store.set(f"bdh/welcome/{other}/{hello.decode()}", name)
        if time.monotonic() > until:
            raise BdhError(f"rank {', '.join(map(str, missing))} of {size} did not come within {MEETING_S:.0f} s")
        time.sleep(POLL_S)
    store.set(f"bdh/{name}/go", "")
    return f"bdh/{name}"


def _awaited(store: TCPStore, key: str, until: float) -> str:
    """A value that another rank sets. Asked for in turns, so that signals are heard."""
    while not store.check([key]):
        if time.monotonic() > until:
            raise BdhError(f"rank 0 did not answer within {MEETING_S:.0f} s")
        time.sleep(POLL_S)
    return store.get(key).decode()


def _connected(store: Store, rank: int, size: int, patience_s: float, ending: Callable[[int], str | None] = lambda rank: None) -> Group:
    """The group of processes that are all there.   Raises RuntimeError."""
    dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=CONNECTING_S))
    return Group(patience_s, ending)


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however that ended, whatever this one is waiting for."""

    def watch() -> None:
        sys.stdin.buffer.read()  # a pipe that only the parent can write to, and closes when it ends
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _take_device(local_rank: int, local_size: int) -> None:
    if not torch.cuda.is_available():
        return
    if (devices := torch.cuda.device_count()) < local_size:
        raise ConfigError(f"{local_size} processes need {local_size} GPUs; this machine has {devices}: start {devices} processes on it")
    torch.cuda.set_device(local_rank)


def _wait_for(folder: Path, followers: Mapping[int, "subprocess.Popen[bytes]"]) -> None:
    """Until all have got as far as to meet.   Raises BdhError for one that ends before."""
    waiting = set(followers)
    while waiting:
        for rank in sorted(waiting):
            if (code := followers[rank].poll()) is not None:
                raise BdhError(f"rank {rank} {_ended(code)} before it could meet the others")
            if (folder / f"started-{rank}").exists():
                waiting.discard(rank)
        time.sleep(0.02)


def _ending(followers: Mapping[int, "subprocess.Popen[bytes]"], rank: int) -> str | None:
    """How the process of a rank ended; None while it lives, or where that is not known."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return _ended(followers[rank].wait(ENDING_S)) if rank in followers else None
    return None


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end(followers: Mapping[int, "subprocess.Popen[bytes]"]) -> None:
    """Wait for those that are about to end, and kill the others."""
    until = time.monotonic() + (LEAVING_S if sys.exc_info()[0] is None else ENDING_S)
    for process in followers.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        if process.poll() is None:
            process.kill()  # a stopped process obeys nothing else
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
