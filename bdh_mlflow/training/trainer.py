"""The loop: accumulate gradients, check them, update, and then whatever is due at this step: log, evaluate, save.

Parts are passed in and described here by small protocols: the trainer builds nothing and knows neither the model, the data, MLflow nor
the disk. `step` counts completed optimizer updates. Everything that changes while it runs is in `state_dict`, taken only between updates.
An update that fails, or whose numbers are not finite, leaves that state as it was before; one that float16 overflowed is skipped, and only
lowers the loss scale and moves on in the data. Whatever ends the loop, a state that is good is saved, once; weights that evaluate to a
non-finite loss, and those in the middle of an update, are not good.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.distributed import ALONE, Report, World
from bdh_mlflow.errors import InputError, NonFiniteError, SaveError, StoppedError
from bdh_mlflow.files import first_line
from bdh_mlflow.text import Evaluation, Sample, bits_per_byte
from bdh_mlflow.training.evaluate import evaluate
from bdh_mlflow.training.interval import Interval
from bdh_mlflow.training.passes import Item, Passes
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.strategy import Strategy

State = dict[str, Any]
REMEDY = "Lower training.learning_rate, set training.grad_clip or use compute_dtype: float32; training.debug: true finds the operation"
SMALLEST_LOSS_SCALE = 1.0  # below this float16 gradients overflow without scaling: the run has diverged


class Schedule(Protocol):
    """Learning rate by step."""

    def at(self, step: int) -> float:
        """Rate of the update after `step` others."""

    def observe(self, val_loss: float) -> None:
        """Take note of a validation loss."""

    def state_dict(self) -> State:
        """What `at` cannot compute from the step."""

    def load_state_dict(self, state: State) -> None:
        """Continue from `state`."""


class Stateful(Protocol):
    """Something whose state the next update depends on."""

    def state_dict(self) -> State:
        """All of it."""

    def load_state_dict(self, state: State) -> None:
        """Continue from `state`."""


class NumberFormats(Stateful, Protocol):
    """State of the number formats, FP8 scales for instance, which every pass changes."""

    def savepoint(self) -> Callable[[], None]:
        """Called between updates: the function returned brings back the state of now. As cheap as the formats allow."""


class Tracker(Protocol):
    """Receives the points and samples of the run. Calls return at once and never fail."""

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        """Points of several curves.   Returns their time stamp, Unix time in ms."""

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """What the model writes."""


class Saver(Protocol):
    """Writes checkpoints in the background. An error of one save is raised by the next call."""

    def save(self, state: State, evaluation: Evaluation | None) -> None:
        """Save what `state` holds now; it may change as soon as this returns.   evaluation: of this very step, if there was one."""

    def check(self) -> None:
        """Raise what went wrong since the last call."""

    def finish(self) -> None:
        """Wait until everything is saved."""


class Progress(Protocol):
    """Shows the training to a user."""

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """An update was made."""

    def point(self, values: Mapping[str, float], step: int) -> None:
        """Metrics were logged."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Ending:
    """How a run ended without failing: `finished`, or what stopped it (SIGTERM, pruned)."""

    reason: str
    step: int
    evaluation: Evaluation | None
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything the loop works with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    strategy: Strategy
    """What each process holds of the two, and how gradients are added up."""
    schedule: Schedule
    scaler: torch.amp.GradScaler
    autocast: Callable[[], AbstractContextManager[Any]]
    formats: NumberFormats
    device: torch.device
    batches: Iterator[Item]
    validation: list[Tensor]
    bytes_per_token: float
    """Bytes of text that a token of the validation windows stands for, on average."""
    samples: Callable[[Callable[[], bool]], Sequence[Sample]]
    """Text that the model continues now; empty if it is asked to stop on the way."""
    observed: Callable[[], AbstractContextManager[dict[str, float]]]
    """Around an evaluation: further metrics of the model, complete at its end."""
    peak_tokens_per_s: float
    """Speed if the machine did nothing but the model's useful arithmetic, at the fastest rate measured on it; 100 % of perf/mfu_pct."""
    saver: Saver
    tracker: Tracker
    progress: Progress
    stop: StopRequest = field(default_factory=StopRequest)
    world: World = ALONE
    """The processes that train together; the batches handed in are those of this one's passes."""


