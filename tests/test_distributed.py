"""Groups of real processes over gloo: what they do together, and how they end together."""

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

from bdh_mlflow.distributed import ALONE, Group, PeerError, Report, World
from bdh_mlflow.errors import ConfigError, DataError
from bdh_mlflow.training.passes import TreeSum
from tests.groups import in_group


def test_alone_is_a_world_of_one() -> None:
    assert (ALONE.rank, ALONE.size, ALONE.passes(3)) == (0, 1, range(3))
    assert ALONE.exchange(Report(stop=15)) == [Report(stop=15)]
    assert ALONE.share(lambda: 7) == 7
    assert ALONE.gather("x") == ["x"]


def test_every_rank_finds_the_same_reports_values_and_decisions() -> None:
    def body(world: Group) -> Any:
        reports = world.exchange(Report(stop=world.rank, compute_s=0.5 + world.rank))
        shared = world.share(lambda: {"from": world.rank})
        return world.rank, [(r.stop, r.compute_s) for r in reports], shared, world.gather(f"value {world.rank}"), list(world.passes(6))

    found = in_group(3, body)
    for rank in range(3):
        own = list(range(2 * rank, 2 * rank + 2))
        assert found[rank] == (rank, [(0, 0.5), (1, 1.5), (2, 2.5)], {"from": 0}, ["value 0", "value 1", "value 2"], own)


def gradient(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 10.0 ** (number % 5)


def summed(world: World, passes: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """As the trainer sums the gradients of an update."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 3), (5,), (2, 2, 2))]
    unused = nn.Parameter(torch.zeros(3))
    tree = TreeSum([*parameters, unused])
    losses = []
    for number in world.passes(passes):
        for place, parameter in enumerate(parameters):
            parameter.grad = gradient(10 * number + place, tuple(parameter.shape))
        tree.add()
        losses.append(torch.tensor(number + 0.1))
    tree.finish()
    done = world.sum_gradients([*parameters, unused], torch.stack(losses))
    assert unused.grad is None
    return [p.grad for p in parameters if p.grad is not None], done.losses, done.health


@pytest.mark.parametrize(("size", "passes"), [(2, 2), (2, 8), (3, 3), (3, 6), (4, 4), (4, 8)])
def test_gradients_of_any_number_of_processes_are_those_of_one(size: int, passes: int) -> None:
    gradients, losses, _ = summed(ALONE, passes)
    for found in in_group(size, lambda world: [[t.numpy() for t in part] for part in (lambda s: (s[0], s[1:]))(summed(world, passes))]):
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(found[0], gradients, strict=True))
        assert torch.equal(torch.from_numpy(found[1][0]), losses)
        assert found[1][1].tolist() == [0.0] * size


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_told_by_rank(value: float) -> None:
    def body(world: Group) -> list[bool]:
        parameter = nn.Parameter(torch.zeros(5))
        parameter.grad = torch.tensor([1.0, 2.0, value if world.rank == 1 else 3.0, 4.0, 5.0])
        return torch.isfinite(world.sum_gradients([parameter], torch.ones(1)).health).tolist()

    assert in_group(3, body) == [[True, False, True]] * 3


def test_sums_that_do_not_round_are_exact() -> None:
    def body(world: Group) -> list[float]:
        values = torch.zeros(3, dtype=torch.float64)
        values[world.rank] = (world.rank + 1) / 3
        return world.sum_exact(values).tolist()

    assert in_group(3, body) == [[1 / 3, 2 / 3, 1.0]] * 3


@pytest.mark.parametrize("where", ["exchange", "share", "gather"])
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_failure_reaches_the_others_wherever_they_are(where: str, guilty: int) -> None:
    def body(world: Group) -> None:
        with world.failing():
            if world.rank == guilty:
                raise DataError("part-7.parquet: damaged")
            {"exchange": lambda: world.exchange(Report()), "share": lambda: world.share(int), "gather": lambda: world.gather(1)}[where]()

    found = in_group(3, body)
    for rank, error in enumerate(found):
        if rank == guilty:
            assert isinstance(error, DataError)
        else:
            assert isinstance(error, PeerError), error
            assert str(error).startswith(f"rank {guilty} (")
            assert str(error).endswith("): part-7.parquet: damaged")
            assert (error.exit_code, error.speaks) == (2, rank == 0)


def test_what_rank_0_cannot_decide_ends_all_with_its_exit_code() -> None:
    def body(world: Group) -> None:
        def refuse() -> int:
            raise ConfigError("no such file")

        world.share(refuse)

    first, *others = in_group(3, body)
    assert isinstance(first, ConfigError)
    assert [(type(e), e.exit_code, e.speaks) for e in others] == [(PeerError, 2, False)] * 2


def test_an_error_of_another_kind_is_told_with_its_kind() -> None:
    def body(world: Group) -> None:
        with world.failing():
            if world.rank:
                raise ZeroDivisionError("division by zero")
            world.exchange(Report())

    first, _ = in_group(2, body)
    assert (type(first), str(first).partition("): ")[2], first.exit_code) == (PeerError, "ZeroDivisionError: division by zero", 1)


def test_ranks_that_fail_together_each_raise_their_own() -> None:
    def body(world: Group) -> None:
        with world.failing():
            raise DataError(f"of rank {world.rank}")

    assert [str(error) for error in in_group(3, body)] == ["of rank 0", "of rank 1", "of rank 2"]


SLOW = pytest.mark.slow  # the others wait some seconds for a sign of life


@SLOW
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_killed_rank_is_named_at_once_and_the_lowest_that_lives_speaks(gone: int) -> None:
    def body(world: Group) -> Any:
        world.expect_updates()
        if world.rank == gone:
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        try:
            for _ in range(3):
                world.exchange(Report())
        except PeerError as error:
            return str(error), error.speaks, time.monotonic() - started
        return None

    found = in_group(4, body, patience_s=30.0)  # of four not all are neighbours of the one that is gone
    alive = {0, 1, 2, 3} - {gone}
    assert found[gone] is None
    for rank in alive:
        message, speaks, took_s = found[rank]
        assert re.findall(r"rank (\d)", message) == [str(gone)], message
        assert "is lost: its process was killed" in message
        assert speaks == (rank == min(alive))
        assert took_s < 15, "not the patience of a rank that is alive"


@pytest.mark.slow  # the same
@pytest.mark.parametrize("gone", [0, 1])
def test_a_stopped_rank_is_named_within_the_patience(gone: int) -> None:
    def body(world: Group) -> Any:
        world.expect_updates()
        world.exchange(Report())
        if world.rank == gone:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            world.exchange(Report())
        except PeerError as error:
            return str(error)
        return None

    found = in_group(3, body, patience_s=1.0)
    for rank in {0, 1, 2} - {gone}:
        assert f"rank {gone} (" in found[rank]
        assert "did not answer within 1 s" in found[rank]
