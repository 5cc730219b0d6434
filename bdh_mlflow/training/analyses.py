"""Analyses of the network while it is trained, logged with the run."""

from collections.abc import Sequence

from torch import Tensor

from bdh_mlflow.analysis.plan import Plan, Subject, findings
from bdh_mlflow.analysis.results import TAG
from bdh_mlflow.errors import InputError
from bdh_mlflow.files import first_line
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.training.parts import Progress, Tracker
from bdh_mlflow.vocabulary import Tokenizer

NAMES = ("activity", "repetition", "graph")


class Analyses:
    """Called after a step: analyses the network every `freq` steps. Draws no random numbers that the training would draw."""

    def __init__(self, subject: tuple[BDH, Tokenizer, Sequence[Tensor]], freq: int, tracker: Tracker, progress: Progress) -> None:
        self._model, self._tokenizer, self._windows = subject
        self._freq, self._tracker, self._progress = freq, tracker, progress
        self._names = [name for name in NAMES if name != "activity" or self._windows]

    def __call__(self, step: int) -> None:
        """Make what is due. What cannot be made of this model or text is said, ends nothing, and is not tried again."""
        if step % self._freq:
            return
        subject = Subject(self._model, self._tokenizer, self._windows, {"step": step})
        for name in list(self._names):
            try:
                for found in findings(subject, Plan(names=(name,), layer=0)):
                    for path, text in found.files(step).items():
                        self._tracker.text(text, path)
                    self._tracker.metrics(found.metrics, step)
                    self._tracker.tags({f"{TAG}{found.name}": str(step)})
                    self._progress.note(f"analysis at step {step}: {found.says}")
            except Exception as error:  # an allocation that fails, a fault of a library: a picture is no reason to end a training
                self._names.remove(name)
                why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
                self._progress.note(f"no analysis of {name}: {why}")
