"""Mirrored checkpoints read back: which MLflow run is looked at, what is mirrored of it, one file fetched, and a search over all runs."""

import functools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel
from mlflow.store.artifact.utils.models import get_model_name_and_version

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Checkpoint, Saved, Snapshot
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError, ResumeError
from bdh_mlflow.files import first_line
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.artifacts import Artifacts
from bdh_mlflow.tracking.mirror import MODEL_TYPE, SNAPSHOT_TYPE, VAL_BPB, VAL_LOSS
from bdh_mlflow.tracking.records import JOB
from bdh_mlflow.tracking.resolved import GRAMMAR

_RUN_FILE = re.compile(r"runs:/([0-9a-f]{32})/(.+\.(?:pt|json|model))")


class Training(NamedTuple):
    """The MLflow run of the checkpoints, and the name of its run directory if it has saved anything."""

    run_id: str
    run_dir: str | None
    artifact_uri: str


@dataclass(frozen=True)
class MirroredCheckpoint:
    """A mirrored checkpoint.   uri: what `--resume` takes.   val_loss: nats per token, None if it was not evaluated.   val_bpb: the same in
    bits per byte of text, by which runs of different vocabularies compare.
    """

    uri: str
    step: int
    val_loss: float | None
    val_bpb: float | None
    run_name: str


