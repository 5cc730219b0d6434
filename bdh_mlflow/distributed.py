"""The processes of one training: the few things that they do together, and how they end together.

Every process (rank) computes some of the passes of an update; rank 0 alone speaks, tracks and saves. Together they exchange a `Report`
(`World.exchange`), hand objects round (`share`, `gather`) and add up gradients (`sum_gradients`). Each of these begins with an exchange, so
a process that fails (`World.failing`) enters one exchange more, in which the others learn of it, wherever they are: all end, and rank 0
says which rank it was. After a connection is lost nothing collective is tried any more. With one process the same calls do nothing.

Knows nothing of models, data or tracking. The collectives are torch's, over gloo, and over NCCL for gradients on CUDA devices.
"""

import contextlib
import dataclasses
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store

from bdh_mlflow.errors import BdhError
from bdh_mlflow.files import first_line

PATIENCE_S = 600.0  # a rank may take this long for its part of an update, an evaluation or a save
CONNECTING_S = 120.0  # for processes that are all there; torch hears no signal meanwhile, nor that one of them has died
START_PATIENCE_S = 24 * 3600.0  # before the first update rank 0 may prepare data or download a checkpoint
ROLL_CALL_S = 3.0  # after a collective failed: time for the ranks that are alive to say so

T = TypeVar("T")


class Summed(NamedTuple):
    """What comes of adding up the gradients of an update.

    losses: of all its passes, in order.   health: for each rank 0, or NaN where its gradients are not all finite; empty for one process.
    """

    losses: Tensor
    health: Tensor


