"""The loop: accumulate, guard, update, and then whatever it is time for.

Parts are handed in and described here by small protocols: the trainer builds nothing and knows neither the model, the data, MLflow nor
the disk. `step` counts completed optimizer updates. Everything that changes while it runs is in `state_dict`, taken only between updates.
"""

import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.errors import BdhError, InputError, NonFiniteError, SaveError, StoppedError
from bdh_mlflow.text import Evaluation, Sample, bits_per_byte
from bdh_mlflow.training.evaluate import evaluate
from bdh_mlflow.training.stop import StopRequest

State = dict[str, Any]
SMALLEST_LOSS_SCALE = 1.0  # below this float16 gradients overflow without scaling: the run has diverged


class Item(Protocol):
    """A batch: tokens (B, T + 1), where the next one starts, and how often the data has been passed over."""

    @property
    def tokens(self) -> Tensor:  # noqa: D102
        ...

    @property
    def position(self) -> State:  # noqa: D102
        ...

    @property
    def epoch(self) -> float:  # noqa: D102
        ...


class Schedule(Protocol):
    """Learning rate by step."""

    def at(self, step: int) -> float:
        """Rate of the update after `step` others."""

    def observe(self, val_loss: float) -> None:
        """Hear an evaluation."""

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


class Tracker(Protocol):
    """Who is told about the run. Calls return at once and never fail."""

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        """Points of several curves.   Returns their time stamp, Unix time in ms."""

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """What the model writes."""


class Saver(Protocol):
    """Who keeps states, behind the loop. An error of one save is raised by the next call."""

    def save(self, state: State, evaluation: Evaluation | None) -> None:
        """Keep what `state` holds now; it may change as soon as this returns.   evaluation: of this very step, if there was one."""

    def check(self) -> None:
        """Raise what went wrong since the last call."""

    def finish(self) -> None:
        """Wait until everything is kept."""


class Progress(Protocol):
    """Who watches."""

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """An update was made."""

    def point(self, values: Mapping[str, float], step: int) -> None:
        """Metrics were logged."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class NullTracker:
    """A tracker that tells nobody."""

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        """Nothing."""
        return 0

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Ending:
    """How a run ended without failing: `finished`, or what asked it to stop (SIGTERM, pruned)."""

    reason: str
    step: int
    val_loss: float | None
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop works with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    autocast: Callable[[], AbstractContextManager[Any]]
    formats: Stateful
    device: torch.device
    batches: Iterator[Item]
    validation: list[Tensor]
    samples: Callable[[Callable[[], bool]], Sequence[Sample]]
    """What the model writes now; empty if it is asked to stop."""
    observed: Callable[[], AbstractContextManager[dict[str, float]]]
    """Around an evaluation: what else was seen of the model, complete at its end."""
    peak_tokens_per_s: float
    """If the machine did nothing but the model's useful arithmetic, at the fastest it was seen to do any."""
    saver: Saver
    tracker: Tracker
    progress: Progress
    stop: StopRequest = field(default_factory=StopRequest)


