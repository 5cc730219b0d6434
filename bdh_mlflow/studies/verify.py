"""Proof that a configuration resumes exactly: train without and with interruptions, compare every bit.

The interrupted training ends in turn by a stop request, as SIGTERM makes one, and by a real SIGKILL of a child process, and resumes each
time from what is on disk. Both trainings run the whole program, with a tracking store of their own in a temporary folder. Compared are the
last checkpoints, part by part, and the curves as MLflow has them.
"""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from torch import Tensor

from bdh_mlflow import checkpoint
from bdh_mlflow.config import Config, resolve
from bdh_mlflow.errors import BdhError
from bdh_mlflow.tracking import tracker
from bdh_mlflow.tracking.sender import ThreadSender
from bdh_mlflow.training import processes, start
from bdh_mlflow.training.silent import Silent
from bdh_mlflow.training.stop import StopRequest

UNINTERRUPTED, INTERRUPTED = "uninterrupted", "interrupted"
PARTS = {
    "weights": "model_state_dict",
    "optimizer": "optimizer_state_dict",
    "scheduler": "scheduler_state_dict",
    "scaler": "scaler_state_dict",
    "number formats": "precision_state_dict",
    "average of the weights": "ema_state_dict",
    "carried state": "carried_state",
    "clipping": "zclip_state_dict",
    "data position": "data_position",
    "tokens seen": "tokens_seen",
    "metric accumulators": "accumulators",
    "last loss": "loss",
}
CURVES = (*tracker.REPLAYED, "val/bpb", "progress/tokens_seen", "progress/epoch", "resume/replay_max_abs_diff")

SAVE_S = 60.0  # longest wait for a checkpoint that is being written


@dataclass(frozen=True)
class Row:
    """One thing compared.   difference: empty if the two are equal to the bit."""

    what: str
    difference: str


@dataclass(frozen=True)
class Plan:
    """How a training is interrupted.   steps: of it.   interruptions: stops and kills.   sizes: numbers of processes, taken in turn by the
    segments of the interrupted training; the uninterrupted one is that of one process.
    """

    steps: int
    interruptions: int
    sizes: tuple[int, ...] = (1,)


def verify(config: Config, plan: Plan, folder: Path, note: Callable[[str], None]) -> list[Row]:
    """Train in `folder`, without and with interruptions, and compare.   Raises a BdhError if either cannot be trained."""
    steps, sizes = plan.steps, itertools.cycle(plan.sizes)
    with _own_store(folder) as uri, _same_threads(max(plan.sizes)):
        uninterrupted = _config(config, steps, folder / UNINTERRUPTED, uri, UNINTERRUPTED)
        note(f"{UNINTERRUPTED}: {steps} steps")
        _train(uninterrupted, 1, _Silent(), StopRequest())
        interrupted = _config(config, steps, folder / INTERRUPTED, uri, INTERRUPTED)
        for number, step in enumerate(interruption_steps(steps, plan.interruptions)):
            kill, size = number % 2 == 1, next(sizes)
            note(f"{INTERRUPTED}: {'SIGKILL' if kill else 'SIGTERM'} after step {step}{_by(size)}")
            (_kill_after if kill else _stop_after)(interrupted, size, step)
            interrupted = _resuming(interrupted)
        size = next(sizes)
        note(f"{INTERRUPTED}: to the end, step {steps}{_by(size)}")
        _train(interrupted, size, _Silent(), StopRequest())
        rows = list(_compare_states(*(_last_state(c, steps) for c in (uninterrupted, interrupted))))
        return [*rows, *_compare_curves(MlflowClient(uri))]


