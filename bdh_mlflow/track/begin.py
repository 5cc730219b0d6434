"""How a run begins: what can be refused is refused, then the store is asked, then the run is there."""

import contextlib
import dataclasses
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bdh_mlflow import checkpoint, host, redact
from bdh_mlflow.checkpoint import RunDirectory, Snapshot, SnapshotOrigin
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError, ResumeError
from bdh_mlflow.track import endings
from bdh_mlflow.track.open import Parts
from bdh_mlflow.track.settings import Settings, flat, settings_of
from bdh_mlflow.track.signals import HeldSignals
from bdh_mlflow.track.tracked import Run
from bdh_mlflow.tracking import journal, system_metrics
from bdh_mlflow.tracking.beginning import began_s, next_segment, program_tags, user_name
from bdh_mlflow.tracking.locate import Locator
from bdh_mlflow.tracking.records import Segment
from bdh_mlflow.tracking.resolved import run_of
from bdh_mlflow.tracking.sender_process import prepared, probe_by
from bdh_mlflow.tracking.status import StoreStatus
from bdh_mlflow.tracking.system_metrics import SystemMetrics
from bdh_mlflow.tracking.tracker import ATTACH_S, MakeSender, Tracker

WRAPPER = "MLFLOW_RUN_ID"
_BARE_RUN = re.compile(r"(?:runs:/+)?([0-9a-f]{32})/?")
_wrappers_taken: set[str] = set()
"""Runs that `mlflow run` made for this process and a run of it has: the next one is another."""


@dataclass(frozen=True)
class Origin:
    """What a run goes on from.

    snapshot: None where its program has the checkpoint elsewhere.   folder: of the run here, if there is one; else found by `run_dir`, the
    name of its run directory.   run_id: its MLflow run, if it is known.   step: updates completed.
    """

    snapshot: Snapshot | None = None
    folder: Path | None = None
    run_id: str | None = None
    step: int = 0
    run_dir: str | None = None

    def placed(self, checkpoint_dir: Path) -> "Origin":
        """The same with the run's folder, if it is here."""
        if self.folder is not None or self.run_dir is None:
            return self
        here = checkpoint_dir / Path(self.run_dir).name
        done = journal.delivered(here)
        return dataclasses.replace(self, folder=here if done else None, run_id=self.run_id or (done.run_id if done else None))