class PeerError(BdhError):
    """Another rank has failed, or is gone.   speaks: whether this process is the one to tell the user."""

    def __init__(self, message: str, exit_code: int = BdhError.exit_code, *, speaks: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.speaks = speaks


@dataclass(frozen=True)
class Report:
    """What a rank says of itself in an exchange, all as numbers.

    failed: whether it cannot go on.   stop: number of the signal that it received, -1 for another request to stop, else 0.
    complete: whether its part of an evaluation is done.   compute_s, data_s: seconds that it computed, and waited for data, in this update.
    peak_gib: most memory held so far.
    """

    failed: float = 0.0
    stop: float = 0.0
    complete: float = 1.0
    compute_s: float = 0.0
    data_s: float = 0.0
    peak_gib: float = 0.0


class World:
    """One process, alone: the base that `Group` gives several processes.   rank: 0 <= rank < size."""

    rank = 0
    size = 1
    local_rank = 0
    """Number among the processes of its machine."""
    hosts: tuple[str, ...] = (platform.node(),)
    """Of each rank."""

    def passes(self, passes: int) -> range:
        """Which passes of an update this rank computes: a contiguous block of them.   passes: a multiple of `size`."""
        own = passes // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def exchange(self, report: Report) -> list[Report]:
        """The reports of all ranks.   Raises PeerError if one has failed or does not come."""
        return [report]

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank.   Raises what it raised on rank 0, PeerError elsewhere."""
        return make()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        return [value]

    def concatenated(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order, on rank 0; elsewhere its own.   rows: (R, ...), the same shape on every rank."""
        return rows

    def sum_gradients(self, parameters: Sequence[nn.Parameter], losses: Tensor) -> Summed:
        """Add up the gradients of all ranks in place, in the order of `passes.TreeSum`.   losses: (own passes,) fp32.

        Call it right after an exchange.
        """
        return Summed(losses, losses.new_empty(0))

    def sum_exact(self, values: Tensor) -> Tensor:
        """Sum over ranks of numbers whose sums do not round: whole numbers, or at most one of them not 0.   Right after an exchange."""
        return values

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """What is raised in the body is told to the other ranks, once."""
        yield

    def expect_updates(self) -> None:
        """From now on ranks are waited for PATIENCE_S and no longer: none has anything to do but updates."""

    def post(self, text: str) -> None:
        """Leave a text that rank 0 may read, in place of the one before. Waits for nobody."""

    def posts(self) -> dict[int, str]:
        """What each other rank has posted last."""
        return {}

    def leads_node(self) -> bool:
        """Whether this is the first rank on its machine."""
        return self.hosts.index(self.hosts[self.rank]) == self.rank

    def name(self, rank: int) -> str:
        """A rank, for a message."""
        return f"rank {rank} ({self.hosts[rank]})"


ALONE = World()


class Group(World):
    """Several processes, joined by torch's default process group.   patience_s: how long they wait for each other in the loop.

    ending: says how a rank's process ended where that is known, for the message about a rank that is gone.
    """

    def __init__(self, patience_s: float = PATIENCE_S, ending: Callable[[int], str | None] = lambda rank: None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self._patience_s, self._waits_s = patience_s, CONNECTING_S
        # Of its own, so that a rank that fails is never taken for one that adds up gradients; on the CPU, whatever the devices are.
        self._exchanges = dist.new_group(backend="gloo", timeout=timedelta(seconds=CONNECTING_S))
        self._ending = ending
        self._told = False  # a failure is known to all, or nobody can be reached any more
        self._store: Store = dist.distributed_c10d._get_default_store()
        hosts: list[Any] = [None] * self.size
        with self._reached():
            dist.all_gather_object(hosts, platform.node(), group=self._exchanges)
        self.hosts = tuple(hosts)
        self._wait_at_most(START_PATIENCE_S)

    def exchange(self, report: Report) -> list[Report]:  # noqa: D102 - as World, here and below
        reports = self._exchanged(report)
        failed = [rank for rank, each in enumerate(reports) if each.failed]
        if failed:
            raise self._failure(failed[0])
        return reports

    def share(self, make: Callable[[], T]) -> T:  # noqa: D102
        made: list[Any] = [None]
        if self.rank == 0:
            with self.failing():
                made = [make()]
        self.exchange(Report())
        with self._reached():
            dist.broadcast_object_list(made, src=0, group=self._exchanges)
        value: T = made[0]
        return value

    def gather(self, value: T) -> list[T]:  # noqa: D102
        self.exchange(Report())
        values: list[Any] = [None] * self.size
        with self._reached():
            dist.all_gather_object(values, value, group=self._exchanges)
        return values

    def concatenated(self, rows: Tensor) -> Tensor:  # noqa: D102
        self.exchange(Report())
        own = rows.cpu().contiguous()
        every = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else None
        with self._reached():
            dist.gather(own, every, dst=0, group=self._exchanges)
        return torch.cat(every) if every is not None else own

    def sum_gradients(self, parameters: Sequence[nn.Parameter], losses: Tensor) -> Summed:
        """All-to-all, so that each rank has one part of everybody's gradients; a tree over the ranks; all-gather. The bytes of a ring."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        count = sum(g.numel() for g in gradients)
        tail = losses.new_zeros(self.size, len(losses) + 1)  # x + 0 is x: each rank's losses and health ride along
        part = -(-(count + tail.numel()) // self.size)
        flat = torch.zeros(part * self.size, dtype=torch.float32, device=losses.device)
        own = torch.cat([g.flatten() for g in gradients], out=flat[:count])
        tail[self.rank, :-1], tail[self.rank, -1] = losses, own.sum() * 0
        flat[count : count + tail.numel()] = tail.flatten()
        received = torch.empty_like(flat)
        with self._reached():
            dist.all_to_all_single(received, flat)
            dist.all_gather_single(flat, _tree(list(received.view(self.size, part))))
        for gradient, summed in zip(gradients, flat[:count].split_with_sizes([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
        tail = flat[count : count + tail.numel()].view_as(tail)
        return Summed(tail[:, :-1].flatten(), tail[:, -1])

    def sum_exact(self, values: Tensor) -> Tensor:  # noqa: D102
        with self._reached():
            dist.all_reduce(values, group=self._exchanges)
        return values

    def post(self, text: str) -> None:  # noqa: D102
        with contextlib.suppress(RuntimeError):  # nobody waits for it
            self._store.set(f"post/{self.rank}", text)

    def posts(self) -> dict[int, str]:  # noqa: D102
        found = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self.size):
                if rank != self.rank and self._store.check([f"post/{rank}"]):
                    found[rank] = self._store.get(f"post/{rank}").decode()
        return found

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:  # noqa: D102
        try:
            yield
        except PeerError:
            raise
        except BaseException as error:
            if not self._told:
                try:
                    reports = self._exchanged(Report(failed=1.0))
                    self._failure(next(rank for rank, each in enumerate(reports) if each.failed), error)
                except PeerError as gone:
                    if isinstance(error, RuntimeError):  # of a collective of torch's own, as FSDP2's: the rank that is gone is the reason
                        raise gone from error
            raise

    def expect_updates(self) -> None:  # noqa: D102
        self._wait_at_most(self._patience_s)

    def _wait_at_most(self, seconds: float) -> None:
        self._waits_s = seconds
        for group in (self._exchanges, dist.group.WORLD):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def _exchanged(self, report: Report) -> list[Report]:
        own = torch.tensor(dataclasses.astuple(report), dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.size)]
        with self._reached():
            dist.all_gather(every, own, group=self._exchanges)
        return [Report(*each.tolist()) for each in every]

    def _failure(self, rank: int, own: BaseException | None = None) -> PeerError:
        """After an exchange in which `rank` was the first to have failed: its error, for everybody.   own: this rank's, if any."""
        told: list[tuple[str, int]] = [("", 1)]
        if own is not None:
            told = [(str(own) if isinstance(own, BdhError) else _described(own), getattr(own, "exit_code", 1))]
        with self._reached():
            dist.broadcast_object_list(told, src=rank, group=self._exchanges)
        self._told = True
        message, exit_code = told[0]
        return PeerError(f"{self.name(rank)}: {message}", exit_code, speaks=self.rank == 0)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Around a collective.   Raises PeerError if it fails, as it does where a rank is gone or does not come."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self._told = True
            waited_s = time.monotonic() - started
            traceback.clear_frames(error.__traceback__)  # torch's frames hold the group that is to be closed
            self._hang_up()
            missing = self._missing()
            speaks = all(rank in missing for rank in range(self.rank))
            raise PeerError(self._lost(missing, waited_s, error), speaks=speaks) from error

    def _hang_up(self) -> None:
        """Close all connections, so that those who wait for this rank notice as well. The store needs none."""
        del self._exchanges
        with contextlib.suppress(Exception):  # what ended the group may hinder this as well; then this process's end closes them
            if torch.cuda.is_available():  # with NCCL a group may wait for what is lost while it is destroyed
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()

    def _missing(self) -> list[int]:
        """Ranks that do not say that they are alive."""
        missing = [rank for rank in range(self.size) if rank != self.rank]
        with contextlib.suppress(RuntimeError):  # a store that was with a rank that is gone
            self._store.set(f"alive/{self.rank}", "")
            until = time.monotonic() + ROLL_CALL_S
            while missing and time.monotonic() < until:
                missing = [rank for rank in missing if not self._store.check([f"alive/{rank}"])]
                time.sleep(0.05)
        return missing

    def _lost(self, missing: list[int], waited_s: float, error: RuntimeError) -> str:
        ways = {rank: self._ending(rank) for rank in missing}
        ended = [f"{self.name(rank)} {way}" for rank, way in ways.items() if way]
        if ended:
            return "; ".join(ended)
        if not missing:
            return f"the connection to another rank is lost ({first_line(error)})"
        silent = ", ".join(map(self.name, missing))
        if waited_s >= 0.9 * self._waits_s:
            return f"{silent} did not answer within {self._waits_s:.0f} s: it hangs, is stopped, or waits for its data or disk"
        return f"the connection to {silent} is lost: its process was killed or has crashed, or the network between them failed"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def _tree(parts: list[Tensor]) -> Tensor:
    """Sum in the order of a binary tree over the next power of two, missing leaves left out; works in place."""
    step = 1
    while step < len(parts):
        for left in range(0, len(parts) - step, 2 * step):
            parts[left] += parts[left + step]
        step *= 2
    return parts[0]


def backend() -> str:
    """Which libraries carry the collectives: gloo on the CPU, NCCL for tensors of CUDA devices."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
