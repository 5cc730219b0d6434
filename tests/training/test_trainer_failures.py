"""What ends a training run before its last step, and what is saved then."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh_mlflow.errors import DataError, NonFiniteError, SaveError, StoppedError
from bdh_mlflow.studies.verify import bitwise_difference
from bdh_mlflow.training.stop import StopRequest
from tests.training.bench import FallingRate, Item, Recorder, Toy, bench, items


class Breaking(Toy):
    """Gives a non-finite loss, or non-finite gradients, at the sixth batch."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.batches = what, 0

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits, loss = super().forward(idx, targets)
        if self.training:
            self.batches += 1
        if self.what != "nothing" and self.training and self.batches == 6 and loss is not None:
            loss = loss * float("nan") if self.what == "loss" else loss + (self.table.sum() * 0 + 0).sqrt()
        return logits, loss


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_non_finite_update_is_not_applied_and_the_good_weights_are_saved(what: str) -> None:
    b = bench(model=Breaking(what), checkpoint_freq=100)
    with pytest.raises(NonFiniteError, match=rf"update 6: {what} (nan|inf); it was not applied. Weights of step 5 are good"):
        b.trainer.run()
    assert b.saved_steps == [5]
    assert b.saved[0][0]["data_position"] == {"next": 5}  # the batch that broke it comes again
    good = bench(model=Breaking("nothing"), max_iters=5)
    good.trainer.run()
    assert torch.equal(b.model.table, good.model.table)
    assert bool(b.model.table.isfinite().all())


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_non_finite_pass_among_several_is_caught_before_the_update(what: str) -> None:
    """Losses reach the host only after the last pass."""
    b = bench(model=Breaking(what), gradient_accumulation_steps=4, checkpoint_freq=100)
    with pytest.raises(NonFiniteError, match=rf"update 2: {what} (nan|inf); it was not applied"):
        b.trainer.run()
    assert (b.saved_steps, b.saved[0][0]["data_position"]) == ([1], {"next": 4})
    good = bench(model=Breaking("nothing"), gradient_accumulation_steps=4, max_iters=1)
    good.trainer.run()
    assert torch.equal(b.model.table, good.model.table)


def test_float16_overflow_lowers_the_scale_and_is_not_a_step() -> None:
    b = bench(model=Breaking("gradient norm"), scaler=True, max_iters=8, log_freq=1)
    ending = b.trainer.run()
    assert ending.step == 8
    assert b.saved[-1][0]["data_position"] == {"next": 9}
    scales = b.log.values_of("optim/loss_scale")
    assert scales[4] == 2 * scales[5]
    assert bool(b.model.table.isfinite().all())


def test_unreadable_data_stops_the_run_with_a_checkpoint() -> None:
    def failing() -> Iterator[Item]:
        yield from (item for item, _ in zip(items(), range(3), strict=False))
        raise DataError("part-7.parquet: row group 2 cannot be read")

    b = bench(batches=failing())
    with pytest.raises(StoppedError, match=r"stopped after step 3: part-7\.parquet: row group 2 cannot be read"):
        b.trainer.run()
    assert b.saved_steps == [3]


@pytest.mark.parametrize(("full_at", "last_step"), [(6, 6), (10, 10)], ids=["in the middle", "the last"])
def test_failed_save_ends_the_run_before_the_next_step_and_is_not_tried_again(full_at: int, last_step: int) -> None:
    b = bench(full_at=full_at)
    with pytest.raises(SaveError):
        b.trainer.run()
    assert (b.disk.attempts[-1], b.trainer.step) == (full_at, last_step)


def test_number_formats_are_put_back_with_the_randomness_when_an_update_fails() -> None:
    class Scales(FallingRate):
        seen = 0

        def state_dict(self) -> dict[str, Any]:
            return {"seen": torch.tensor(self.seen)}

        def savepoint(self) -> Callable[[], None]:
            now = self.seen
            return lambda: setattr(self, "seen", now)

    class Diverging(Toy):
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            scales.seen += 1
            logits, loss = super().forward(idx, targets)
            return logits, loss * (float("nan") if scales.seen == 4 else 1.0)

    scales = Scales()
    b = bench(model=Diverging(), parts={"formats": scales})
    with pytest.raises(NonFiniteError):
        b.trainer.run()
    assert b.saved[-1][0]["step"] == 3
    assert int(b.saved[-1][0]["precision_state_dict"]["seen"]) == 3


def break_pipe() -> None:
    raise BrokenPipeError("nobody reads")