def interruption_steps(steps: int, interruptions: int) -> list[int]:
    """Steps after which to interrupt: evenly spread over the training, each once."""
    return sorted({max(1, min(steps - 1, (i + 1) * steps // (interruptions + 1))) for i in range(interruptions)})


def bitwise_difference(a: Any, b: Any, path: str = "") -> str:
    """The first difference between two nested states, in words; empty if they are equal to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{path}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        if torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)):
            return ""
        return f"{path}: values differ by up to {(a.double() - b.double()).abs().max().item():.3g}"
    if type(a) is not type(b):
        return f"{path}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return f"{path}: different keys"
        return next((d for key in a if (d := bitwise_difference(a[key], b[key], f"{path}/{key}"))), "")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)} items"
        return next((d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := bitwise_difference(x, y, f"{path}/{i}"))), "")
    return "" if a == b else f"{path}: {a!r} and {b!r}"


class _Silent(Silent):
    """Progress that is not shown.   then: called after step `after`."""

    def __init__(self, after: int = -1, then: Callable[[], None] = lambda: None) -> None:
        self._after, self._then = after, then

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        if step == self._after:
            self._then()


def _config(config: Config, steps: int, checkpoint_dir: Path, uri: str, experiment: str) -> Config:
    """The configuration for a short training, with logging, evaluation and saving often enough for a comparison."""
    config = resolve(config).config
    training = dataclasses.replace(
        config.training,
        max_iters=steps,
        log_freq=min(config.training.log_freq, max(1, steps // 8)),
        test_freq=min(config.training.test_freq, max(1, steps // 4)),
        checkpoint_freq=min(config.training.checkpoint_freq, max(1, steps // 5)),
        checkpoint_dir=str(checkpoint_dir),
        keep_checkpoints=None,
        resume_from_checkpoint=None,
    )
    own = dataclasses.replace(config.tracking, tracking_uri=uri, experiment=experiment, run_name=None, log_system_metrics=False)
    return dataclasses.replace(config, training=training, tracking=own)


def _train(config: Config, size: int, progress: Silent, stop: StopRequest) -> None:
    with processes.started(size) as world:
        start.train(config, progress, stop, make_sender=ThreadSender, world=world)


def _by(size: int) -> str:
    return f", {size} processes" if size > 1 else ""


def _stop_after(config: Config, size: int, step: int) -> None:
    stop = StopRequest()
    _train(config, size, _Silent(step, lambda: stop.handle(signal.SIGTERM, None)), stop)


def _kill_after(config: Config, size: int, step: int) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_train_until_killed, args=(config.to_dict(), size, step))
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        raise BdhError(f"the child process to be killed after step {step} ended with exit code {child.exitcode}")


def _train_until_killed(tree: dict[str, Any], size: int, step: int) -> None:
    config = Config.from_dict(tree)
    newest = (step - 1) // config.training.checkpoint_freq * config.training.checkpoint_freq

    def die() -> None:
        end = time.monotonic() + SAVE_S
        while newest and not _is_saved(config, newest) and time.monotonic() < end:
            time.sleep(0.01)  # checkpoints are written in the background; waiting makes every proof resume from the same one
        os.kill(os.getpid(), signal.SIGKILL)

    _train(config, size, _Silent(step, die), StopRequest())


def _is_saved(config: Config, step: int) -> bool:
    return any((d / f"checkpoint_{step}.json").is_file() for d in checkpoint.list_all(Path(config.training.checkpoint_dir)))


def _resuming(config: Config) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, resume_from_checkpoint="latest"))


def _last_state(config: Config, steps: int) -> dict[str, Any]:
    (run_dir,) = checkpoint.list_all(Path(config.training.checkpoint_dir))
    return checkpoint.load(run_dir / checkpoint.file_name(steps))


def _compare_states(uninterrupted: dict[str, Any], interrupted: dict[str, Any]) -> Iterator[Row]:
    for what, key in PARTS.items():
        yield Row(what, bitwise_difference(uninterrupted.get(key), interrupted.get(key)))


def _compare_curves(client: MlflowClient) -> Iterator[Row]:
    runs = []
    for name in (UNINTERRUPTED, INTERRUPTED):
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        runs.append(client.search_runs([experiment.experiment_id]))
    yield Row("MLflow runs", "" if [len(r) for r in runs] == [1, 1] else f"{len(runs[0])} and {len(runs[1])}")
    for key in CURVES:
        uninterrupted, interrupted = (sorted((m.step, m.value) for m in client.get_metric_history(r[0].info.run_id, key)) for r in runs)
        if key == "resume/replay_max_abs_diff":
            worst = max((value for _, value in interrupted), default=0.0)
            yield Row("replayed steps", f"differ by up to {worst:.3g}" if worst else "")
        else:
            yield Row(f"curve {key}", _curve_difference(uninterrupted, interrupted))


def _curve_difference(uninterrupted: list[tuple[int, float]], interrupted: list[tuple[int, float]]) -> str:
    if uninterrupted == interrupted:
        return ""
    steps, others = [s for s, _ in uninterrupted], [s for s, _ in interrupted]
    if steps != others:
        return f"points at steps {others}, uninterrupted at {steps}"
    step, a, b = next((s, a, b) for (s, a), (_, b) in zip(uninterrupted, interrupted, strict=True) if a != b)
    return f"step {step}: {a!r} and {b!r}"


@contextmanager
def _same_threads(size: int) -> Iterator[None]:
    """As many threads for each process, however many train together: a matrix product may round otherwise with another number of them."""
    given, before = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    threads = before if given else max(1, before // size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _own_store(folder: Path) -> Iterator[str]:
    """A tracking store in the folder; a run that `mlflow run` has made is not used."""
    uri = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    hidden = {name: os.environ.pop(name) for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID") if name in os.environ}
    try:
        client = MlflowClient(uri)
        for name in (UNINTERRUPTED, INTERRUPTED):
            client.create_experiment(name, artifact_location=(folder / "artifacts" / name).absolute().as_uri())
        yield uri
    finally:
        os.environ.update(hidden)
