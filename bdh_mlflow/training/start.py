"""From a configuration to a finished run, in the order of trust.

What can be refused is refused first: folder, checkpoint, configuration, data, one whole batch, the network (`build`). Then the store is
probed, and only then does a run begin. Its ending is logged, whatever happens (`report`).
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bdh_mlflow import checkpoint, host
from bdh_mlflow.checkpoint import BackgroundWriter, FileRecord, Provenance, RunDirectory
from bdh_mlflow.config import Config
from bdh_mlflow.distributed import ALONE, World
from bdh_mlflow.errors import ConfigError, SaveError, TrackingError
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.records import RunIdentity, Segment
from bdh_mlflow.tracking.sender_process import SubprocessSender, probe_by
from bdh_mlflow.tracking.status import StoreStatus
from bdh_mlflow.tracking.tracker import ATTACH_S, MakeSender, Tracker
from bdh_mlflow.training.build import Built, build, build_trainer
from bdh_mlflow.training.origin import Made, Settled, run_directory
from bdh_mlflow.training.parts import Ending, Progress
from bdh_mlflow.training.passes import peak_gib
from bdh_mlflow.training.report import FinalReport, headline, introduce, numerical_differences, report_ending, segment_of, system_metrics
from bdh_mlflow.training.saving import save_into
from bdh_mlflow.training.settle import settle, settle_made
from bdh_mlflow.training.stop import StopRequest


@dataclass(frozen=True)
class Outcome:
    """What a training run left behind.

    first_step: updates completed before it.   identity: None if the store has not answered yet.   run_dir: None if no checkpoint was saved.
    undelivered: records that wait for the store, in the journal of the folder `journal`.   processes: that trained together.
    """

    ending: Ending
    first_step: int
    identity: RunIdentity | None
    run_dir: Path | None
    peak_gib: float
    undelivered: int
    journal: Path | None
    experiment: str
    processes: int


def train(
    config: Config,
    progress: Progress,
    stop: StopRequest,
    *,
    fork: bool = False,
    make_sender: MakeSender = SubprocessSender,
    world: World = ALONE,
) -> Outcome:
    """Train as configured, to the end or a signal.   Raises a BdhError for whatever else ends it.

    fork: begin a new run from the checkpoint named by resume_from_checkpoint; settings may then differ from its own.   make_sender: starts
    the sender.   world: the processes that train together, this being rank 0; the others call `follower.follow`.
    """
    with world.failing():
        _refuse_unwritable(config)
        return _run(world.share(lambda: settle(config, progress, fork, world.size)), progress, stop, make_sender, world)


def save_start(config: Config, made: Made, progress: Progress, stop: StopRequest, make_sender: MakeSender = SubprocessSender) -> Outcome:
    """Begin a run with weights made of others: evaluated and saved at step 0, as configured, for a training to go on from.

    Raises a BdhError for whatever does not allow it.
    """
    _refuse_unwritable(config)
    return _run(settle_made(config, made, progress), progress, stop, make_sender, ALONE)


def _refuse_unwritable(config: Config) -> None:
    checkpoint_dir = Path(config.training.checkpoint_dir)
    if reason := checkpoint.why_unwritable(checkpoint_dir):
        raise ConfigError(f"training.checkpoint_dir: {checkpoint_dir} cannot be created or written: {reason}")


def _run(settled: Settled, progress: Progress, stop: StopRequest, make_sender: MakeSender, world: World) -> Outcome:
    built = build(settled, progress, world)
    status = probe_by(make_sender, built.config.tracking, built.origin.continues)
    stop.begun = True  # from here on there is a run to end properly
    run_dir = run_directory(built.origin, Path(built.config.training.checkpoint_dir), built.config, built.text.tokenizer)
    with contextlib.closing(run_dir):
        return _tracked(built, run_dir, status, progress, stop, make_sender)


def _tracked(
    built: Built, run_dir: RunDirectory, status: StoreStatus, progress: Progress, stop: StopRequest, make_sender: MakeSender
) -> Outcome:
    """Train as a run of MLflow, from its beginning to its ending."""
    with journal.reading(run_dir.folder) as reader:
        earlier = reader.index.segments if reader else []
    segment = segment_of(built, status, earlier)
    for note in numerical_differences(earlier, segment):
        progress.note(note)
    try:
        tracker = Tracker(lambda: run_dir.folder, status.tracking_uri, segment, progress.note, make_sender)
    except BaseException:
        run_dir.discard()
        raise
    with report_ending(tracker, stop, run_dir) as report:
        source = host.source_state(Path(__file__).parent)  # this and the next while the sender makes the run
        host.environment()  # kept for `introduce`
        _attach(tracker, status, report)
        provenance = _introduced(tracker, built, segment, source)
        progress.note(headline(built, tracker.identity, status, segment.number))
        save = save_into(run_dir, tracker, provenance, built.config, segment.continues or segment.wrapper, progress.note)
        writer = BackgroundWriter(save)
        trainer = build_trainer(built, writer, tracker, progress, stop)
        report.step = lambda: trainer.step
        with (
            system_metrics(built, tracker, [*earlier, segment][0], status, progress.note),
            torch.autograd.set_detect_anomaly(True) if built.config.training.debug else contextlib.nullcontext(),
            _finished(writer, progress),
        ):
            built.world.expect_updates()
            host.loaded()
            report.ending = trainer.save_start() if built.origin.made else trainer.run()
    return _outcome(built, tracker, run_dir, report)


def _attach(tracker: Tracker, status: StoreStatus, report: FinalReport) -> None:
    """Wait for the run where the store answers.   Raises TrackingError if it refuses the run."""
    try:
        tracker.wait(ATTACH_S if status.reachable else 0)
    except TrackingError:
        report.refused = True
        raise


def _introduced(tracker: Tracker, built: Built, segment: Segment, source: host.SourceState) -> Provenance:
    """Record what is known of the run before its first step.   Returns what its manifests say of where it comes from."""
    digests, tokenizer = (built.config.digest(), built.text.digest), built.text.tokenizer
    beside = None
    if tokenizer.content is not None and tokenizer.file_name is not None:
        beside = FileRecord(tokenizer.file_name, len(tokenizer.content), hashlib.sha256(tokenizer.content).hexdigest())
    provenance = Provenance(None, segment.number, source.commit, source.dirty, *digests, host.versions(), beside)
    introduce(tracker, built, segment, provenance, source.patch)
    return provenance


def _outcome(built: Built, tracker: Tracker, run_dir: RunDirectory, report: FinalReport) -> Outcome:
    assert report.ending is not None, "without an ending an error was raised"
    return Outcome(
        ending=report.ending,
        first_step=built.origin.state["step"] if built.origin.state else 0,
        identity=tracker.identity,
        run_dir=run_dir.path if run_dir.made else None,
        peak_gib=peak_gib(built.device),
        undelivered=report.undelivered,
        journal=run_dir.folder if report.undelivered else None,
        experiment=built.config.tracking.experiment,
        processes=built.world.size,
    )


@contextlib.contextmanager
def _finished(writer: BackgroundWriter, progress: Progress) -> Iterator[None]:
    """Whatever ends the body, no write is cut off, and a failure is reported."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what ended the body is what is told; whoever watches may be what failed
            try:
                writer.finish()
            except SaveError as error:
                progress.note(str(error))
        raise
    writer.finish()
