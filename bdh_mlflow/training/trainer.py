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
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.distributed import Report
from bdh_mlflow.errors import InputError, NonFiniteError, SaveError, StoppedError
from bdh_mlflow.files import first_line
from bdh_mlflow.text import Evaluation, Sample, bits_per_byte
from bdh_mlflow.training.evaluate import Evaluator
from bdh_mlflow.training.interval import Interval
from bdh_mlflow.training.parts import Ending, Parts, State
from bdh_mlflow.training.passes import Passes

REMEDY = "Lower training.learning_rate, set training.grad_clip or use compute_dtype: float32; training.debug: true finds the operation"
SMALLEST_LOSS_SCALE = 1.0  # below this float16 gradients overflow without scaling: the run has diverged


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
        self._grad_norm = self._peak_gib = 0.0
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

    def save_start(self) -> Ending:
        """Evaluate and save the weights as they were handed in, before any update."""
        with self._parts.world.failing():
            self._evaluate()
            self._save()
            self._parts.saver.finish()
        return Ending("finished", self.step, self._evaluation, self._samples)

    def _train(self) -> None:
        config, analyze = self._config, self._parts.analyze
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
            if analyze is not None:
                analyze(self.step)

    def _stop_agreed(self) -> bool:
        """Whether any process was asked to stop; all find the same."""
        stop = self._parts.stop
        asked = [int(report.stop) for report in self._parts.world.exchange(Report(stop=stop.number)) if report.stop]
        if asked:
            stop.agree(asked[0])
        return bool(asked)

    def state_dict(self) -> State:
        """Everything that the next update depends on."""
        parts, (model_state, optimizer_state) = self._parts, self._parts.strategy.state()
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "model_state_dict": model_state,
            "optimizer_state_dict": optimizer_state,
            "scheduler_state_dict": parts.schedule.state_dict(),
            "scaler_state_dict": parts.scaler.state_dict(),
            "precision_state_dict": parts.formats.state_dict(),
            **{key: part.state_dict() for key, part in parts.extras()},
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
        for key, part in parts.extras():
            part.load_state_dict(state.get(key, {}))  # empty where it is used from here on, by a fork
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
        norm = parts.clip()
        *numbers, grad_norm = torch.cat([*done.summed, norm.unsqueeze(0)]).tolist()  # the loop waits for the device here, once an update
        passes, loss = self._config.gradient_accumulation_steps, 0.0
        for value in numbers[:passes]:  # sum() of Python 3.12 compensates rounding: logged losses would depend on its version
            loss += value / passes
        origin = [parts.world.name(rank) for rank, each in enumerate(numbers[passes:]) if not math.isfinite(each)]
        _guard(parts, self.step, (loss, grad_norm), origin)
        self._consistent = False
        self._position, self._interval.epoch = done.batch.position, done.batch.epoch
        if parts.carry is not None:
            parts.carry.commit()
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
            if parts.average is not None:
                parts.average.update(self.step)
        self._consistent = True
        return tokens / elapsed_s if applied else None

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
        if (values := _measured(parts, self._stopped)) is None:
            return
        val_loss = values["val/loss"]
        if not math.isfinite(val_loss):
            self._consistent = False
            raise _diverged(step, val_loss, self._saved_step)
        logged_at_ms = parts.tracker.metrics(values, step)
        self._evaluation, self._evaluated_step = Evaluation(step, val_loss, logged_at_ms, parts.bytes_per_token), step
        _log_by_amount(parts, values, self.tokens_seen)
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
        self._consistent = self._consistent and self._parts.saves_despite and is_good
        try:
            self._save_once()
        except Exception as failed:  # of the disk, or of a device that is gone: what came first is what is told
            error.add_note(f"its state could not be saved: {first_line(failed)}")
            with contextlib.suppress(Exception):  # whoever watches may be what failed
                self._parts.progress.note(str(failed))

    def _stopped(self) -> bool:
        return self._parts.stop.received is not None


def _measured(parts: Parts, stopped: Callable[[], bool]) -> dict[str, float] | None:
    """Metrics of an evaluation, of the moving average of the weights too if there is one.

    None without validation text, and if it is asked to stop on the way.
    """
    if not parts.validation:
        return None

    evaluator = Evaluator(model=parts.model, autocast=parts.autocast, device=parts.device, stopped=stopped, world=parts.world)

    def loss_of(name: str) -> dict[str, float] | None:
        loss = evaluator.loss(parts.validation)
        return None if loss is None else {f"val/loss{name}": loss, f"val/bpb{name}": bits_per_byte(loss, parts.bytes_per_token)}

    with parts.strategy.whole():
        with parts.observed() as observed:
            values = loss_of("")
        streamed = _streamed(parts, evaluator) if values is not None else None
    if values is None or streamed is None:
        return None
    values |= streamed
    if parts.average is None:
        return {**values, **observed}
    with parts.average.in_place():
        averaged = loss_of("_ema")
    return averaged and {**values, **averaged, **observed}


def _streamed(parts: Parts, evaluator: Evaluator) -> dict[str, float] | None:
    """Losses on the same windows, each read for itself and with the state of those before; none where nothing is carried."""
    stream, carry = parts.stream, parts.carry
    if stream is None or carry is None:
        return {}
    alone = evaluator.loss(stream.windows)
    carried = None if alone is None else evaluator.carried_loss(stream.windows, carry.fresh(len(stream.windows[0])))
    if alone is None or carried is None:
        return None
    return {"val/loss_stream": alone, "val/loss_carried": carried, "val/bpb_carried": bits_per_byte(carried, stream.bytes_per_token)}


def _log_by_amount(parts: Parts, values: Mapping[str, float], tokens_seen: int) -> None:
    """The points of an evaluation once more, with thousands of tokens and of bytes of text for steps."""
    by_tokens = {"by_tokens/val_loss": values["val/loss"], "by_tokens/val_bpb": values["val/bpb"]}
    parts.tracker.metrics(by_tokens, tokens_seen // 1000)
    parts.tracker.metrics({"by_bytes/val_bpb": values["val/bpb"]}, int(tokens_seen * parts.bytes_per_token) // 1000)


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
        carry=parts.carry,
    )


def _guard(parts: Parts, step: int, numbers: tuple[float, float], origin: list[str]) -> None:
    """Stop before non-finite values reach the weights. Under loss scaling an overflow of gradients only skips the update.

    numbers: loss and gradient norm of the update after `step` others.   origin: the ranks whose gradients are not finite, of several.
    """
    loss, grad_norm = numbers
    finite_loss = math.isfinite(loss)
    if finite_loss and math.isfinite(grad_norm):
        return
    scaler = parts.scaler
    if finite_loss and scaler.is_enabled() and scaler.get_scale() >= SMALLEST_LOSS_SCALE:
        return
    raise _not_applied(step, loss, grad_norm, parts.model, origin)


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
