"""Lightning, tracked: a logger in place of its own for MLflow (`Trainer(logger=TrackLogger("my experiment"))`).

Metrics and hyperparameters have the names that its own gives them. Every checkpoint that a ModelCheckpoint saves is taken and mirrored
behind the loop. Works with `lightning` and with `pytorch_lightning`: with the one that is imported, else the one that is installed.
"""

import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh_mlflow.errors import InputError
from bdh_mlflow.track import endings
from bdh_mlflow.track.begin import begin, say
from bdh_mlflow.track.later import find
from bdh_mlflow.track.settings import Numbers, Settings, settings_of, usual_params
from bdh_mlflow.track.tracked import Run

_is_other = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
if TYPE_CHECKING or not (_is_other or importlib.util.find_spec("lightning") is None):
    from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
    from lightning.pytorch.utilities import rank_zero_only
else:
    from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
    from pytorch_lightning.utilities import rank_zero_only

_UNUSUAL = re.compile(r"[^a-zA-Z0-9_/. -]+")  # what its own logger leaves out of names of metrics


class TrackLogger(Logger):
    """Tracks what a Trainer does, on the first process of a group. The run begins when something is logged first.

    settings: or the name of the experiment alone. `best` is what the ModelCheckpoint monitors, where it is not set here.   resume: a
    checkpoint of a run to go on with, see `track.run`; give `ckpt_path` to `fit`.   note: called with lines for the user. A `fit` that has
    ended, as it ended, sets the run's status; the run stays open for a `test` after it, and ends with the program or `experiment.end()`.
    """

    def __init__(self, settings: Settings | str | None = None, *, resume: str | Path | None = None, note: endings.Say = say) -> None:
        super().__init__()
        self._settings, self._note = settings_of(settings), note
        if self._settings.signals:
            raise InputError("track.Settings: signals=True: Lightning handles signals itself; leave it out")
        self.ckpt_path = str(find(resume, self._settings, note=note)) if resume is not None else None
        """File of the checkpoint that `resume` names, for `Trainer.fit`; None without one."""
        self._run: Run | None = None
        self._taken: dict[int, tuple[str, tuple[bool, bool]]] = {}
        self._numbers = Numbers(_usual, note)
        self._monitored: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For processes that Lightning starts: what it was made with; the run begins in the first of them."""
        return self.__dict__ | {"_run": None}

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """The run; on other processes than the first something that takes every call."""
        if self._run is None or self._run.ended:
            self._run = begin(self._settings, {}, self.ckpt_path, self._note)
        return self._run

    @property
    def name(self) -> str:
        """Name of the experiment, as a folder may be called: Lightning saves checkpoints in one of this name."""
        return re.sub(r"[^\w.-]+", "_", self._settings.config().experiment).strip(".") or "experiment"

    @property
    def version(self) -> str | None:
        """Id of the run, or name of its directory while the store does not answer; None on other processes than the first."""
        run = self.experiment
        return run.id or run.directory.name if isinstance(run, Run) else None

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Params of the run; mappings in them are flattened with `/`, as Lightning's own loggers do."""
        given = vars(params) if isinstance(params, Namespace) else dict(params or {})
        self.experiment.params(usual_params(given, joint="/"))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Points; what is no number is left out, and named once."""
        self.experiment.metrics(self._numbers(metrics), int(step or 0))

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Take the file that was saved last. Of several at one step one is taken: a whole state before weights, then one with a score."""
        path, step = checkpoint_callback._last_checkpoint_saved, checkpoint_callback._last_global_step_saved
        run, monitor, score = self.experiment, checkpoint_callback.monitor, checkpoint_callback.current_score
        metrics = {} if monitor is None or score is None else {_usual(monitor): float(score)}
        worth = not checkpoint_callback.save_weights_only, bool(metrics)
        before = self._taken.get(step)
        if before is not None and before[0] != path and worth <= before[1]:
            return
        if metrics and self._settings.best is None and self._monitored is None:
            self._monitored = next(iter(metrics))  # of several monitored metrics the first: others do not compare with it
            run.compare_by(self._monitored, higher_is_better=checkpoint_callback.mode == "max")
        if run.try_checkpoint(path, step, metrics):
            self._taken[step] = path, worth

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Set the run's status.   status: success, finished or failed."""
        self._taken.clear()  # another fit begins with other files
        if self._run is None or self._run.ended:
            return
        finished = status in ("success", "finished")
        with self._run.noting("the last checkpoint"):
            self._run.mark("FINISHED" if finished else "FAILED", None if finished else sys.exc_info()[1])


def _usual(key: str) -> str:
    """The name that Lightning's own logger gives a metric."""
    return _UNUSUAL.sub("", key)