class Watcher(Recorder):
    """Shows the training until something happens."""

    def __init__(self, when: str, step: int, then: Callable[[], None] = break_pipe) -> None:
        super().__init__()
        self.when, self.at, self.then = when, step, then

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        super().advance(step, loss, tokens_per_s)
        self._happen("advance", step)

    def point(self, values: Mapping[str, float], step: int) -> None:
        self._happen("point", step)

    def _happen(self, when: str, step: int) -> None:
        if (when, step) == (self.when, self.at):
            self.then()


@pytest.mark.parametrize(("when", "step"), [("advance", 3), ("advance", 7), ("point", 4), ("point", 5)])
def test_whatever_breaks_the_loop_the_state_is_saved_as_if_it_had_been_asked_to_stop(when: str, step: int) -> None:
    b = bench(parts={"progress": Watcher(when, step)}, checkpoint_freq=100)
    with pytest.raises(BrokenPipeError):
        b.trainer.run()
    assert b.saved_steps == [step]
    stop = StopRequest(begun=True)
    asked = bench(parts={"progress": Watcher(when, step, lambda: stop.ask("test")), "stop": stop}, checkpoint_freq=100)
    asked.trainer.run()
    assert asked.saved_steps == [step]
    assert bitwise_difference(b.saved[0][0], asked.saved[0][0]) == ""


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), MemoryError()])
def test_a_pass_that_breaks_leaves_the_state_before_it(error: BaseException) -> None:
    class Broken(Toy):
        seen = 0

        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            self.seen += 1
            if self.seen == 4:
                raise error
            return super().forward(idx, targets)

    b = bench(model=Broken(), checkpoint_freq=100)
    with pytest.raises(type(error)):
        b.trainer.run()
    whole = bench(max_iters=3, checkpoint_freq=100)
    whole.trainer.run()
    assert b.saved_steps == [3]
    assert bitwise_difference(b.saved[0][0]["model_state_dict"], whole.saved[-1][0]["model_state_dict"]) == ""


def test_weights_in_the_middle_of_an_update_are_not_saved() -> None:
    class Breaking(torch.optim.SGD):
        steps = 0

        def step(self, *given: Any, **named: Any) -> Any:
            self.steps += 1
            if self.steps == 3:
                raise RuntimeError("the device is gone")
            return super().step(*given, **named)

    model = Toy()
    b = bench(model=model, parts={"optimizer": Breaking(model.parameters(), lr=0.1)}, checkpoint_freq=100)
    with pytest.raises(RuntimeError, match="the device is gone"):
        b.trainer.run()
    assert b.saved_steps == []


def test_a_save_that_fails_as_well_does_not_hide_what_ended_the_loop() -> None:
    b = bench(parts={"progress": Watcher("advance", 3)}, full_at=3, checkpoint_freq=100)
    with pytest.raises(BrokenPipeError) as caught:
        b.trainer.run()
    assert caught.value.__notes__ == ["its state could not be saved: disk full"]


def test_weights_that_are_not_finite_any_more_are_not_saved_as_good() -> None:
    """The update before has overflowed them: only the next pass shows it."""

    class Overflowing(torch.optim.SGD):
        steps = 0

        def step(self, *given: Any, **named: Any) -> Any:
            super().step(*given, **named)
            self.steps += 1
            if self.steps == 3:
                self.param_groups[0]["params"][0].data.fill_(float("inf"))

    model = Toy()
    b = bench(model=model, parts={"optimizer": Overflowing(model.parameters(), lr=0.1)}, checkpoint_freq=2)
    with pytest.raises(NonFiniteError, match="Weights of step 3 are not finite, and not saved"):
        b.trainer.run()
    assert b.saved_steps == [2]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize(("checkpoint_freq", "saved", "words"), [(2, [2, 4], "is of step 4"), (100, [], "no checkpoint before it")])
def test_weights_that_evaluate_to_no_number_are_not_called_good(loss: float, checkpoint_freq: int, saved: list[int], words: str) -> None:
    class Diverged(Toy):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            logits, found = super().forward(idx, targets)
            return logits, found if self.training or found is None else found * loss

    b = bench(model=Diverged(), checkpoint_freq=checkpoint_freq)
    with pytest.raises(NonFiniteError, match=rf"evaluation after step 5: val/loss {loss}; .*{words}. Lower training.learning_rate"):
        b.trainer.run()
    assert b.saved_steps == saved
    assert b.log.values_of("val/loss") == [], "no point of it either: databases make a number of it"