class Trainer:
    """Trains until `max_iters` updates are made, a stop is requested, or a loss or gradient is not finite."""

    def __init__(self, parts: Parts, config: TrainingConfig) -> None:
        self._parts = parts
        self._config = config
        self._passes = _passes(parts, config)
        self.step = 0
        self.tokens_seen = 0
        self._position: State | None = None
        self._loss: float | None = None
        self._grad_norm = 0.0
        self._peak_gib = 0.0
        self._interval = Interval()
        self._saved_step: int | None = None
        self._consistent = True  # what state_dict gives is a step, and may be saved
        self._evaluation: Evaluation | None = None
        self._evaluated_step = 0
        self._samples: Sequence[Sample] = ()

    def run(self) -> Ending:
        """Train to the end. The last update is evaluated and saved. Raises what stopped it, after saving what is good."""
        stop, world = self._parts.stop, self._parts.world
        try:
            with world.failing():
                self._train()
                self._save_once()
                world.exchange(Report())  # nobody leaves before everything is saved
        except SaveError:
            raise
        except BaseException as error:  # also those of libraries, and of whoever watches: none may cost the steps since the last checkpoint
            self._save_despite(error)
            if isinstance(error, InputError):
                raise StoppedError(f"stopped after step {self.step}: {error}") from error
            raise
        return Ending(stop.received.name if stop.received else "finished", self.step, self._evaluation, self._samples)

    def _train(self) -> None:
        config = self._config
        if self.step % config.test_freq == 0 and self._evaluated_step != self.step:
            self._evaluate()  # the interruption came before it, and a plateau schedule depends on it
        while self.step < config.max_iters and not self._stop_agreed():
            self._parts.saver.check()
            if not self._update():
                continue
            last = self.step == config.max_iters
            if self.step % config.log_freq == 0 or last:
                self._log()
            if self.step % config.test_freq == 0 or last:
                self._evaluate()
            if self.step % config.checkpoint_freq == 0 or last:
                self._save()

    def _stop_agreed(self) -> bool:
        """Whether any process was asked to stop; all find the same."""
        stop = self._parts.stop
        asked = [int(report.stop) for report in self._parts.world.exchange(Report(stop=stop.number)) if report.stop]
        if asked:
            stop.agree(asked[0])
        return bool(asked)

    def state_dict(self) -> State:
        """Everything that the next update depends on."""
        parts = self._parts
        model_state, optimizer_state = parts.strategy.state()
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "model_state_dict": model_state,
            "optimizer_state_dict": optimizer_state,
            "scheduler_state_dict": parts.schedule.state_dict(),
            "scaler_state_dict": parts.scaler.state_dict(),
            "precision_state_dict": parts.formats.state_dict(),
            "data_position": self._position,
            "loss": self._loss,
            "accumulators": self._interval.state_dict(),
            "evaluated_step": self._evaluated_step,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state`; the batches handed in must start at its `data_position`."""
        parts = self._parts
        parts.strategy.load(state["model_state_dict"], state["optimizer_state_dict"])
        parts.schedule.load_state_dict(state["scheduler_state_dict"])
        if state["scaler_state_dict"]:  # empty where the loss was not scaled, as before a fork to float16
            parts.scaler.load_state_dict(state["scaler_state_dict"])
        parts.formats.load_state_dict(state.get("precision_state_dict", {}))  # empty without FP8; older checkpoints have none
        self.step = self._saved_step = state["step"]
        self.tokens_seen = state["tokens_seen"]
        self._evaluated_step = state["evaluated_step"]
        self._position = state["data_position"]
        self._loss = state["loss"]
        self._interval.load_state_dict(state["accumulators"])

    def _update(self) -> bool:
        """One optimizer update; False if float16 gradients overflowed and the update was skipped."""
        parts = self._parts
        restore_formats = parts.formats.savepoint()
        try:
            tokens_per_s = self._try_update()
        except BaseException:
            restore_formats()  # what is saved now is the state before this update, all of it
            parts.optimizer.zero_grad(set_to_none=True)
            raise
        if tokens_per_s is not None:
            parts.progress.advance(self.step, self._loss or 0.0, tokens_per_s)
        return tokens_per_s is not None

    def _try_update(self) -> float | None:
        """Returns the speed in tokens a second, None if the update was skipped."""
        parts = self._parts
        started = time.perf_counter()
        done = self._passes.compute(self.step)
        parts.scaler.unscale_(parts.optimizer)
        norm = parts.strategy.clip(self._config.grad_clip or float("inf"))
        *numbers, grad_norm = torch.cat([*done.summed, norm.unsqueeze(0)]).tolist()  # the loop waits for the device here, once an update
        passes, loss = self._config.gradient_accumulation_steps, 0.0
        for value in numbers[:passes]:  # sum() of Python 3.12 compensates rounding: logged losses would depend on its version
            loss += value / passes
        self._guard(loss, grad_norm, [parts.world.name(rank) for rank, each in enumerate(numbers[passes:]) if not math.isfinite(each)])
        self._consistent = False
        self._position, self._interval.epoch = done.batch.position, done.batch.epoch
        rate = parts.schedule.at(self.step)
        for group in parts.optimizer.param_groups:
            group["lr"] = rate
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        tokens = passes * done.batch.tokens[:, 1:].numel()
        self.tokens_seen += tokens
        elapsed_s = time.perf_counter() - started
        self._interval.add_attempt(tokens, elapsed_s, done.reports)
        self._peak_gib = max(report.peak_gib for report in done.reports)
        if applied := math.isfinite(grad_norm):
            self.step += 1
            self._loss, self._grad_norm = loss, grad_norm
            self._interval.add_loss(loss)
        self._consistent = True
        return tokens / elapsed_s if applied else None

    def _guard(self, loss: float, grad_norm: float, origin: list[str]) -> None:
        """Stop before non-finite values reach the weights. Under loss scaling an overflow of gradients only skips the update.

        origin: the ranks whose gradients are not finite, where there are several.
        """
        finite_loss = math.isfinite(loss)
        if finite_loss and math.isfinite(grad_norm):
            return
        scaler = self._parts.scaler
        if finite_loss and scaler.is_enabled() and scaler.get_scale() >= SMALLEST_LOSS_SCALE:
            return
        raise _not_applied(self.step, loss, grad_norm, self._parts.model, origin)

    def _log(self) -> None:
        parts, step, interval = self._parts, self.step, self._interval
        values = {
            **interval.metrics(parts.peak_tokens_per_s),
            "optim/lr": parts.optimizer.param_groups[0]["lr"],
            "optim/grad_norm": self._grad_norm,
            "mem/peak_gib": self._peak_gib,
            "progress/tokens_seen": self.tokens_seen,
        }
        if parts.scaler.is_enabled():
            values["optim/loss_scale"] = parts.scaler.get_scale()
        parts.tracker.metrics(values, step)
        parts.tracker.metrics({"by_tokens/train_loss": values["train/loss"]}, self.tokens_seen // 1000)
        if step % self._config.log_freq == 0:  # the extra point of a last step that is no multiple leaves the interval open
            interval.reset()
        parts.progress.point(values, step)

    def _evaluate(self) -> None:
        parts, step = self._parts, self.step
        if not parts.validation:
            return
        with parts.strategy.whole(), parts.observed() as observed:
            val_loss = evaluate(parts.model, parts.validation, parts.autocast, parts.device, self._stopped, parts.world)
        if val_loss is None:
            return
        if not math.isfinite(val_loss):
            self._consistent = False
            raise _diverged(step, val_loss, self._saved_step)
        values = {"val/loss": val_loss, "val/bpb": bits_per_byte(val_loss, parts.bytes_per_token)}
        logged_at_ms = parts.tracker.metrics({**values, **observed}, step)
        self._evaluation, self._evaluated_step = Evaluation(step, val_loss, logged_at_ms, parts.bytes_per_token), step
        parts.tracker.metrics({"by_tokens/val_loss": val_loss, "by_tokens/val_bpb": values["val/bpb"]}, self.tokens_seen // 1000)
        parts.tracker.metrics({"by_bytes/val_bpb": values["val/bpb"]}, int(self.tokens_seen * parts.bytes_per_token) // 1000)
        if step % self._config.test_freq == 0:
            parts.schedule.observe(val_loss)
        parts.progress.point(values, step)
        with parts.strategy.whole():
            samples = parts.samples(self._stopped)
        if samples:
            self._samples = samples
            parts.tracker.samples(samples, step)

    def _save(self) -> None:
        started = time.perf_counter()
        self._saved_step = self.step  # before the attempt: an ending must not repeat a save that failed
        evaluation = self._evaluation if self._evaluation and self._evaluation.step == self.step else None
        self._parts.saver.save(self.state_dict(), evaluation)
        self._parts.tracker.metrics({"ckpt/blocked_ms": 1e3 * (time.perf_counter() - started)}, self.step)

    def _save_once(self) -> None:
        if self.step and self._saved_step != self.step and self._consistent:
            self._save()
        self._parts.saver.finish()

    def _save_despite(self, error: BaseException) -> None:
        """Save what is good, once; if that fails as well, it is told with the error that ended the loop."""
        is_good = not isinstance(error, NonFiniteError) or _are_finite(self._parts.model)
        self._consistent = self._consistent and self._parts.strategy.saves_despite and is_good
        try:
            self._save_once()
        except Exception as failed:  # of the disk, or of a device that is gone: what came first is what is told
            error.add_note(f"its state could not be saved: {first_line(failed)}")
            with contextlib.suppress(Exception):  # whoever watches may be what failed
                self._parts.progress.note(str(failed))

    def _stopped(self) -> bool:
        return self._parts.stop.received is not None


def _passes(parts: Parts, config: TrainingConfig) -> Passes:
    return Passes(
        model=parts.model,
        autocast=parts.autocast,
        scaler=parts.scaler,
        device=parts.device,
        batches=parts.batches,
        world=parts.world,
        sums=parts.strategy,
        count=config.gradient_accumulation_steps,
        seed=config.seed,
    )


def _are_finite(model: nn.Module) -> bool:
    """Whether every weight that this process holds is a finite number."""
    own = (weights.to_local() if isinstance(weights, DTensor) else weights for weights in model.parameters())
    return all(bool(torch.isfinite(weights).all()) for weights in own)


def _not_applied(step: int, loss: float, grad_norm: float, model: nn.Module, origin: list[str]) -> NonFiniteError:
    """The error of an update after `step` others whose numbers are not finite.   origin: ranks that they come from, of several."""
    what = f"gradient norm {grad_norm}" if math.isfinite(loss) else f"loss {loss}"
    what += f" from {', '.join(origin)}" if origin else ""
    weights = f"Weights of step {step} are {'good' if _are_finite(model) else 'not finite, and not saved'}"
    return NonFiniteError(f"update {step + 1}: {what}; it was not applied. {weights}. {REMEDY}")


def _diverged(step: int, val_loss: float, saved_step: int | None) -> NonFiniteError:
    """The error of weights that evaluate to no number.   saved_step: of the last checkpoint."""
    last = f"the last checkpoint is of step {saved_step}" if saved_step else "there is no checkpoint before it"
    kept = "its checkpoint was saved before it was evaluated" if saved_step == step else f"they are not saved, {last}"
    return NonFiniteError(f"evaluation after step {step}: val/loss {val_loss}; {kept}. {REMEDY}")
