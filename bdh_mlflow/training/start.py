"""From a configuration to the first step: fresh, resumed or warm-started; every part is built here and handed to the trainer.

The order is that of trust: what can be refused is refused first (configuration, folder, checkpoint, data, one whole batch), and only
then is an MLflow run begun. Afterwards the run is told how it ended, whatever happened.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdh_mlflow import checkpoint, host
from bdh_mlflow.checkpoint import BackgroundWriter, Provenance, RunDirectory
from bdh_mlflow.config import Config, resolve
from bdh_mlflow.errors import ConfigError, SaveError, TrackingError
from bdh_mlflow.model import bdh, precision
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.text import Evaluation
from bdh_mlflow.tracking import (
    journal,
    store,
    system_metrics,
)
from bdh_mlflow.tracking.records import RunIdentity
from bdh_mlflow.tracking.tracker import ATTACH_S, Tracker
from bdh_mlflow.training import optim
from bdh_mlflow.training.build import build_batches, build_network, build_sampler, open_text, shown
from bdh_mlflow.training.origin import find_origin, load_warm, position_of, run_directory
from bdh_mlflow.training.report import headline, introduce, segment_of, versions
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.trainer import Ending, Parts, Progress, Trainer, peak_gib


@dataclass(frozen=True)
class Outcome:
    """What a training left behind.

    identity: None if the store has not answered yet.   run_dir: None if no checkpoint was saved.   undelivered: records that wait for the
    store, in the journal of the folder `journal`.
    """

    ending: Ending
    identity: RunIdentity | None
    run_dir: Path | None
    peak_gib: float
    undelivered: int
    journal: Path | None
    experiment: str


def train(config: Config, progress: Progress, stop: StopRequest, *, fork: bool = False) -> Outcome:
    """Train as configured, to the end or a signal.   Raises a BdhError for whatever else ends it.

    fork: begin a new run from the checkpoint named by resume_from_checkpoint; settings may then differ from its own.
    """
    device = precision.pick_device()
    checkpoint_dir = Path(config.training.checkpoint_dir)
    if reason := checkpoint.why_unwritable(checkpoint_dir):
        raise ConfigError(f"training.checkpoint_dir: {checkpoint_dir} cannot be created or written: {reason}")
    machine = precision.machine(device)
    origin = find_origin(config, checkpoint_dir, machine, progress, fork)
    config, why = resolve(config, machine, origin.saved if origin.kind == "resumed" else None)
    runs = Precision.from_config(config, device)
    peak = precision.gemm_peak(runs.dtype, device)
    text = open_text(config, progress)
    batches = build_batches(config, text, position_of(origin, config, text, progress), device)
    validation = text.validation_batches(config.training.test_iters, config.training.batch_size, config.training.block_size)

    torch.manual_seed(config.training.seed)
    network, optimizer, facts = build_network(config, why, runs, device)
    if origin.kind == "warm":
        load_warm(network, origin)

    door = store.probe_store(config.tracking, origin.run_id if origin.kind == "resumed" else None)
    stop.begun = True  # from here on there is a run to end properly
    commit, dirty, patch = host.source_state(Path(__file__).parent)
    run_dir = run_directory(origin, checkpoint_dir, config)
    with contextlib.closing(run_dir):
        segment = segment_of(config, origin, door, run_dir.folder, facts["bdh.device"])
        try:
            tracker = Tracker(lambda: run_dir.folder, door.tracking_uri, segment, progress.note)
        except BaseException:
            run_dir.discard()
            raise
        provenance = Provenance(None, segment["number"], commit, dirty, config.digest(), text.digest, versions())
        with report_ending(tracker, stop, run_dir) as told:
            try:
                tracker.wait(ATTACH_S if door.reachable else 0)
            except TrackingError:
                told.refused = True
                raise
            introduce(tracker, config, text, facts, provenance, patch, origin)
            progress.note(headline(config, text, facts, tracker, door, origin, segment["number"]))
            writer = BackgroundWriter(
                _save_into(run_dir, tracker, provenance, config, segment["continues"] or segment["wrapper"], progress.note)
            )
            parts = Parts(
                model=network,
                optimizer=optimizer,
                schedule=optim.LearningRate(config.training.learning_rate, config.scheduler),
                scaler=runs.scaler(),
                autocast=runs.autocast,
                formats=runs,
                device=device,
                batches=shown(batches, progress) if config.training.debug else batches,
                validation=validation,
                samples=build_sampler(network, validation, config.training.seed, device),
                observed=network.observed,
                peak_tokens_per_s=peak / bdh.useful_flops(network.config, config.training.block_size),
                saver=writer,
                tracker=tracker,
                progress=progress,
                stop=stop,
            )
            trainer = Trainer(parts, config.training)
            told.step = lambda: trainer.step
            if origin.state is not None:
                trainer.load_state_dict(origin.state)
                for group in optimizer.param_groups:  # a fork may decay otherwise than the state it was loaded from
                    group["weight_decay"] = config.training.weight_decay
            with (
                _system_metrics(config, tracker, run_dir.folder, door, progress.note),
                _anomalies(config.training.debug),
                _finished(writer, progress),
            ):
                told.ending = trainer.run()
        assert told.ending is not None, "without an ending an error was raised"
        identity = tracker.identity
        made = run_dir.path if run_dir.made else None
        left = run_dir.folder if told.undelivered else None
    return Outcome(told.ending, identity, made, peak_gib(device), told.undelivered, left, config.tracking.experiment)


@dataclass
class FinalReport:
    """What the run was told at its end."""

    ending: Ending | None = None
    undelivered: int = 0
    refused: bool = False
    step: Callable[[], int] | None = None


@contextlib.contextmanager
def report_ending(tracker: Tracker, stop: StopRequest, run_dir: RunDirectory) -> Iterator[FinalReport]:
    """However the body ends, the run is told how. What then has nothing to tell any more leaves no trace."""
    told = FinalReport()
    status, tags = "FAILED", {}
    try:
        yield told
        assert told.ending is not None
        status = "FINISHED" if told.ending.reason == "finished" else "KILLED"
        tags = {"bdh.stop_reason": told.ending.reason, "bdh.stop_step": str(told.ending.step)}
    except BaseException as error:
        killed = stop.received or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        reason = killed.name if killed and status == "KILLED" else type(error).__name__
        tags = {"bdh.stop_reason": reason, "bdh.stop_message": str(error)[:500] or reason}
        raise
    finally:
        told.undelivered = tracker.close(status, tags, told.step() if told.step else None)
        if not told.undelivered or told.refused:
            run_dir.discard()


@contextlib.contextmanager
def _finished(writer: BackgroundWriter, progress: Progress) -> Iterator[None]:
    """Whatever ends the body, no write is cut off, and none fails unheard."""
    try:
        yield
    except BaseException:
        try:
            writer.finish()
        except SaveError as error:
            progress.note(str(error))
        raise
    writer.finish()


def _save_into(
    run_dir: RunDirectory, tracker: Tracker, provenance: Provenance, config: Config, likely_run: str | None, note: Callable[[str], None]
) -> Callable[[dict[str, Any], Evaluation | None, checkpoint.Throttle], None]:
    """How a state becomes a checkpoint: journal first, so that who resumes from it finds every point up to it."""

    def save(contents: dict[str, Any], evaluation: Evaluation | None, throttle: checkpoint.Throttle) -> None:
        started = time.perf_counter()
        run_dir.make()
        try:
            tracker.sync()
        except OSError as error:
            raise SaveError(f"{run_dir.path}: the journal cannot be written: {error}") from error
        run_id = tracker.identity.run_id if tracker.identity else likely_run
        whole = {**contents, "config": config.to_dict()}
        saved = run_dir.save(whole, dataclasses.replace(provenance, mlflow_run_id=run_id), evaluation, throttle)
        tracker.metrics({"ckpt/save_s": time.perf_counter() - started}, saved.manifest.step)
        tracker.checkpoint(saved.path, evaluation)
        try:
            for old in checkpoint.expired(run_dir.path, config.training.keep_checkpoints, saved.manifest.step):
                checkpoint.remove(old)
        except OSError as error:  # pruning is a convenience
            note(f"{run_dir.path}: old checkpoints cannot be removed: {error}")

    return save


@contextlib.contextmanager
def _system_metrics(config: Config, tracker: Tracker, folder: Path, door: store.StoreStatus, note: Callable[[str], None]) -> Iterator[None]:
    if not config.tracking.log_system_metrics:
        yield
        return
    if missing := system_metrics.why_unavailable():
        note(f"no system metrics: {missing}")
        yield
        return
    first = next((r.fields["started_at_ms"] for r in journal.read(folder) if r.kind == "segment"), None)
    if door.run is not None:
        first = min(first or door.run.info.start_time, door.run.info.start_time)
    samples = system_metrics.SystemMetrics(tracker.metrics, (first or 1000 * time.time()) / 1000)
    try:
        yield
    finally:
        samples.close()


@contextlib.contextmanager
def _anomalies(wanted: bool) -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(True) if wanted else contextlib.nullcontext():
        yield
