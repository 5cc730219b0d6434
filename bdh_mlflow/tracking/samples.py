"""The table of samples that MLflow's UI shows for a run, `samples.json`."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from bdh_mlflow.tracking.run_store import RunStore

SAMPLES = "samples.json"
_ENTRY = {"path": SAMPLES, "type": "table"}


class SampleTable:
    """Rows by step, in the form of `MlflowClient.log_table`, which would append them twice.

    run: as the store had it.   empty: it has no table yet; else the table is read when rows are added first.
    """

    def __init__(self, store: RunStore, run: Run, empty: bool) -> None:
        self._store = store
        self._rows: dict[int, list[dict[str, Any]]] | None = {} if empty else None
        self._listed: list[Any] = []
        with contextlib.suppress(ValueError, TypeError):  # somebody else's tag: begun anew
            self._listed = [*json.loads(run.data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))]

    def add(self, new: list[dict[str, Any]]) -> None:
        """Put rows in place of those of the same steps.   Raises whatever the store does; may be called again."""
        columns = list(new[0])
        if self._rows is None:
            self._rows = _rows_of(self._store.json(SAMPLES), columns)
        for step in {row["step"] for row in new}:
            self._rows[step] = [row for row in new if row["step"] == step]
        ordered = [[row[key] for key in columns] for step in sorted(self._rows) for row in self._rows[step]]
        table = json.dumps({"columns": columns, "data": ordered})
        acts: list[Callable[[], object]] = [lambda: self._store.artifacts.put_text(table, SAMPLES)]
        if _ENTRY not in self._listed:
            acts.append(self._list)
        self._store.together(*acts)

    def _list(self) -> None:
        """The tag by which the UI finds the table."""
        listed = [*self._listed, _ENTRY]
        self._store.client.set_tag(self._store.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps(listed))
        self._listed = listed


def _rows_of(table: Any, columns: list[str]) -> dict[int, list[dict[str, Any]]]:
    """The rows of a table of samples by step; none of somebody else's table."""
    found: dict[int, list[dict[str, Any]]] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        for values in table["data"]:
            row = dict(zip(table["columns"], values, strict=True))
            if isinstance(row["step"], int):
                found.setdefault(row["step"], []).append({key: row[key] for key in columns})
    return found