class MirrorReader:
    """Reads the mirror for one command. Opens the store when it is first needed, and asks for each run once."""

    def __init__(self, config: TrackingConfig) -> None:
        self._config = config
        self._trainings: dict[str, Training] = {}
        self._checkpoints: dict[str, list[tuple[int, str]]] = {}

    def __str__(self) -> str:
        return f"experiment {self._config.experiment} of {masked(self.client.tracking_uri)}"

    @functools.cached_property
    def client(self) -> MlflowClient:
        """The store.   Raises TrackingError if it does not answer."""
        return store.connect(self._config)

    def training(self, run_id: str) -> Training:
        """The run that holds the training (the run that `mlflow run` made for a later segment names it).   Raises ResumeError."""
        if run_id not in self._trainings:
            client = self.client
            with store.reported(f"run {run_id} cannot be read"):
                run = store.find_run(client, run_id)
                if run is not None and "bdh.continues" in run.data.tags:
                    run = store.find_run(client, run.data.tags["bdh.continues"]) or run  # a tag by hand may name none
            if run is None:
                raise ResumeError(f"run {run_id}: not found at {masked(client.tracking_uri)}; accepted: {GRAMMAR}")
            run_dir = run.data.tags.get("bdh.run_dir", "")
            run_dir = run_dir if checkpoint.RUN_DIRECTORY.fullmatch(run_dir) else ""
            found = Training(run.info.run_id, run_dir or None, run.info.artifact_uri)
            self._trainings |= {run_id: found, found.run_id: found}
        return self._trainings[run_id]

    def newest_run(self, kinds: tuple[type[Saved], ...]) -> str | None:
        """Id of the newest run of the experiment with a mirrored checkpoint of one of these kinds."""
        client = self.client
        with store.reported(f"runs of experiment {self._config.experiment} cannot be listed"):
            runs = store.runs_of(client, self._config.experiment)
        kind_of = {run.info.run_id: Checkpoint if run.data.tags["bdh.latest_checkpoint"].endswith(".pt") else Snapshot for run in runs}
        return next((str(run_id) for run_id, kind in kind_of.items() if kind in kinds), None)

    def run_of_job(self, job: str) -> str | None:
        """Id of the run with mirrored checkpoints that a launcher's job has begun; None if there is none.   Raises TrackingError."""
        client = self.client
        with store.reported(f"runs of experiment {self._config.experiment} cannot be listed"):
            runs = store.runs_of(client, self._config.experiment)
        return next((str(run.info.run_id) for run in runs if run.data.tags.get(JOB) == job), None)

    def checkpoints(self, run_id: str) -> list[tuple[int, str]]:
        """Steps and artifact paths of a run's mirrored checkpoints, furthest first.   Raises ResumeError."""
        if run_id not in self._checkpoints:
            artifacts = self.artifacts(run_id)
            try:
                folders = [f"checkpoints/{name}" for name, size in artifacts.sizes("checkpoints").items() if size is None]
                files = [f"{folder}/{name}" for folder in folders for name in artifacts.sizes(folder)]
            except Exception as error:  # each artifact store raises its own kinds
                raise ResumeError(f"run {run_id}: artifacts cannot be listed: {first_line(error)}") from None
            steps = [(checkpoint.step_of(Path(file)), file) for file in files]
            self._checkpoints[run_id] = sorted(((step, path) for step, path in steps if step is not None), reverse=True)
        return self._checkpoints[run_id]

    def artifacts(self, run_id: str) -> Artifacts:
        """The files of a run.   Raises ResumeError if there is none."""
        return Artifacts(self.training(run_id).artifact_uri, self.client.tracking_uri)

    def fetch(self, run_id: str, path: str, folder: Path) -> Saved:
        """Download a mirrored checkpoint with its manifest into `folder` and verify it.   Raises ResumeError or CheckpointError."""
        file = self.download(f"runs:/{run_id}/{path}", folder)
        self.download(f"runs:/{run_id}/{path.removesuffix('.pt')}.json", folder)
        found = checkpoint.describe(file)
        checkpoint.verify(found)
        return found

    def download(self, uri: str, folder: Path) -> Path:
        """What an artifact URI names, in `folder`.   Raises ResumeError."""
        client = self.client
        try:
            if (of_run := _RUN_FILE.fullmatch(uri)) is not None:
                return self.artifacts(of_run[1]).fetch(of_run[2], folder)
            place = _place(client, uri) if uri.startswith("models:/") else uri
            return Path(download_artifacts(artifact_uri=place, dst_path=str(folder), tracking_uri=client.tracking_uri))
        except ResumeError:
            raise
        except Exception as error:  # each artifact store raises its own kinds
            raise ResumeError(f"{masked(uri)}: cannot be downloaded: {first_line(error)}") from None

    def search(self, run_id: str | None, best: bool) -> list[MirroredCheckpoint]:
        """Checkpoints of one run by step, or of all runs of the experiment, best first.   best: only the one of lowest validation loss.

        Raises InputError or TrackingError.
        """
        client, config = self.client, self._config
        with store.reported("mirrored checkpoints cannot be listed"):
            if run_id is not None:
                experiment_id = client.get_run(run_id).info.experiment_id
            else:
                experiment = client.get_experiment_by_name(config.experiment)
                if experiment is None:
                    raise InputError(f"experiment {config.experiment}: not found at {masked(client.tracking_uri)}; accepted: {GRAMMAR}")
                experiment_id = experiment.experiment_id
            order = {"order_by": [{"field_name": f"metrics.{VAL_BPB}", "ascending": True}]} if best or run_id is None else {}
            types = (MODEL_TYPE,) if best else (MODEL_TYPE, SNAPSHOT_TYPE)
            listed = [m for each in types for m in store.models_of(client, experiment_id, each, run_id, **order)]
            found = [m for m in listed if str(m.status) == "READY"]
            names = {id: client.get_run(id).info.run_name or "" for id in {m.source_run_id for m in found} if id}
        rows = [_row(m, names.get(m.source_run_id or "", "")) for m in found]
        if run_id and not best:
            return sorted(rows, key=lambda row: row.step)
        ordered = sorted(rows, key=lambda row: math.inf if row.val_bpb is None else row.val_bpb)
        return [row for row in ordered if row.val_bpb is not None][:1] if best else ordered


def _place(client: MlflowClient, uri: str) -> str:
    """Where the files of a models:/ URI are. MLflow itself would look in the process's own store, whatever tracking_uri it is given."""
    parts = uri.removeprefix("models:/").strip("/").split("/")
    named = 1 if "@" in parts[0] else 2
    found = get_model_name_and_version(client, f"models:/{'/'.join(parts[:named])}")  # type: ignore[no-untyped-call]
    place = client.get_model_version_download_uri(*found) if len(found) == 2 else client.get_logged_model(*found).artifact_location
    return "/".join([str(place).rstrip("/"), *parts[named:]])


def _row(model: LoggedModel, run_name: str) -> MirroredCheckpoint:
    def last(key: str) -> float | None:
        values = [m.value for m in model.metrics or [] if m.key == key]
        return values[0] if values and 0 < values[0] < sys.float_info.max else None  # 0: NaN, as version 0.2.0 logged it

    step = store.whole_number((model.params or {}).get("step"))
    uri = (model.tags or {}).get("bdh.checkpoint", model.name or "")
    return MirroredCheckpoint(uri, step, last(VAL_LOSS), last(VAL_BPB), run_name)
