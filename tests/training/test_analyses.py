"""Analyses on the way: what is due, and what cannot be made."""

from typing import Any

import pytest
import torch

from bdh_mlflow.analysis import graph
from bdh_mlflow.training.analyses import Analyses
from bdh_mlflow.vocabulary import BYTES
from tests.analysis import made


class Notes:
    """A tracker and a progress that keep what they are told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.points: list[int] = []
        self.notes: list[str] = []

    def metrics(self, values: Any, step: int) -> int:
        self.points.append(step)
        return 0

    def samples(self, samples: Any, step: int) -> None: ...

    def text(self, text: str, artifact: str) -> None:
        self.texts.append(artifact)

    def tags(self, tags: Any) -> None: ...

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None: ...

    def point(self, values: Any, step: int) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_only_due_steps_are_analyzed_and_what_fails_is_said() -> None:
    kept, model = Notes(), made.model(heads=2, multiplier=4)
    windows = [torch.randint(0, 256, (1, 33), dtype=torch.uint8)]
    analyses = Analyses((model, BYTES, windows), 4, kept, kept)
    for step in (1, 4, 6, 8):
        analyses(step)
    assert kept.points == [4, 4, 4, 8, 8, 8]
    assert "analysis/graph/step_8.svg" in kept.texts
    Analyses((model, BYTES, []), 1, kept, kept)(9)
    assert kept.points[6:] == [9, 9], "without validation text no activity"


def test_an_analysis_that_fails_ends_nothing_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(graph, "analyze", fails)
    kept = Notes()
    analyses = Analyses((made.model(heads=2, multiplier=4), BYTES, []), 1, kept, kept)
    analyses(1)
    analyses(2)
    assert kept.points == [1, 2], "repetition"
    assert [note for note in kept.notes if note.startswith("no analysis")] == ["no analysis of graph: MemoryError: no room"]
