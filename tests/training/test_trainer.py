"""The loop, with a toy model and lists as tracker, disk and screen."""

import copy
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.errors import DataError, NonFiniteError, SaveError, StoppedError
from bdh_mlflow.text import Evaluation, Sample
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.trainer import Ending, Parts, Trainer

CPU = torch.device("cpu")


class Toy(nn.Module):
    """A bigram model with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(8, 8))
        self.dropout = nn.Dropout(0.2)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.dropout(self.table[idx] + 1)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) if targets is not None else None


class Item(NamedTuple):
    tokens: Tensor
    position: dict[str, Any]
    epoch: float


def items(start: int = 0) -> Iterator[Item]:
    for i in range(start, 10_000):
        tokens = torch.randint(0, 8, (2, 5), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
        yield Item(tokens, {"next": i + 1}, i / 10)


@dataclass
class Recorder:
    """Tracker and progress in one."""

    points: list[tuple[str, int, float]] = field(default_factory=list)
    written: list[tuple[Sequence[Sample], int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        self.points += [(key, step, value) for key, value in values.items()]
        return 1000 * step

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        self.written.append((samples, step))

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        self.steps.append(step)

    def point(self, values: Mapping[str, float], step: int) -> None: ...

    def note(self, text: str) -> None: ...

    def steps_of(self, key: str) -> list[int]:
        return [step for k, step, _ in self.points if k == key]

    def values_of(self, key: str) -> list[float]:
        return [value for k, _, value in self.points if k == key]


@dataclass
class Disk:
    """Keeps states in a list; fails at a given step, as a background write does: at the next call."""

    saved: list[tuple[dict[str, Any], float | None]]
    full_at: int | None = None
    attempts: list[int] = field(default_factory=list)
    error: Exception | None = None

    def save(self, state: dict[str, Any], evaluation: Evaluation | None) -> None:
        self.finish()
        self.attempts.append(state["step"])
        if state["step"] == self.full_at:
            self.error = SaveError("disk full")
        else:
            self.saved.append((copy.deepcopy(state), evaluation.loss if evaluation else None))

    def check(self) -> None:
        if self.error:
            raise self.error

    def finish(self) -> None:
        self.check()


SAMPLES = [Sample("def ", "f(x):"), Sample("class ", "A:")]


class FallingRate:
    """A schedule, and number formats without a state."""

    def __init__(self) -> None:
        self.observed: list[float] = []

    def at(self, step: int) -> float:
        return 0.1 / (step + 1)

    def observe(self, val_loss: float) -> None:
        self.observed.append(val_loss)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def savepoint(self) -> Callable[[], None]:
        return lambda: None


@dataclass
class Bench:
    trainer: Trainer
    model: Toy
    log: Recorder
    disk: Disk
    stop: StopRequest
    rate: FallingRate

    @property
    def saved(self) -> list[tuple[dict[str, Any], float | None]]:
        return self.disk.saved

    @property
    def saved_steps(self) -> list[int]:
        return [state["step"] for state, _ in self.saved]


def bench(
    *,
    batches: Iterator[Item] | None = None,
    scaler: bool = False,
    model: Toy | None = None,
    full_at: int | None = None,
    parts: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Bench:
    torch.manual_seed(0)
    model, log, disk, rate = model or Toy(), Recorder(), Disk([], full_at), FallingRate()
    stop = (parts or {}).get("stop") or StopRequest(begun=True)
    config = TrainingConfig(**{"max_iters": 10, "log_freq": 4, "test_freq": 5, "checkpoint_freq": 6, **settings})

    defaults = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), fused=True),
        "schedule": rate,
        "scaler": torch.amp.GradScaler("cpu", enabled=scaler),
        "autocast": nullcontext,
        "formats": rate,
        "device": CPU,
        "batches": batches or items(),
        "validation": [item.tokens for item, _ in zip(items(5000), range(3), strict=False)],
        "samples": lambda stopped: SAMPLES,
        "observed": lambda: nullcontext({"seen": 1.0}),
        "peak_tokens_per_s": 1e6,
        "saver": disk,
        "tracker": log,
        "progress": log,
        "stop": stop,
    }
    return Bench(Trainer(Parts(**{**defaults, **(parts or {})}), config), model, log, disk, stop, rate)


def test_things_happen_at_their_frequencies_and_at_the_last_step() -> None:
    b = bench()
    ending = b.trainer.run()
    assert b.log.steps_of("train/loss") == [4, 8, 10]
    assert b.log.steps_of("val/loss") == [5, 10]
    assert b.log.written == [(SAMPLES, 5), (SAMPLES, 10)]
    assert b.saved_steps == [6, 10]
    assert b.log.steps == list(range(1, 11))
    assert ending == Ending("finished", 10, b.log.values_of("val/loss")[-1], SAMPLES)


def test_checkpoint_of_an_evaluated_step_knows_its_validation_loss() -> None:
    b = bench(test_freq=3, checkpoint_freq=2, max_iters=6)
    b.trainer.run()
    assert [(state["step"], loss is not None) for state, loss in b.saved] == [(2, False), (4, False), (6, True)]


def test_logged_loss_is_the_mean_since_the_last_point() -> None:
    every = bench(log_freq=1)
    every.trainer.run()
    some = bench(log_freq=5)
    some.trainer.run()
    losses = every.log.values_of("train/loss")
    assert some.log.values_of("train/loss") == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5])


def test_schedule_counts_optimizer_steps_whatever_the_accumulation() -> None:
    b = bench(gradient_accumulation_steps=3, log_freq=1, max_iters=4)
    b.trainer.run()
    assert b.log.values_of("optim/lr") == [0.1, 0.05, 0.1 / 3, 0.025]
    assert b.log.values_of("progress/tokens_seen") == [24, 48, 72, 96]
    assert b.saved[-1][0]["data_position"] == {"next": 12}


def test_accumulated_gradient_is_that_of_the_whole_batch() -> None:
    class Whole(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Identity()

    def merged() -> Iterator[Item]:
        source = items()
        while True:
            pair = [next(source), next(source)]
            yield Item(torch.cat([i.tokens for i in pair]), pair[1].position, pair[1].epoch)

    parts = bench(gradient_accumulation_steps=2, max_iters=3, model=Whole())  # no randomness: Whole has no dropout
    whole = bench(batches=merged(), max_iters=3, model=Whole())
    parts.trainer.run()
    whole.trainer.run()
    assert torch.allclose(parts.model.table, whole.model.table, atol=1e-6)


@pytest.mark.parametrize("interruption", range(1, 10))
def test_stopping_and_resuming_gives_the_same_bytes(interruption: int) -> None:
    straight = bench(gradient_accumulation_steps=2)
    straight.trainer.run()
    first = bench(gradient_accumulation_steps=2)
    _stop_after(first, interruption)
    assert first.trainer.run().reason == "SIGTERM"
    state = first.saved[-1][0]
    assert state["step"] == interruption
    second = bench(gradient_accumulation_steps=2, batches=items(state["data_position"]["next"]))
    torch.manual_seed(99)
    second.trainer.load_state_dict(state)
    second.trainer.run()
    assert torch.equal(straight.model.table, second.model.table)
    assert torch.equal(straight.saved[-1][0]["rng"]["cpu"], second.saved[-1][0]["rng"]["cpu"])
    known = {(k, s): v for k, s, v in straight.log.points if k in ("train/loss", "val/loss", "optim/grad_norm")}
    again = {(k, s): v for k, s, v in first.log.points + second.log.points if k in ("train/loss", "val/loss", "optim/grad_norm")}
    assert again == known


def _stop_after(b: Bench, step: int) -> None:
    real = b.log.advance

    def advance(now: int, loss: float, tokens_per_s: float) -> None:
        real(now, loss, tokens_per_s)
        if now == step:
            b.stop.handle(signal.SIGTERM, None)

    b.log.advance = advance  # type: ignore[method-assign]


@pytest.mark.parametrize("phase", ["evaluation", "sampling"])
def test_signal_cuts_an_evaluation_short_and_the_step_is_saved(phase: str) -> None:
    stop = StopRequest(begun=True)

    class Late(Toy):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            if not self.training and phase == "evaluation":
                stop.handle(signal.SIGINT, None)
            return super().forward(idx, targets)

    def samples(stopped: Callable[[], bool]) -> list[Sample]:
        stop.handle(signal.SIGINT, None)
        return [] if stopped() else SAMPLES

    b = bench(model=Late(), parts={"samples": samples, "stop": stop})
    ending = b.trainer.run()
    assert (ending.reason, ending.step, b.saved_steps, b.log.written) == ("SIGINT", 5, [5], [])
    assert b.log.steps_of("val/loss") == ([] if phase == "evaluation" else [5])


def test_second_signal_does_not_cut_off_the_save() -> None:
    stop = StopRequest(begun=True)
    stop.handle(signal.SIGINT, None)
    stop.handle(signal.SIGTERM, None)
    assert stop.received is signal.SIGINT


def test_signal_before_the_loop_ends_the_program_where_it_is() -> None:
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)
    assert stop.received is signal.SIGTERM


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
    assert torch.equal(b.saved[0][0]["rng"]["cpu"], good.saved[-1][0]["rng"]["cpu"])
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


def test_loop_reads_from_the_device_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of all passes and the gradient norm come in one transfer; each read of a tensor's value would wait for the device."""

    class Reads(TorchDispatchMode):
        """Counts what `Tensor.item`, `float(tensor)` and `if tensor` do."""

        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    lists: list[int] = []
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor.numel()) or real(tensor))
    b = bench(gradient_accumulation_steps=3, max_iters=4, test_freq=100, parts={"validation": []})
    with Reads() as reads:
        b.trainer.run()
    assert (lists, reads.count) == ([4] * 4, 0)


