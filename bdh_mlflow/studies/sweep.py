"""A search for good settings: trainings as trials of one Optuna study, pruned by validation loss, resumable.

Every trial is a whole training of this package, and its MLflow run is a child of one parent run. Any number of processes may work on a
study, on any machines if it is kept in a database (see `study`). A trial that was interrupted continues from its last checkpoint, here or
elsewhere, in the same MLflow run.
"""

import contextlib
import functools
import json
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID
from optuna.trial import FrozenTrial, TrialState

from bdh_mlflow import checkpoint
from bdh_mlflow.config import Config, in_full
from bdh_mlflow.errors import BdhError, ConfigError, TrackingError
from bdh_mlflow.files import first_line
from bdh_mlflow.redact import masked
from bdh_mlflow.studies import study as study_of
from bdh_mlflow.studies.space import Space
from bdh_mlflow.studies.study import (
    ENDED,
    INTERRUPTED,
    REASON,
    REPLACES,
    SURPLUS,
    Kept,
    ask,
    counted,
    interrupt,
    is_outage,
    is_surplus,
    patiently,
    places,
    requeue_left,
)
from bdh_mlflow.tracking import journal, store
from bdh_mlflow.tracking.sender_process import SubprocessSender
from bdh_mlflow.tracking.tracker import MakeSender
from bdh_mlflow.training import processes, start
from bdh_mlflow.training.parts import Progress
from bdh_mlflow.training.problems import problems
from bdh_mlflow.training.stop import StopRequest

FOLDER = "sweeps"
METRIC = "val/loss"
PRUNED, TAKEN_UP = "pruned", "taken up elsewhere"
TRIAL = "sweep.trial"  # tag of a trial's run: the place of the trial, which one that continues it keeps
REPORT_S = 5.0  # for the database to take an evaluation
IDLE_S = 2.0  # between two looks at trials that other processes train
PARENT_S = 60.0  # for the process that has made the study to make its parent run

Display = Callable[[int], AbstractContextManager[Progress]]
"""Opens what shows the progress of training for so many steps."""


@dataclass(frozen=True)
class Controls:
    """What connects a sweep to its caller.

    stop: ends it.   display: shows each training run.   note: prints a line.   make_sender: starts the sender of each trial.
    size: processes that train a trial together.
    """

    stop: StopRequest
    display: Display
    note: Callable[[str], None]
    make_sender: MakeSender = SubprocessSender
    size: int = 1


@dataclass(frozen=True)
class SweepResult:
    """How a sweep stands.

    counts: trials by state.   best: number, validation loss and varied settings of the best trial, None before one is complete.   place:
    where the study is.   stopped: name of the signal that ended it early.
    """

    parent_run_id: str
    experiment: str
    counts: dict[str, int]
    best: tuple[int, float, dict[str, Any]] | None
    place: str
    stopped: str | None


def sweep(config: Config, space: Space, trials: int, controls: Controls) -> SweepResult:
    """Run trials until `trials` of them have ended, counting those of other processes.   Raises a BdhError for what affects all of them.

    config: settings of all trials, before those of `space`.
    """
    base = _replaced(config, space.settings)
    if base.dataset.val_fraction == 0:
        raise ConfigError(f"dataset.val_fraction: 0; trials are judged by {METRIC}, which needs validation text")
    folder = Path(base.training.checkpoint_dir) / FOLDER / space.study
    with study_of.opened(space, folder, controls.note) as kept:
        study, client = kept.study, store.connect(base.tracking)
        parent, experiment = _parent_run(client, kept, space, base)
        tags = {**base.tracking.tags, MLFLOW_PARENT_RUN_ID: parent}
        base = base.replaced({"tracking.experiment": experiment, "tracking.tags": tags})
        runner = _Trials(kept, space, base, folder, controls, client, parent)
        ended = "FAILED"
        try:
            while runner.run_next(trials) and not controls.stop.received:
                _report(lambda: _log_results(client, parent, study), controls.note)
            counts = patiently(lambda: _counts(study), controls.note)
            ended = "FINISHED" if counts["complete"] or counts["pruned"] else "FAILED"
        finally:
            stopped = controls.stop.received.name if controls.stop.received else None
            _report(lambda: _end_parent(client, parent, study, "KILLED" if stopped else ended), controls.note)
        number = places(study.get_trials(deepcopy=False))[study.best_trial.number] if counts["complete"] else 0
        best = (number, float(study.best_value), dict(study.best_params)) if counts["complete"] else None
        return SweepResult(parent, experiment, counts, best, kept.place, stopped)