class Trainer:
    """Trains until `max_iters` updates are made, a signal asks to stop, or a number is no longer one."""

    def __init__(self, parts: Parts, config: TrainingConfig) -> None:
        self._parts = parts
        self._config = config
        self.step = 0
        self.tokens_seen = 0
        self._position: State | None = None
        self._epoch = 0.0
        self._loss: float | None = None
        self._loss_sum = 0.0
        self._loss_count = 0
        self._grad_norm = 0.0
        self._step_s = 0.0
        self._new_steps = 0
        self._new_tokens = 0
        self._saved_step: int | None = None
        self._evaluation: Evaluation | None = None
        self._evaluated_step = 0
        self._samples: Sequence[Sample] = ()

    def run(self) -> Ending:
        """Train to the end. The last update is evaluated and saved. Raises what stopped it, after saving what is good."""
        config, stop = self._config, self._parts.stop
        try:
            if self.step % config.test_freq == 0 and self._evaluated_step != self.step:
                self._evaluate()  # the interruption came before it; a plateau schedule has yet to hear of it
            while self.step < config.max_iters and not stop.received:
                self._parts.saver.check()
                if not self._update():
                    continue
                last = self.step == config.max_iters
                if self.step % config.log_freq == 0 or last:
                    self._log()
                if (self.step % config.test_freq == 0 or last) and not stop.received:
                    self._evaluate()
                if self.step % config.checkpoint_freq == 0 or last:
                    self._save()
        except SaveError:
            raise
        except InputError as error:
            self._save_once()
            raise StoppedError(f"stopped after step {self.step}: {error}") from error
        except BdhError:
            self._save_once()
            raise
        self._save_once()
        val_loss = self._evaluation.loss if self._evaluation else None
        return Ending(stop.received.name if stop.received else "finished", self.step, val_loss, self._samples)

    def state_dict(self) -> State:
        """Everything that the next update depends on."""
        parts = self._parts
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "model_state_dict": parts.model.state_dict(),
            "optimizer_state_dict": parts.optimizer.state_dict(),
            "scheduler_state_dict": parts.schedule.state_dict(),
            "scaler_state_dict": parts.scaler.state_dict(),
            "precision_state_dict": parts.formats.state_dict(),
            "rng": self._rng(),
            "data_position": self._position,
            "loss": self._loss,
            "accumulators": {"loss_sum": self._loss_sum, "loss_count": self._loss_count, "epoch": self._epoch},
            "evaluated_step": self._evaluated_step,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state`; the batches handed in must start at its `data_position`."""
        parts = self._parts
        parts.model.load_state_dict(state["model_state_dict"])
        parts.optimizer.load_state_dict(state["optimizer_state_dict"])
        parts.schedule.load_state_dict(state["scheduler_state_dict"])
        if state["scaler_state_dict"]:  # empty where losses were not scaled, as before a fork to float16
            parts.scaler.load_state_dict(state["scaler_state_dict"])
        parts.formats.load_state_dict(state.get("precision_state_dict", {}))  # empty without FP8; older checkpoints have none
        self._set_rng(state["rng"])
        self.step = self._saved_step = state["step"]
        self.tokens_seen = state["tokens_seen"]
        self._evaluated_step = state["evaluated_step"]
        self._position = state["data_position"]
        self._loss = state["loss"]
        accumulators = state["accumulators"]
        self._loss_sum, self._loss_count, self._epoch = accumulators["loss_sum"], accumulators["loss_count"], accumulators["epoch"]

    def _rng(self) -> State:
        rng = {"cpu": torch.get_rng_state()}
        if self._parts.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self._parts.device)
        return rng

    def _set_rng(self, rng: State) -> None:
        torch.set_rng_state(rng["cpu"])
        if self._parts.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self._parts.device)

    def _update(self) -> bool:
        """One optimizer update; False if float16 gradients overflowed and the update was left out."""
        rng, formats = self._rng(), copy.deepcopy(self._parts.formats.state_dict())
        try:
            return self._try_update()
        except BdhError:
            self._set_rng(rng)  # what is saved now is the state before this update, whole
            self._parts.formats.load_state_dict(formats)
            raise

    def _try_update(self) -> bool:
        parts, config = self._parts, self._config
        started = time.perf_counter()
        parts.model.train()
        loss, tokens = 0.0, 0
        for _ in range(config.gradient_accumulation_steps):
            batch = next(parts.batches)
            idx, targets = self._split(batch.tokens)
            with parts.autocast():
                _, batch_loss = parts.model(idx, targets)
            parts.scaler.scale(batch_loss / config.gradient_accumulation_steps).backward()
            loss += batch_loss.item() / config.gradient_accumulation_steps
            tokens += targets.numel()
        parts.scaler.unscale_(parts.optimizer)
        limit = config.grad_clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(parts.model.parameters(), limit).item()
        self._guard(loss, grad_norm)
        self._position, self._epoch = batch.position, batch.epoch
        rate = parts.schedule.at(self.step)
        for group in parts.optimizer.param_groups:
            group["lr"] = rate
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        self.tokens_seen += tokens
        elapsed_s = time.perf_counter() - started
        self._step_s += elapsed_s
        self._new_steps += 1
        self._new_tokens += tokens
        if not _finite(grad_norm):
            return False
        self.step += 1
        self._loss, self._grad_norm = loss, grad_norm
        self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + 1
        parts.progress.advance(self.step, loss, tokens / elapsed_s)
        return True

    def _guard(self, loss: float, grad_norm: float) -> None:
        """Stop before numbers that are none reach the weights. Under loss scaling an overflow of gradients is let pass: it only skips."""
        scaler = self._parts.scaler
        scaled = scaler.is_enabled() and scaler.get_scale() >= SMALLEST_LOSS_SCALE
        if _finite(loss) and (_finite(grad_norm) or scaled):
            return
        self._parts.optimizer.zero_grad(set_to_none=True)
        what = f"gradient norm {grad_norm}" if _finite(loss) else f"loss {loss}"
        raise NonFiniteError(
            f"update {self.step + 1}: {what}; it was not applied. Weights of step {self.step} are good. "
            f"Lower training.learning_rate, set training.grad_clip or use compute_dtype: float32; training.debug: true finds the operation"
        )

    def _log(self) -> None:
        parts, step = self._parts, self.step
        tokens_per_s = self._new_tokens / max(self._step_s, 1e-9)
        values = {
            "train/loss": self._loss_sum / max(1, self._loss_count),
            "optim/lr": parts.optimizer.param_groups[0]["lr"],
            "optim/grad_norm": self._grad_norm,
            "perf/tokens_per_s": tokens_per_s,
            "perf/mfu_pct": 100 * tokens_per_s / parts.peak_tokens_per_s,
            "perf/step_ms": 1e3 * self._step_s / max(1, self._new_steps),
            "mem/peak_gib": peak_gib(parts.device),
            "progress/tokens_seen": self.tokens_seen,
            "progress/epoch": self._epoch,
        }
        if parts.scaler.is_enabled():
            values["optim/loss_scale"] = parts.scaler.get_scale()
        parts.tracker.metrics(values, step)
        parts.tracker.metrics({"by_tokens/train_loss": values["train/loss"]}, self.tokens_seen // 1000)
        parts.progress.point(values, step)
        if step % self._config.log_freq == 0:  # the point of an odd last step is extra: means go on as if it had not been asked for
            self._loss_sum, self._loss_count = 0.0, 0
            self._step_s, self._new_steps, self._new_tokens = 0.0, 0, 0

    def _evaluate(self) -> None:
        parts, step = self._parts, self.step
        if not parts.validation:
            return
        with parts.observed() as seen:
            val_loss = evaluate(parts.model, parts.validation, parts.autocast, parts.device, self._stopped)
        if val_loss is None:
            return
        values = {"val/loss": val_loss, "val/bpb": bits_per_byte(val_loss)}
        logged_at_ms = parts.tracker.metrics({**values, **seen}, step)
        self._evaluation, self._evaluated_step = Evaluation(step, val_loss, logged_at_ms), step
        parts.tracker.metrics({"by_tokens/val_loss": val_loss, "by_tokens/val_bpb": values["val/bpb"]}, self.tokens_seen // 1000)
        parts.progress.point(values, step)
        if step % self._config.test_freq == 0:
            parts.schedule.observe(val_loss)
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
        if self.step and self._saved_step != self.step:
            self._save()
        self._parts.saver.finish()

    def _stopped(self) -> bool:
        return self._parts.stop.received is not None

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.to(self._parts.device, non_blocking=True).long()
        return tokens[:, :-1], tokens[:, 1:]


def peak_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: of the device for CUDA, of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
