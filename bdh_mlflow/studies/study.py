"""The Optuna study of a sweep: where it is kept, which of its trials count, and which a process that is gone has left.

A study is a journal file under the checkpoint directory, for the processes of one machine, or in a database, for any number of machines.
Any number of processes work on it, each on one trial at a time, and none is told of the others: what counts follows from the list of
trials alone. New trials count up to the wanted number, in the order of their numbers; an interrupted trial counts as the first one that
continues it. What comes beyond that, from two processes that began at once, is called surplus and counts nowhere.
"""

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from bdh_mlflow import files
from bdh_mlflow.errors import InputError, TrackingError
from bdh_mlflow.files import first_line, reason_of, try_lock
from bdh_mlflow.redact import masked
from bdh_mlflow.studies.space import Space
from bdh_mlflow.tracking import store

JOURNAL = "study.log"
REPLACES = "replaces"  # attribute of a trial that continues an interrupted one: the number of that one
REASON = "failed"  # attribute of a trial that has failed by itself: why
INTERRUPTED = "interrupted"  # of one whose process was stopped or is gone
SURPLUS = "surplus"
STARTUP_TRIALS = 4  # drawn at random, and none pruned, before sampler and pruner have something to go by
HEARTBEAT_S, GRACE_S = 10, 60
"""How often a process that trains a trial of a database says so, and after how long without a word it is taken for dead."""
PATIENCE_S, FIRST_PAUSE_S, LAST_PAUSE_S = 900.0, 0.5, 10.0
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

T = TypeVar("T")
Note = Callable[[str], None]