def _end_parent(client: MlflowClient, parent: str, study: optuna.Study, status: str) -> None:
    """End the parent run, if this process is the last that works on the study; write what there is."""
    _log_results(client, parent, study)
    if not any(t.state is TrialState.RUNNING for t in counted(study)):
        client.set_terminated(parent, status)


def _report(act: Callable[[], object], note: Callable[[str], None]) -> None:
    """Write to the parent run. A store that does not answer now does not end the study: all of it is written again after the next trial."""
    try:
        with store.reported("the sweep's run cannot be written"):
            act()
    except TrackingError as error:
        note(str(error))


def _parent_run(client: MlflowClient, kept: Kept, space: Space, base: Config) -> tuple[str, str]:
    """The parent run's id and its experiment: the run of earlier calls, else the one that `mlflow run` has made, else a new one.

    It is made by the process that has made the study; the others wait for it.
    """
    study = kept.study
    wrapper = os.environ.pop("MLFLOW_RUN_ID", None)  # trials make runs of their own
    end = time.monotonic() + (0 if kept.created else PARENT_S)
    while (known := study.user_attrs.get("parent")) is None and time.monotonic() < end:
        time.sleep(0.2)
    with store.reported("the sweep's run cannot be created"):
        own = store.wrapper_run(client, wrapper, known) if wrapper else None
        run = (store.find_run(client, known) if known else None) or own
        if run is None:
            run = client.create_run(store.make_experiment(client, base.tracking.experiment), run_name=f"sweep {space.study}")
        run_id = str(run.info.run_id)
        study.set_user_attr("parent", run_id)
        if wrapper and wrapper != run_id:
            client.set_tag(wrapper, MLFLOW_PARENT_RUN_ID, run_id)
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "bdh.sweep", space.study)
        described = space.model_dump(exclude_defaults=True, exclude={"storage"})  # it may hold a password
        client.log_text(run_id, yaml.safe_dump(described, sort_keys=False), "sweep/space.yaml")
        experiment = str(client.get_experiment(run.info.experiment_id).name)
    return run_id, experiment


def _counts(study: optuna.Study) -> dict[str, int]:
    """Ended trials by state."""
    states = [t.state for t in counted(study) if INTERRUPTED not in t.user_attrs]
    return {state.name.lower(): states.count(state) for state in ENDED}


