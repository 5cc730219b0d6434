"""What a process is given that neither shows nor saves anything: every rank but 0, and trainings that nobody watches."""

from collections.abc import Mapping
from typing import Any

from bdh_mlflow.text import Evaluation


class Silent:
    """Progress that is not shown, and a saver that saves nothing."""

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Not shown."""

    def point(self, values: Mapping[str, float], step: int) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Not shown."""

    def save(self, state: dict[str, Any], evaluation: Evaluation | None) -> None:
        """Not saved."""

    def check(self) -> None:
        """Nothing can have failed."""

    def finish(self) -> None:
        """Nothing is left."""


SILENT = Silent()