def test_logged_loss_of_accumulated_passes_is_their_sum_in_order() -> None:
    b = bench(gradient_accumulation_steps=3, log_freq=1, max_iters=1)
    losses, torch_state = [], torch.get_rng_state()
    model, source = Toy(), items()
    for _ in range(3):
        tokens = next(source).tokens.long()
        losses.append(model(tokens[:, :-1], tokens[:, 1:])[1].item())
    torch.set_rng_state(torch_state)
    b.trainer.run()
    assert b.log.values_of("train/loss") == [losses[0] / 3 + losses[1] / 3 + losses[2] / 3]


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


def test_metrics_of_the_model_stand_beside_the_validation_loss() -> None:
    b = bench()
    b.trainer.run()
    assert b.log.steps_of("seen") == b.log.steps_of("val/loss") == [5, 10]


def test_losses_are_logged_on_the_axis_of_tokens_too() -> None:
    b = bench(log_freq=5)
    b.trainer.run()
    assert b.log.values_of("by_tokens/train_loss") == b.log.values_of("train/loss")
    assert b.log.values_of("by_tokens/val_bpb") == b.log.values_of("val/bpb")


def test_evaluation_and_samples_leave_the_training_randomness_alone() -> None:
    often = bench(test_freq=1)
    often.trainer.run()
    never = bench(test_freq=1000)
    never.trainer.run()
    assert torch.equal(often.model.table, never.model.table)


def test_schedule_observes_evaluations_of_its_cadence_only() -> None:
    b = bench(test_freq=4)
    b.trainer.run()
    assert b.log.steps_of("val/loss") == [4, 8, 10]
    assert b.rate.observed == b.log.values_of("val/loss")[:2]


def test_finished_run_has_nothing_left_to_do() -> None:
    b = bench()
    b.trainer.run()
    again = bench()
    again.trainer.load_state_dict(b.saved[-1][0])
    assert again.trainer.run() == Ending("finished", 10, None, ())
    assert (again.saved, again.log.points) == ([], [])


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