def say(text: str) -> None:
    """A line for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


def run(
    settings: Settings | str | None = None,
    *,
    params: Mapping[str, object] | None = None,
    resume: str | Path | None = None,
    note: endings.Say = say,
) -> Run:
    """Begin a run, or go on with one.

    settings: or the name of the experiment alone.   params: settings of the program, logged once; mappings are flattened with dots.
    resume: a checkpoint of a run, which goes on in the same MLflow run and run directory: latest, a path, a run id, runs:/RUN_ID or an
    artifact URI, RUN:N for its step N; of a run without checkpoints its id. See `Run.resumed_from`.   note: called with lines for the user.

    Under `mlflow run` the first run of the process is the one that MLflow has made for it. Takes two to three seconds, in which the process
    that sends gets ready; a server that does not answer is waited for 5 s, and then the run begins without it.

    Raises InputError for what cannot be meant, ResumeError and CheckpointError for a target, TrackingError where the store refuses the run.
    """
    return begin(settings_of(settings), flat(params or {}), resume, note)


def begin(
    settings: Settings,
    params: Mapping[str, object],
    resume: str | Path | Origin | None,
    note: endings.Say,
    make_sender: MakeSender | None = None,
) -> Run:
    """The same.   resume: also a run by what is known of it.   make_sender: starts the sender, one in a process of its own if not given."""
    folder = Path(settings.folder).absolute()
    if reason := checkpoint.why_unwritable(folder):
        raise InputError(f"track.Settings: folder: {folder} cannot be created or written: {reason}")
    wrapper = os.environ.get(WRAPPER)
    free = wrapper if wrapper not in _wrappers_taken else None
    with contextlib.ExitStack() as stack:
        if make_sender is None:
            make_sender = stack.enter_context(prepared(() if free == wrapper else (WRAPPER,)))
        origin = Origin() if resume is None else resume
        if not isinstance(origin, Origin):
            origin = _origin(str(origin), folder, settings.config(), note)
        origin = origin.placed(folder)
        status = probe_by(make_sender, settings.config(), origin.run_id)
        held = HeldSignals() if settings.signals else None
        if held is not None:
            stack.callback(held.release)
        directory = _directory(origin, folder)
        stack.callback(directory.close)
        begun = Run(_begun(settings, directory, origin, _Store(status, free, make_sender, held), note))
        stack.pop_all()
    if free is not None:
        _wrappers_taken.add(free)
    begun.params(params)
    return begun


@dataclass(frozen=True)
class _Store:
    """Where the run goes.   wrapper: run that `mlflow run` has made for it.   held: see `Parts`."""

    status: StoreStatus
    wrapper: str | None
    make_sender: MakeSender
    held: HeldSignals | None


def snapshot_of(locator: Locator, target: str, note: endings.Say) -> tuple[Snapshot, str | None]:
    """The snapshot that a target names, and the MLflow run if the target names one.   Raises ResumeError or CheckpointError."""
    located = locator.locate(target)
    for line in located.notes:
        note(line)
    assert isinstance(located.found, Snapshot), "the kind that was looked for"
    return located.found, located.named_run


def _origin(target: str, folder: Path, config: TrackingConfig, note: endings.Say) -> Origin:
    locator = Locator(folder, config, (Snapshot,))
    try:
        snapshot, named_run = snapshot_of(locator, target, note)
    except ResumeError:
        bare = _BARE_RUN.fullmatch(target.strip())
        if not bare or locator.mirror.training(bare[1]).run_dir is not None:
            raise
        run_id = locator.mirror.training(bare[1]).run_id  # it saved nothing
        here = [f for f in checkpoint.pending(folder) if (done := journal.delivered(f)) and done.run_id == run_id]
        return Origin(None, here[0] if here else None, run_id)
    where = snapshot.path.absolute().parent
    if where.name != snapshot.manifest.run_dir:  # a copy elsewhere
        where = folder / snapshot.manifest.run_dir
    return Origin(snapshot, where, named_run or run_of(snapshot), snapshot.manifest.step)


def _directory(origin: Origin, folder: Path) -> RunDirectory:
    if origin.folder is None:
        return RunDirectory.new(folder, {}, datetime.now())
    waits = origin.folder.parent.name == checkpoint.PENDING
    return RunDirectory.begun(origin.folder, {}) if waits else RunDirectory(origin.folder, {})


def _begun(settings: Settings, directory: RunDirectory, origin: Origin, place: _Store, note: endings.Say) -> Parts:
    status = place.status
    with journal.reading(directory.folder) as reader:
        earlier = reader.index.segments if reader else []
    segment = _segment(settings, origin, place, earlier)
    with _refused_cleanly(directory) as made:
        tracker = Tracker(lambda: directory.folder, status.tracking_uri, segment, note, place.make_sender)
        made.append(tracker)
        source = host.source_state(Path.cwd())  # this and the next while the sender makes the run
        sampled = settings.system_metrics and not system_metrics.why_unavailable()
        monitors = system_metrics.load_monitors() if sampled else None
        tracker.wait(ATTACH_S if status.reachable else 0)
    parts = Parts(
        settings=settings,
        directory=directory,
        tracker=tracker,
        origin=SnapshotOrigin(segment.number, source.commit, source.dirty, host.versions(), settings.best, settings.higher_is_better),
        resumed=origin.snapshot,
        first_step=origin.step,
        likely_run=origin.run_id or place.wrapper,
        held=place.held,
        system_metrics=SystemMetrics(tracker.metrics, began_s([*earlier, segment][0], status), monitors=monitors) if sampled else None,
        note=note,
    )
    _introduce(tracker, settings, origin, source)
    note(_first_line(tracker, status, origin))
    return parts


@contextlib.contextmanager
def _refused_cleanly(directory: RunDirectory) -> Iterator[list[Tracker]]:
    """A run that does not begin leaves nothing behind.   Yields where the tracker is put as soon as there is one."""
    made: list[Tracker] = []
    try:
        yield made
    except BaseException as error:
        ending = endings.of(error)
        for tracker in made:
            tracker.close(ending.status, ending.tags(0), None)
        directory.discard()
        raise


def _segment(settings: Settings, origin: Origin, place: _Store, earlier: list[Segment]) -> Segment:
    status = place.status
    number, training = next_segment(status, earlier, origin.snapshot.manifest.segment if origin.snapshot else 0)
    return Segment(
        number=number,
        training=training,
        continues=origin.run_id,
        wrapper=place.wrapper,
        experiment=settings.config().experiment,
        run_name=settings.name,
        user=user_name(),
        tracking_uri=redact.masked(status.tracking_uri),
        mirror=settings.mirror,
        keep=settings.keep,
        audit=[],  # whether a replayed step gives the same numbers is for its program to say
        host=platform.node(),
        pid=os.getpid(),
        device="",
        versions=host.versions(),
        started_at_ms=int(time.time() * 1000),
        first_step=origin.step,
        source=_program(),
    )


def _program() -> str:
    """The script that runs, as MLflow names the source of a run."""
    return sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-c", "-m") else Path(sys.executable).name


def _introduce(tracker: Tracker, settings: Settings, origin: Origin, source: host.SourceState) -> None:
    """Record what is known of the run before its first step."""
    tags = {**settings.tags, **program_tags(source.commit, source.dirty), "bdh.host": platform.node()}
    if origin.snapshot is not None:
        manifest = origin.snapshot.manifest
        tags["bdh.resumed_from"] = f"runs:/{origin.run_id}/{manifest.artifact_path}" if origin.run_id else str(origin.snapshot.path)
    tracker.tags(tags)
    tracker.text(host.environment(), "environment.txt")


def _first_line(tracker: Tracker, status: StoreStatus, origin: Origin) -> str:
    identity = tracker.identity
    if identity is None:
        uri = redact.masked(status.tracking_uri)
        return f"track: {uri} {'has not named the run yet' if status.reachable else 'does not answer'}; everything is kept until it does"
    goes_on = f", goes on from step {origin.step:,}" if identity.continued else ""
    return f"track: run {identity.name} ({identity.run_id}) in experiment {identity.experiment}{goes_on}: {identity.page}"
