"""What a run tells, and to whom: a journal on disk at once, an MLflow store in its own time.

`Tracker` is what the loop and its builder talk to. Every call appends to the journal and returns; one sender (`delivery`), a process of its
own so that it takes neither the interpreter lock nor the loop's time, reads the journal and delivers it. Around that: which store is meant,
whether it can be used, and the few questions others ask of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunIdentity:
    """Which MLflow run a training is.   tracking_uri: credentials masked.   continued: it existed before this process."""

    run_id: str
    name: str
    experiment_id: str
    experiment: str
    tracking_uri: str
    artifact_uri: str
    continued: bool

    @property
    def page(self) -> str:
        """Address of the run's curves in the UI."""
        server = self.tracking_uri if self.on_server else "http://127.0.0.1:5000"
        return f"{server.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics?workflowType=machine_learning"

    @property
    def on_server(self) -> bool:
        """Whether the tracking URI is a server, which shows the run by itself."""
        return self.tracking_uri.startswith(("http://", "https://"))


OnMessage = Callable[[dict[str, Any]], None]
