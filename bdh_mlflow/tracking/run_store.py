"""The two stores of one run: MLflow's tracking store by its client, and the artifact store."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient

from bdh_mlflow.tracking.artifacts import Artifacts
from bdh_mlflow.tracking.records import RunIdentity
from bdh_mlflow.tracking.together import together


@dataclass(frozen=True)
class RunStore:
    """One run and where it is.   at_once: requests at a time."""

    client: MlflowClient
    identity: RunIdentity
    artifacts: Artifacts
    at_once: int

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.identity.run_id

    def together(self, *acts: Callable[[], object]) -> None:
        """Independent requests, side by side where that is faster.   Raises the first error, after the others have ended too."""
        together(*acts, at_once=self.at_once)

    def json(self, name: str) -> Any:
        """What a JSON file at the top of the run's artifacts holds; None if there is no such file, or it is something else."""
        if name not in self.artifacts.sizes():
            return None
        content = self.artifacts.read(name)
        try:
            return json.loads(content)
        except ValueError:
            return None