class Workers(Protocol):
    """Tells whether the process that trains a trial is alive.   storage: of the study.   wordless: a trial that has failed for no stated
    reason was interrupted.
    """

    @property
    def storage(self) -> BaseStorage: ...  # noqa: D102

    @property
    def wordless(self) -> bool: ...  # noqa: D102

    def holding(self, number: int, lost: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """In the body this process trains the trial.   lost: called when another one has taken it up, as this one seemed to be dead."""

    def fail_left(self, study: optuna.Study) -> None:
        """Call trials failed whose process is gone."""


@dataclass(frozen=True)
class FileWorkers:
    """Processes of one machine: each locks a file while it trains a trial. Where files cannot be locked nobody is taken for alive."""

    folder: Path
    storage: JournalStorage
    wordless = False  # versions up to 0.2.0 gave no reasons

    @contextlib.contextmanager
    def holding(self, number: int, lost: Callable[[], None]) -> Iterator[None]:
        """See `Workers`."""
        file = os.open(self._file(number), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try_lock(file, wait_s=5)
            yield
        finally:
            os.close(file)
            self._file(number).unlink(missing_ok=True)

    def fail_left(self, study: optuna.Study) -> None:
        """See `Workers`."""
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            try:
                file = os.open(self._file(trial.number), os.O_RDWR)
            except OSError:
                alive = False
            else:
                alive = try_lock(file) is False
                os.close(file)
            if not alive:
                interrupt(study, self, trial.number)

    def _file(self, number: int) -> Path:
        return self.folder / f"trial_{number}.lock"


@dataclass(frozen=True)
class DatabaseWorkers:
    """Processes anywhere: each tells the database of itself, by the clock of the database."""

    storage: RDBStorage
    study: str
    wordless = True

    @contextlib.contextmanager
    def holding(self, number: int, lost: Callable[[], None]) -> Iterator[None]:
        """See `Workers`."""
        trial_id = _id_of(self.storage, self.study, number)
        self.storage.record_heartbeat(trial_id)
        over = threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT_S):
                with contextlib.suppress(Exception):  # a database that does not answer; it may come back
                    if self.storage.get_trial(trial_id).state is not TrialState.RUNNING:
                        lost()
                        return
                    self.storage.record_heartbeat(trial_id)

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def fail_left(self, study: optuna.Study) -> None:
        """See `Workers`."""
        with _quiet():
            optuna.storages.fail_stale_trials(study)


@dataclass(frozen=True)
class Kept:
    """A study and where it is.   place: as a message shows it.   created: whether this process has made it."""

    study: optuna.Study
    workers: Workers
    place: str
    created: bool


@contextlib.contextmanager
def opened(space: Space, folder: Path, note: Note) -> Iterator[Kept]:
    """The study, new or from earlier calls.   folder: of this machine's files.   Raises InputError if it searches another space."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _present(folder) as alone:
        if space.storage is not None:
            kept = _in_database(space, space.storage)
        else:
            file = folder / JOURNAL
            if alone:
                (folder / f"{JOURNAL}.lock").unlink(missing_ok=True)  # of optuna's, which a kill has left, would be waited for
                _mend(file, note)
            kept = _in_journal(space, file, folder)
        known = len(kept.study.get_trials(deepcopy=False))
        kept.study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
        searched = json.dumps(space.model_dump(exclude={"storage"}), sort_keys=True)
        if json.loads(kept.study.user_attrs.get("space", searched)) != json.loads(searched):
            raise InputError(
                f"study {space.study}: {kept.place} holds one with another space; give this one another name, or remove that one"
            )
        kept.study.set_user_attr("space", searched)
        if known:
            note(f"study {space.study} continues after {known} trials")
        yield kept


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count, by number: of an interrupted one the last that continues it."""
    trials = study.get_trials(deepcopy=False)
    names = places(trials)
    last = {names[t.number]: t for t in trials if t.number in names}
    return [last[place] for place in sorted(last)]


def places(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """By which number a user knows each trial that counts: its place among the new ones, which one that continues it keeps."""
    known: dict[int, int] = {}
    for trial in trials:
        before = trial.user_attrs.get(REPLACES)
        if SURPLUS in trial.user_attrs or (before is not None and before not in known):
            continue
        known[trial.number] = len(set(known.values())) if before is None else known[before]
    return known


def is_surplus(study: optuna.Study, number: int, wanted: int) -> bool:
    """Whether a trial is one too many: an earlier one continues the same, or there are `wanted` new ones before it."""
    trials = {t.number: t for t in study.get_trials(deepcopy=False) if SURPLUS not in t.user_attrs}
    own = trials[number].user_attrs
    if REPLACES in own:
        return any(t.user_attrs.get(REPLACES) == own[REPLACES] for other, t in trials.items() if other < number)
    return sum(REPLACES not in t.user_attrs for other, t in trials.items() if other < number) >= wanted


def requeue_left(study: optuna.Study, workers: Workers, note: Note) -> None:
    """Queue each trial again whose process is gone, with its settings, its evaluations and the folder of its checkpoints."""
    workers.fail_left(study)
    trials = study.get_trials(deepcopy=False)
    replaced = {t.user_attrs.get(REPLACES) for t in trials if SURPLUS not in t.user_attrs}
    for trial in trials:
        own = trial.user_attrs
        left = INTERRUPTED in own or (workers.wordless and REASON not in own)
        if trial.state is not TrialState.FAIL or not left or SURPLUS in own or trial.number in replaced:
            continue
        attributes = {
            REPLACES: trial.number,
            "folder": own.get("folder"),
            "seen": {str(step): value for step, value in trial.intermediate_values.items()},
        }
        study.enqueue_trial(trial.params, user_attrs=attributes)
        note(f"trial {places(trials).get(trial.number, trial.number)} was interrupted; it is queued again")


def interrupt(study: optuna.Study, workers: Workers, number: int) -> None:
    """End a trial such that it is queued again."""
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process was quicker
        workers.storage.set_trial_user_attr(_id_of(workers.storage, study.study_name, number), INTERRUPTED, True)
    study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _id_of(storage: BaseStorage, study: str, number: int) -> int:
    return int(storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study), number))


