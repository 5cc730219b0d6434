"""The loop in several real processes, with a toy model: the same numbers as in one, and one ending for all."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh_mlflow.distributed import ALONE, Group, PeerError, World
from bdh_mlflow.errors import DataError, NonFiniteError, SaveError, StoppedError
from bdh_mlflow.studies.verify import bitwise_difference
from tests.groups import in_group
from tests.training.bench import Bench, Item, Toy, bench, items

PASSES = 4


def own_items(world: World, start: int = 0) -> Iterator[Item]:
    """This rank's batches of each update, with the position after the whole update."""
    source = items(start)
    while True:
        update = [next(source) for _ in range(PASSES)]
        for number in world.passes(PASSES):
            yield Item(update[number].tokens, update[-1].position, update[-1].epoch)


def together(world: World, **changes: Any) -> Bench:
    given = {"batches": own_items(world), "gradient_accumulation_steps": PASSES, "log_freq": 1, **changes}
    return bench(**{**given, "parts": {"world": world, **given.pop("parts", {})}})


def trained(world: World) -> tuple[dict[str, Any], list[tuple[str, int, float]]]:
    b = together(world)
    b.trainer.run()
    points = [p for p in b.log.points if not p[0].startswith(("perf/", "mem/", "ckpt/"))]
    return {"state": b.saved[-1][0]}, points


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_trains_the_same(size: int) -> None:
    alone, points = trained(ALONE)
    for state, own in in_group(size, trained):
        assert bitwise_difference(alone, state) == ""
        assert own == points


def test_speed_of_each_process_is_logged_and_who_is_slowest() -> None:
    def body(world: Group) -> dict[str, float]:
        class Slow(Toy):
            def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
                signal.sigtimedwait([], 0.02 if world.rank == 1 else 0.0)
                return super().forward(idx, targets)

        b = together(world, model=Slow(), max_iters=2, log_freq=2)
        b.trainer.run()
        return {key: value for key, _, value in b.log.points if key.startswith("perf/")}

    for found in in_group(2, body):
        assert found["perf/slowest_rank"] == 1
        assert found["perf/step_ms_max"] > 40 > found["perf/step_ms_min"] >= 0
        assert found["perf/step_ms_mean"] == pytest.approx((found["perf/step_ms_max"] + found["perf/step_ms_min"]) / 2)
        assert found["perf/data_wait_ms"] >= 0


def ending_of(world: Group, b: Bench) -> tuple[Any, list[int]]:
    """How a rank ended, and the steps that it would have saved."""
    try:
        return b.trainer.run(), b.saved_steps
    except BaseException as error:  # also KeyboardInterrupt
        return error, b.saved_steps


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("phase", ["update", "evaluation"])
def test_a_signal_to_any_rank_stops_all_after_the_same_step(asked: int, phase: str) -> None:
    def body(world: Group) -> Any:
        class Signalled(Toy):
            def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
                if world.rank == asked and b.trainer.step == (2 if phase == "update" else 5) and self.training == (phase == "update"):
                    b.stop.handle(signal.SIGTERM, None)
                return super().forward(idx, targets)

        b = together(world, model=Signalled(), checkpoint_freq=100)
        return ending_of(world, b)

    step = 3 if phase == "update" else 5
    for ending, saved in in_group(2, body):
        assert (ending.reason, ending.step, saved) == ("SIGTERM", step, [step])


def failing_at(update: int, rank: int, error: Exception) -> Callable[[Group], Any]:
    def body(world: Group) -> Any:
        def batches() -> Iterator[Item]:
            for number, item in enumerate(own_items(world)):
                if world.rank == rank and number == update * PASSES // world.size + 1:
                    raise error
                yield item

        return ending_of(world, together(world, batches=batches(), checkpoint_freq=100))

    return body


@pytest.mark.parametrize("rank", [0, 1])
def test_unreadable_data_of_one_rank_ends_all_with_its_message_and_a_checkpoint(rank: int) -> None:
    found = in_group(2, failing_at(3, rank, DataError("part-7.parquet: damaged")))
    own, saved = found[rank]
    assert (type(own), str(own), saved) == (StoppedError, "stopped after step 3: part-7.parquet: damaged", [3])
    other, saved = found[1 - rank]
    assert (type(other), saved) == (PeerError, [3])
    assert str(other).startswith(f"rank {rank} (")
    assert str(other).endswith("part-7.parquet: damaged")


def test_a_defect_of_one_rank_ends_all() -> None:
    (error, saved), (own, _) = in_group(2, failing_at(2, 1, ZeroDivisionError("division by zero")))
    assert (type(own), type(error), saved) == (ZeroDivisionError, PeerError, [2])
    assert str(error).endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_value_that_is_not_finite_is_told_with_its_rank(what: str) -> None:
    def body(world: Group) -> Any:
        class Breaking(Toy):
            def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
                logits, loss = super().forward(idx, targets)
                if loss is not None and world.rank == 1 and b.trainer.step == 2 and self.training:
                    loss = loss * float("nan") if what == "loss" else loss + (self.table.sum() * 0).sqrt()
                return logits, loss

        b = together(world, model=Breaking(), checkpoint_freq=100)
        return ending_of(world, b)

    for error, saved in in_group(2, body):
        assert (type(error), saved) == (NonFiniteError, [2])
        assert f"update 3: {what} nan from rank 1 (" in str(error)


@pytest.mark.parametrize("full_at", [2, 10])
def test_a_full_disk_of_rank_0_ends_all(full_at: int) -> None:
    def body(world: Group) -> Any:
        return ending_of(world, together(world, checkpoint_freq=2, full_at=full_at if world.rank == 0 else None))

    (own, _), (other, _) = in_group(2, body)
    assert isinstance(own, SaveError)
    assert (type(other), str(other).partition("): ")[2]) == (PeerError, "disk full")


@pytest.mark.slow  # the others wait three seconds for a sign of life
def test_a_killed_rank_ends_all_and_the_last_step_is_saved() -> None:
    def body(world: Group) -> Any:
        class Mortal(Toy):
            def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
                if world.rank == 1 and b.trainer.step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().forward(idx, targets)

        b = together(world, model=Mortal(), checkpoint_freq=100)
        return ending_of(world, b)

    (error, saved), gone = in_group(2, body)
    assert (type(error), saved, gone) == (PeerError, [3], None)
    assert "rank 1 (" in str(error)


def test_what_is_resumed_by_another_number_of_processes_goes_on_the_same() -> None:
    straight = trained(ALONE)[0]

    def first(world: Group) -> dict[str, Any]:
        b = together(world, max_iters=3)
        b.trainer.run()
        return b.saved[-1][0]

    state = in_group(4, first)[0]
    for size in (2, 1):

        def on(world: World, state: dict[str, Any] = state, last: int = 6 if size == 2 else 10) -> dict[str, Any]:
            b = together(world, max_iters=last, batches=own_items(world, state["data_position"]["next"]))
            torch.manual_seed(99)
            b.trainer.load_state_dict(state)
            b.trainer.run()
            return b.saved[-1][0]

        state = in_group(size, on)[0] if size > 1 else on(ALONE)
    assert bitwise_difference(straight["state"], state) == ""