@dataclass(frozen=True)
class _Trials:
    """Runs the trials of a study.

    base: settings of all of them.   folder: holds the checkpoint directory of each.   parent: their run.
    """

    kept: Kept
    space: Space
    base: Config
    folder: Path
    controls: Controls
    client: MlflowClient
    parent: str

    def run_next(self, wanted: int) -> bool:
        """Train the next trial, or wait for those of other processes.   Returns whether there may be another one."""
        study, note = self.kept.study, self.controls.note
        said = False
        while not self.controls.stop.received:
            patiently(lambda: requeue_left(study, self.kept.workers, note), note)
            trials = patiently(lambda: counted(study), note)
            if any(t.state is TrialState.WAITING for t in trials) or len(trials) < wanted:
                trial, place = patiently(lambda: ask(study, self.base.training.seed), note)
                if not patiently(functools.partial(is_surplus, study, trial.number, wanted), note):
                    self._run(trial, place)
                    return True
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    trial.set_user_attr(SURPLUS, True)
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                continue
            if not (running := sum(t.state is TrialState.RUNNING for t in trials)):
                return False
            if not said:
                said = True
                note(f"{running} trials are trained by other processes; waiting, in case one of them dies")
            time.sleep(IDLE_S)
        return False

    def _run(self, trial: optuna.Trial, place: int) -> None:
        """Train a trial and give its result to the study; a trial that a signal stopped stays unfinished."""
        try:
            self._train(trial, place, self.controls.stop.for_one())
        except optuna.exceptions.UpdateFinishedTrialError:
            self._taken_up(place)
        # Settings that do not go together, data that do not fit, memory that does not suffice: the next trial may.
        except Exception as error:
            self._failed(trial, place, error)

    def _train(self, trial: optuna.Trial, place: int, stop: StopRequest) -> None:
        """See `_run`.   Raises UpdateFinishedTrialError if another process has taken the trial up."""
        controls, note = self.controls, self.controls.note
        varied = patiently(lambda: {key: choice.suggest(trial, key) for key, choice in self.space.parameters.items()}, note)
        note(f"trial {place}: {', '.join(f'{key} {value}' for key, value in varied.items())}")
        with self.kept.workers.holding(trial.number, lambda: stop.ask(TAKEN_UP)):
            config = self._config(trial, place, varied)
            with processes.started(controls.size) as world, controls.display(config.training.max_iters) as progress:
                judged = _PruningProgress(progress, trial, stop)
                ending = start.train(config, judged, stop, make_sender=controls.make_sender, world=world).ending
            if ending.reason == TAKEN_UP:
                self._taken_up(place)
            elif ending.reason == PRUNED:
                patiently(judged.report_rest, note)
                self._tell(trial, TrialState.PRUNED)
                note(f"trial {place}: pruned at step {ending.step}")
            elif ending.reason == "finished":
                assert ending.evaluation is not None, "the last step is evaluated"
                patiently(judged.report_rest, note)
                self._tell(trial, TrialState.COMPLETE, ending.evaluation.loss)
                note(f"trial {place}: {METRIC} {ending.evaluation.loss:.4f}")
            else:  # a signal: whoever works on the study next goes on with it
                patiently(lambda: interrupt(self.kept.study, self.kept.workers, trial.number), note)

    def _taken_up(self, place: int) -> None:
        self.controls.note(f"trial {place}: was taken up by another process, as this one gave no sign of life")

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
        patiently(lambda: self.kept.study.tell(trial, value, state=state, skip_if_finished=True), self.controls.note)

    def _failed(self, trial: optuna.Trial, place: int, error: Exception) -> None:
        """Tell the study and the user; what is no error of this package is kept whole in a file for whoever looks for the reason."""
        said = first_line(error)
        if not isinstance(error, BdhError):
            file = self.folder / f"trial_{place}.error.txt"
            with contextlib.suppress(OSError):
                file.write_text(masked("".join(traceback.format_exception(error))), encoding="utf-8")
            said = f"{type(error).__name__}: {said} (see {file})"
        elif isinstance(error, ConfigError):
            said = masked(str(error))  # the reasons are in its further lines
        self.controls.note(f"trial {place} failed: {said}")
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process has taken it up
            patiently(lambda: trial.set_user_attr(REASON, said[:500]), self.controls.note)
        self._tell(trial, TrialState.FAIL)

    def _config(self, trial: optuna.Trial, place: int, varied: Mapping[str, Any]) -> Config:
        """The configuration of a trial; one that was interrupted gets its evaluations back and resumes where its checkpoints are."""
        before = trial.user_attrs.get("folder")
        folder, resumed = self.folder / f"trial_{trial.number}", None
        if before and (run_dirs := checkpoint.by_last_save(Path(before))) and not _is_training(run_dirs[0]):
            folder, resumed = Path(before), str(run_dirs[0])
        elif REPLACES in trial.user_attrs:
            resumed = self._mirrored(place)
        patiently(lambda: trial.set_user_attr("folder", str(folder)), self.controls.note)
        for step, value in trial.user_attrs.get("seen", {}).items():
            trial.report(value, int(step))
        tags = {**self.base.tracking.tags, TRIAL: str(place)}
        own: dict[str, Any] = {
            **varied,
            "training.checkpoint_dir": str(folder),
            "tracking.run_name": f"trial {place}",
            "tracking.tags": tags,
        }
        if resumed:
            own["training.resume_from_checkpoint"] = resumed
        return _replaced(self.base, own)

    def _mirrored(self, place: int) -> str | None:
        """Id of the run of a trial that was trained elsewhere; None if none of its checkpoints was mirrored, and the run is then ended."""
        with store.reported("the runs of the sweep cannot be searched"):
            experiment = self.client.get_run(self.parent).info.experiment_id
            wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent}' AND tags.`{TRIAL}` = '{place}'"
            runs = self.client.search_runs([experiment], wanted)
            for run in runs:
                if "bdh.latest_checkpoint" in run.data.tags:
                    return str(run.info.run_id)
            for run in runs:
                if run.info.status == "RUNNING":
                    self.client.set_terminated(run.info.run_id, "KILLED")
        return None


