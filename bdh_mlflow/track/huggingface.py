"""The Hugging Face Trainer, tracked: a callback in place of its own for MLflow (`report_to="none", callbacks=[TrackCallback()]`).

Metrics have the names that its own gives them. Checkpoint folders are taken as they are saved, and mirrored behind the loop. Each of them
says in its trainer_state.json which run it is of, so that `train(resume_from_checkpoint=...)` goes on in that run.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from bdh_mlflow.errors import InputError
from bdh_mlflow.track import endings
from bdh_mlflow.track.begin import Origin, begin, say
from bdh_mlflow.track.later import find
from bdh_mlflow.track.settings import Numbers, Settings, flat, settings_of, usual_params
from bdh_mlflow.track.tracked import Run

_UNUSUAL = re.compile(r"[^0-9A-Za-z_\-\.\ :/]")  # what its own callback replaces in names of metrics
_made: list["TrackCallback"] = []
"""The last one that a program made."""
_tracking: list[tuple[Run, TrainingArguments]] = []
"""Open runs, and the arguments of their Trainers."""


class TrackCallback(TrainerCallback, ExportableState):
    """Tracks what a Trainer does, on the first process of a group.

    settings: or the name of the experiment alone. `name` and `best` are those of the TrainingArguments (run_name, metric_for_best_model,
    greater_is_better) where they are not set here.   params: logged besides the model's configuration and the TrainingArguments.
    resume: a checkpoint of a run to go on with, see `track.run`; give `resume_from_checkpoint` to `train`. Without it a training that
    begins from a folder which this callback has tracked goes on in its run.   note: called with lines for the user.
    restored: for a Trainer that makes its callbacks anew when it restores their states: it is the one that was made last.
    """

    def __init__(
        self,
        settings: Settings | str | None = None,
        *,
        params: Mapping[str, object] | None = None,
        resume: str | Path | None = None,
        note: endings.Say = say,
        restored: bool = False,
    ) -> None:
        if restored and _made:
            self.__dict__ = _made[-1].__dict__
            return
        _made[:] = [self]
        self._settings, self._params, self._note = settings_of(settings), flat(params or {}), note
        self.resume_from_checkpoint = str(find(resume, self._settings, note=note)) if resume is not None else None
        """Folder of the checkpoint that `resume` names, for `Trainer.train`; None without one."""
        self._resume = self.resume_from_checkpoint
        self.run: Run | None = None
        """The run, from the beginning of training on; None on other processes than the first."""
        self._numbers = Numbers(_usual, note)

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, as searches for hyperparameters start them: what it was made with."""
        return self.__dict__ | {"run": None}

    def state(self) -> dict[str, Any]:
        """What trainer_state.json is to hold: which run this is, and nothing that could be secret."""
        run = {"run_id": self.run.id, "run_dir": self.run.made_directory().name} if self.run and not self.run.ended else {}
        return {"args": {"restored": True}, "attributes": {"tracked": run}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin the run, or go on with the one that the checkpoint is of."""
        if state.is_world_process_zero:
            if self.run is not None and not self.run.ended:  # of the training before, which has ended, or failed without a word
                self.run.end(None if self.run.marked else "FAILED")
            self._open(args, state, kwargs.get("model"))
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # a checkpoint made without this callback has none

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Points of what the Trainer logs."""
        if state.is_world_process_zero:
            points = self._numbers(kwargs["logs"])
            self._open(args, state, kwargs.get("model")).metrics(points, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the checkpoint, once every process has written its part."""
        if args.world_size > 1:
            torch.distributed.barrier()
        if self.run is None or not state.is_world_process_zero:
            return
        logged = [entry for entry in state.log_history if entry.get("step") == state.global_step]
        metrics = self._numbers({k: v for entry in logged for k, v in entry.items() if k.startswith("eval_")})
        self.run.try_checkpoint(_folder_of(args, state), state.global_step, metrics)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a signal that is held: save, and stop training."""
        if self.run is not None and self.run.stop_requested:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The run has finished; it stays open for an evaluation after it, and ends with the program or the next training."""
        if self.run is not None:
            with self.run.noting("the last checkpoint"):  # training has ended all the same
                self.run.end() if self.run.stop_requested else self.run.mark()

    def _open(self, args: TrainingArguments, state: TrainerState, model: Any) -> Run:
        """The run; begun, if there is none that is open."""
        if self.run is None or self.run.ended:
            if any(run is not self.run and arguments is args and not run.ended for run, arguments in _tracking):
                raise InputError("two TrackCallbacks track one Trainer; leave one of them out")
            if self._settings.signals and args.world_size > 1:
                raise InputError("track.Settings: signals=True holds the signals of one process, and this is a group; leave it out")
            config: Any = getattr(model, "config", None)
            params = {**(config.to_dict() if hasattr(config, "to_dict") else {}), **args.to_dict(), **self._params}
            self.run = begin(self._filled(args), usual_params(params), self._origin(state), self._note)
            self._resume = None
            _tracking[:] = [(run, arguments) for run, arguments in _tracking if not run.ended] + [(self.run, args)]
        return self.run

    def _filled(self, args: TrainingArguments) -> Settings:
        """The settings, and what the TrainingArguments say of the same."""
        settings, best = self._settings, args.metric_for_best_model
        if settings.name is None and args.run_name:
            settings = dataclasses.replace(settings, name=args.run_name)
        if settings.best is None and best:
            best = best if best.startswith("eval_") else f"eval_{best}"
            settings = dataclasses.replace(settings, best=_usual(best), higher_is_better=bool(args.greater_is_better))
        return settings

    def _origin(self, state: TrainerState) -> str | Origin | None:
        """What the run goes on from."""
        if self._resume is not None:
            return self._resume
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        saved = saved[-1] if isinstance(saved, list) else saved
        run = saved.get("attributes", {}).get("tracked", {})
        if not run:
            return None
        run_id, run_dir = (run.get(key) if isinstance(run.get(key), str) else None for key in ("run_id", "run_dir"))
        return Origin(run_id=run_id, run_dir=run_dir, step=state.global_step)


def _usual(key: str) -> str:
    """The name that the Trainer's own callback gives a metric."""
    return _UNUSUAL.sub("_", key)


def _folder_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that the Trainer has just saved; in a search for hyperparameters each trial has one of its own."""
    folder, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    if state.is_hyper_param_search and (trials := sorted(folder.glob(f"run-*/{name}"), key=os.path.getmtime)):
        return trials[-1]
    return folder / name