def ask(study: optuna.Study, seed: int) -> tuple[optuna.Trial, int]:
    """The next trial, a queued one first, and its place. What is drawn for it depends on that, not on which process draws."""
    with _quiet():  # optuna warns that heartbeats are for its own loop
        trial = study.ask()
        place = places(study.get_trials(deepcopy=False))[trial.number]
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=(seed + place) % 2**32, constant_liar=True)
    return trial, place


def patiently(act: Callable[[], T], note: Note, patience_s: float = PATIENCE_S) -> T:
    """What `act` gives, repeated while the study's database does not answer, which is said once.   Raises TrackingError after that time."""
    try:
        return files.patiently(act, is_outage, files.Outage("the study's database", note), patience_s, (FIRST_PAUSE_S, LAST_PAUSE_S))
    except files.NoAnswerError as error:
        raise TrackingError(f"the study's database does not answer: {error}") from error.__cause__


def is_outage(error: Exception) -> bool:
    """Whether an error is the database's, which may come back; optuna 5.0.0 hides some behind an UnboundLocalError of its own."""
    import sqlalchemy.exc

    kinds = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, optuna.exceptions.StorageInternalError, UnboundLocalError)
    return isinstance(error, kinds)


@contextlib.contextmanager
def _present(folder: Path) -> Iterator[bool]:
    """Yields whether no other process of this machine works on the study. Raises InputError if the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {reason_of(error)}") from None
    try:
        alone = try_lock(lock) is True
        try_lock(lock, shared=True)  # from here on the next one is not alone
        yield alone
    finally:
        os.close(lock)


def _in_journal(space: Space, file: Path, folder: Path) -> Kept:
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        study, created = _made(space.study, storage)
    except Exception as error:  # whatever a record that is not optuna's makes it raise
        raise InputError(f"{file}: not a journal of this study ({type(error).__name__}: {first_line(error)}); remove {folder}") from error
    return Kept(study, FileWorkers(folder, storage), str(file), created)


def _in_database(space: Space, uri: str) -> Kept:
    """The study of a database. Two that open a new one at once make its tables at once, and one of them is told so: it tries again."""
    failure: Exception | None = None
    with _quiet(), store.reported(f"the study's database {masked(uri)} cannot be used"):
        for attempt in range(5):
            try:
                storage = RDBStorage(uri, {"pool_pre_ping": True}, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)
                study, created = _made(space.study, storage)
                return Kept(study, DatabaseWorkers(storage, space.study), f"study {space.study} of {masked(uri)}", created)
            except ImportError as error:  # optuna's own, which does not name the driver
                raise error.__cause__ or error from None
            except Exception as error:  # SQLAlchemy's: a table, or the study, has come in between
                failure = error
                if "UniqueViolation" not in str(error) and "already exists" not in str(error) and "IntegrityError" not in repr(error):
                    raise
                time.sleep(0.2 * 2**attempt)
        assert failure is not None
        raise failure


def _made(name: str, storage: Any) -> tuple[optuna.Study, bool]:
    """The study, and whether it is new: of several that make it at once one has made it."""
    try:
        return optuna.create_study(study_name=name, storage=storage, direction="minimize"), True
    except optuna.exceptions.DuplicatedStudyError:
        return optuna.load_study(study_name=name, storage=storage), False


def _mend(file: Path, note: Note) -> None:
    """Take away what a kill left of its last record.   Raises InputError for a record that is damaged otherwise."""
    if not file.exists():
        return
    content = file.read_bytes()
    intact = content[: content.rfind(b"\n") + 1]
    if len(intact) < len(content):
        os.truncate(file, len(intact))
        note(f"{file}: its last record was cut short by a kill and is dropped")
    for number, line in enumerate(intact.splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            raise InputError(f"{file}, line {number}: damaged; restore it, or remove {file.parent} for a new study") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that heartbeats and the liar of the sampler are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