def _is_training(run_dir: Path) -> bool:
    """Whether a process, perhaps one that is frozen, has a run directory of this machine."""
    with journal.reading(run_dir) as reader:
        return reader is not None and reader.is_training()


class _PruningProgress:
    """Passes progress on; reports each evaluation to the trial and ends the training when the pruner says so.

    A database that does not answer holds up no training: what could not be reported is reported with the next evaluation.
    """

    def __init__(self, progress: Progress, trial: optuna.Trial, stop: StopRequest) -> None:
        self._progress, self._trial, self._stop = progress, trial, stop
        self._waiting: list[tuple[int, float]] = []
        self._reporting: threading.Thread | None = None

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        self._progress.advance(step, loss, tokens_per_s)

    def point(self, values: Mapping[str, float], step: int) -> None:
        self._progress.point(values, step)
        if METRIC not in values:
            return
        self._waiting.append((step, values[METRIC]))  # finite: the trainer ends at another one
        if self._reporting is None or not self._reporting.is_alive():
            self._reporting = threading.Thread(target=self._report, name="report of a trial", daemon=True)
            self._reporting.start()
        self._reporting.join(REPORT_S)

    def report_rest(self) -> None:
        """Report what could not be reported yet.   Raises whatever the database does."""
        if self._reporting is not None:
            self._reporting.join(REPORT_S)
        self._report_waiting()

    def _report_waiting(self) -> None:
        while self._waiting:
            step, value = self._waiting[0]
            self._trial.report(value, step)
            del self._waiting[0]

    def _report(self) -> None:
        try:
            self._report_waiting()
            if self._trial.should_prune() and not self._stop.received:
                self._stop.ask(PRUNED)
        except optuna.exceptions.UpdateFinishedTrialError:
            self._stop.ask(TAKEN_UP)
        except Exception as error:
            if not is_outage(error):
                self._progress.note(f"an evaluation cannot be reported to the study: {first_line(error)}")

    def note(self, text: str) -> None:
        self._progress.note(text)


def _log_results(client: MlflowClient, parent: str, study: optuna.Study) -> None:
    """Log the best trial so far, the table of trials and two plots to the parent run."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    rows = [_row(place, t) for place, t in enumerate(counted(study)) if t.state.is_finished()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}
    client.log_text(parent, json.dumps(table), "sweep/trials.json")
    client.set_tag(parent, MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": "sweep/trials.json", "type": "table"}]))
    if not complete:
        return
    client.log_metric(parent, f"best/{METRIC}", study.best_value, step=len(rows))
    for key, value in study.best_params.items():
        client.set_tag(parent, f"best.{key}", str(value))
    if len(complete) < 2 or len({t.value for t in complete}) < 2:
        return
    for name, plot in (("importance", "plot_param_importances"), ("parallel_coordinates", "plot_parallel_coordinate")):
        client.log_figure(parent, _figure(plot, study), f"sweep/{name}.png")


def _figure(plot: str, study: optuna.Study) -> Figure:
    import matplotlib

    matplotlib.use("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the plots are experimental, and missing fonts
        axes = getattr(optuna.visualization.matplotlib, plot)(study)
    figure: Figure = axes.figure
    figure.set_size_inches(10, 5)
    return figure


def _row(place: int, t: FrozenTrial) -> dict[str, Any]:
    value = t.value if t.state is TrialState.COMPLETE else None
    return {"trial": place, "state": t.state.name.lower(), METRIC: value, "steps": t.last_step, **t.params}


def _replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values under dotted keys, also checked against this machine.   Raises ConfigError."""
    return Config.from_dict(config.replaced(in_full(values)).to_dict(), checks=(problems,), origin="settings")
