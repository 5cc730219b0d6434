"""One grammar for what to continue, one answer: a verified checkpoint on this disk.

    latest                                 the run directory saved to last, else the newest run with a mirrored checkpoint
    PATH                                   a checkpoint file, or a run directory (its newest checkpoint that verifies)
    RUN_ID, runs:/RUN_ID                   of the run's local and mirrored checkpoints the furthest that verifies
    runs:/RUN_ID/checkpoints/.../FILE.pt   that one
    any other URI MLflow downloads         mlflow-artifacts:/..., s3://..., models:/NAME/VERSION: that file, or the newest in that folder
    latest:N, DIRECTORY:N, RUN_ID:N, runs:/RUN_ID:N    of that run the checkpoint of step N

What is only mirrored is downloaded into the directory it came from, under `checkpoint_dir`. Damaged files are named and passed over where
there is a choice. A file of another program with BDH weights in it is a warm start. Nothing is written unless a checkpoint is found.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Checkpoint
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import CheckpointError, InputError, ResumeError
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import journal, store
from bdh_mlflow.tracking.mirror import MODEL_TYPE, VAL_LOSS

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_RUNS_URI = re.compile(r"runs:/+([^/]+)/?(.*)")
_URI = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_WITH_STEP = re.compile(r"(runs:/+[^/:]+|(?![a-z][a-z0-9+.-]+:/).+):(\d+)", re.IGNORECASE)
GRAMMAR = "latest, a path, a run id, runs:/RUN_ID[/checkpoints/.../checkpoint_N.pt] or an artifact URI; RUN:N for its step N"


@dataclass(frozen=True)
class Found:
    """What a target means.

    checkpoint: None for a warm start.   state: contents of the file.   notes: what was passed over.   run_id: the MLflow run that the
    target names, None if it names none.
    """

    path: Path
    checkpoint: Checkpoint | None
    state: dict[str, Any]
    notes: tuple[str, ...]
    run_id: str | None = None


def find(target: str, checkpoint_dir: Path, config: TrackingConfig) -> Found:
    """The checkpoint that `target` names, verified and loaded.   Raises ResumeError or CheckpointError."""
    if target.endswith(".safetensors"):
        raise ResumeError(f"{target}: an exported file holds weights alone; generate and evaluate take it. Here: {GRAMMAR}")
    notes: list[str] = []
    found: Checkpoint | Path
    run_id = None
    if (match := _WITH_STEP.fullmatch(target)) and not Path(target).exists():
        run_id, found = _at_step(match[1], int(match[2]), checkpoint_dir, config, notes)
    elif target == "latest":
        found = _latest(checkpoint_dir, config, notes)
    elif _RUN_ID.fullmatch(target):
        run_id, found = _training(store.connect(config), target)[0], _of_run(target, checkpoint_dir, config, notes)
    elif match := _RUNS_URI.fullmatch(target):
        named, path = match.groups()
        run_id = _training(store.connect(config), named)[0]
        found = _at_run_path(named, path, checkpoint_dir, config, notes) if path else _of_run(named, checkpoint_dir, config, notes)
    elif _URI.match(target):
        found = _at_uri(target, checkpoint_dir, config, notes)
    else:
        found = _at_path(Path(target), notes)
    if isinstance(found, Path):
        return Found(found, None, checkpoint.load(found), tuple(notes))
    return Found(found.path, found, checkpoint.load(found.path), tuple(notes), run_id)


def run_of(found: Checkpoint) -> str | None:
    """The MLflow run of a checkpoint: the one it was saved under, else the one its journal has got since."""
    delivered = journal.delivered(found.path.parent)
    return found.manifest.mlflow_run_id or (delivered.run_id if delivered else None)


def mirrored(run_id: str, config: TrackingConfig) -> tuple[str, list[tuple[int, str]]]:
    """Id of the run that holds the training, and steps and artifact paths of its mirrored checkpoints, oldest first."""
    client = store.connect(config)
    match = _RUNS_URI.fullmatch(run_id)
    run_id, _ = _training(client, match[1] if match else run_id)
    return run_id, _mirrored(client, run_id)[::-1]


def fetch(run_id: str, path: str, folder: Path, config: TrackingConfig) -> Checkpoint:
    """Download a mirrored checkpoint with its manifest into `folder` and verify it.   Raises ResumeError or CheckpointError."""
    store.connect(config)
    file = download(f"runs:/{run_id}/{path}", folder)
    download(f"runs:/{run_id}/{path.removesuffix('.pt')}.json", folder)
    found = checkpoint.describe(file)
    checkpoint.verify(found)
    return found


def _latest(checkpoint_dir: Path, config: TrackingConfig, notes: list[str]) -> Checkpoint:
    for run_dir in _by_last_save(checkpoint_dir):
        found, passed_over = checkpoint.newest(run_dir)
        notes += passed_over
        if found:
            return found
    return _of_run(_newest_mirrored(checkpoint_dir, config), checkpoint_dir, config, notes)


def _by_last_save(checkpoint_dir: Path) -> list[Path]:
    """Run directories with a checkpoint, the one saved to last first."""
    found = []
    for run_dir in checkpoint.list_all(checkpoint_dir):
        found += [(c.manifest.saved_at, run_dir) for c in checkpoint.list_run(run_dir).checkpoints[-1:]]
    return [run_dir for _, run_dir in sorted(found, reverse=True)]


def _newest_mirrored(checkpoint_dir: Path, config: TrackingConfig) -> str:
    """Id of the newest run with a mirrored checkpoint."""
    client = store.connect(config)
    for run in store.runs_of(client, config.experiment):
        return str(run.info.run_id)
    raise ResumeError(
        f"latest: no checkpoint in {checkpoint_dir.absolute()} and none mirrored in experiment {config.experiment} "
        f"of {masked(client.tracking_uri)}"
    )


def _at_step(run: str, step: int, checkpoint_dir: Path, config: TrackingConfig, notes: list[str]) -> tuple[str | None, Checkpoint | Path]:
    """The checkpoint of one step of a run, and the run's id if it is found by that."""
    if run == "latest":
        folder = next(iter(_by_last_save(checkpoint_dir)), None)
        run = str(folder or _newest_mirrored(checkpoint_dir, config))
        if folder and not (folder / checkpoint.file_name(step)).is_file():
            run = run_of(checkpoint.list_run(folder).checkpoints[-1]) or run  # the mirror may have it
    uri = _RUNS_URI.fullmatch(run)
    if uri or _RUN_ID.fullmatch(run):
        return _at_step_of_run(uri[1] if uri else run, step, checkpoint_dir, config, notes)
    folder, path = Path(run), Path(run) / checkpoint.file_name(step)
    if not folder.is_dir():
        why = "a file is one step already, leave the number away" if folder.is_file() else f"no such folder (looked in {Path.cwd()})"
        raise ResumeError(f"{run}: {why}; accepted: {GRAMMAR}")
    if not path.is_file():
        raise _no_such_step(run, step, {c.manifest.step for c in checkpoint.list_run(folder).checkpoints})
    return None, _at_path(path, notes)


def _at_step_of_run(
    run_id: str, step: int, checkpoint_dir: Path, config: TrackingConfig, notes: list[str]
) -> tuple[str, Checkpoint | Path]:
    client = store.connect(config)
    run_id, run_dir = _training(client, run_id)
    there = dict(_mirrored(client, run_id))
    if step in there:
        return run_id, _at_run_path(run_id, there[step], checkpoint_dir, config, notes)
    saved = checkpoint.list_run(checkpoint_dir / run_dir).checkpoints if run_dir else ()
    here = {c.manifest.step: c for c in saved if run_of(c) == run_id}
    if step not in here:
        raise _no_such_step(f"run {run_id}", step, {*there, *here})
    checkpoint.verify(here[step])
    return run_id, here[step]


def _no_such_step(run: str, step: int, steps: set[int]) -> ResumeError:
    return ResumeError(f"{run}: no checkpoint of step {step}; it has {', '.join(map(str, sorted(steps))) or 'none'}")


def _at_path(path: Path, notes: list[str]) -> Checkpoint | Path:
    if path.is_dir():
        found, passed_over = checkpoint.newest(path)
        notes += passed_over
        if found:
            return found
        below = checkpoint.list_all(path)
        hint = f"; it holds run directories, name one of them ({below[-1]})" if below else ""
        raise ResumeError("\n  ".join([f"{path}: no checkpoint in this folder that verifies{hint}", *passed_over]))
    if not path.is_file():
        raise ResumeError(f"{path}: no such file or folder (looked in {Path.cwd()}); accepted: {GRAMMAR}")
    if not path.with_suffix(".json").is_file() and checkpoint.published_weights(checkpoint.load(path)) is not None:
        return path
    try:
        found = checkpoint.describe(path)
        checkpoint.verify(found)
    except CheckpointError as error:
        others = [c for c in checkpoint.list_run(path.parent).checkpoints if c.path != path]
        raise CheckpointError(f"{error}" + (f". Newest complete: {others[-1].path.name}" if others else "")) from None
    return found


def _of_run(run_id: str, checkpoint_dir: Path, config: TrackingConfig, notes: list[str]) -> Checkpoint:
    client = store.connect(config)
    run_id, run_dir = _training(client, run_id)
    local, passed_over = checkpoint.newest(checkpoint_dir / run_dir) if run_dir else (None, [])
    notes += passed_over
    if local is not None and run_of(local) != run_id:
        local = None
    for step, path in _mirrored(client, run_id):
        if local is not None and step <= local.manifest.step:
            break
        try:
            return _fetch(f"runs:/{run_id}/{path}", checkpoint_dir, config)
        except (CheckpointError, ResumeError) as error:
            notes.append(str(error))
    if local is None:
        raise ResumeError("\n  ".join([f"run {run_id}: no checkpoint that verifies, neither in {checkpoint_dir} nor mirrored", *notes]))
    return local


def _at_run_path(run_id: str, path: str, checkpoint_dir: Path, config: TrackingConfig, notes: list[str]) -> Checkpoint | Path:
    client = store.connect(config)
    run_id, _ = _training(client, run_id)
    artifact = PurePosixPath(path)
    if artifact.suffix != ".pt":
        return _at_uri(f"runs:/{run_id}/{path}", checkpoint_dir, config, notes)
    local = checkpoint_dir / artifact.parent.name / artifact.name
    with contextlib.suppress(CheckpointError):
        found = checkpoint.describe(local)
        if run_of(found) == run_id:
            checkpoint.verify(found)
            return found
    return _fetch(f"runs:/{run_id}/{path}", checkpoint_dir, config)


def _at_uri(uri: str, checkpoint_dir: Path, config: TrackingConfig, notes: list[str]) -> Checkpoint | Path:
    store.connect(config)
    if uri.endswith(".pt"):
        return _fetch(uri, checkpoint_dir, config)
    with _download_folder(checkpoint_dir) as folder:
        root = download(uri, folder)
        passed_over: list[str] = []
        candidates = []
        for run_dir in sorted({p.parent for p in root.rglob("checkpoint_*.pt")}):
            found, reasons = checkpoint.newest(run_dir)
            passed_over += reasons
            candidates += [(found.manifest.step, found)] if found else []
        if not candidates:
            raise ResumeError("\n  ".join([f"{uri}: no checkpoint that verifies in it", *passed_over]))
        notes += passed_over
        return _settle(max(candidates, key=lambda c: c[0])[1], checkpoint_dir)


def _fetch(uri: str, checkpoint_dir: Path, config: TrackingConfig) -> Checkpoint:
    """Download one checkpoint and its manifest, verify them, and put them where the run left them."""
    with _download_folder(checkpoint_dir) as folder:
        path = download(uri, folder)
        with contextlib.suppress(ResumeError):
            download(uri.removesuffix(".pt") + ".json", folder)
        found = checkpoint.describe(path)
        checkpoint.verify(found)
        return _settle(found, checkpoint_dir)


def _settle(found: Checkpoint, checkpoint_dir: Path) -> Checkpoint:
    run_dir = checkpoint_dir / found.manifest.run_dir
    for known in checkpoint.list_run(run_dir).checkpoints:
        other = run_of(known)
        if None not in (other, found.manifest.mlflow_run_id) and other != found.manifest.mlflow_run_id:
            raise ResumeError(f"{run_dir}: holds checkpoints of another run ({other}); set another training.checkpoint_dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / found.path.name
    path.with_suffix(".json").unlink(missing_ok=True)
    found.path.replace(path)
    found.manifest_path.replace(path.with_suffix(".json"))
    return checkpoint.describe(path)


@contextlib.contextmanager
def _download_folder(checkpoint_dir: Path) -> Iterator[Path]:
    """A folder on the file system of the checkpoints that is gone afterwards, with whatever was made for it and left empty."""
    made = [p for p in (checkpoint_dir, *checkpoint_dir.parents) if not p.exists()]
    try:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=checkpoint_dir) as folder:
            yield Path(folder)
    except OSError as error:
        raise ResumeError(f"{checkpoint_dir}: cannot be written: {error.strerror or error}") from None
    finally:
        for folder_made in made:
            with contextlib.suppress(OSError):
                folder_made.rmdir()


def download(uri: str, folder: Path) -> Path:
    """What an artifact URI names, in `folder`.   Raises ResumeError."""
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except Exception as error:  # each artifact store raises its own kinds
        raise ResumeError(f"{masked(uri)}: cannot be downloaded: {masked(str(error).splitlines()[0])}") from None


def _training(client: MlflowClient, run_id: str) -> tuple[str, str | None]:
    """The run that holds the training (the wrapper run of a later segment names it), and its run directory."""
    with store.reported(f"run {run_id} cannot be read"):
        run = store.find_run(client, run_id)
        if run is not None and "bdh.continues" in run.data.tags:
            run = store.find_run(client, run.data.tags["bdh.continues"])
    if run is None:
        raise ResumeError(f"run {run_id}: not found at {masked(client.tracking_uri)}; accepted: {GRAMMAR}")
    return run.info.run_id, run.data.tags.get("bdh.run_dir")


def _mirrored(client: MlflowClient, run_id: str) -> list[tuple[int, str]]:
    """Steps and artifact paths of a run's mirrored checkpoints, furthest first."""
    try:
        folders = [f.path for f in client.list_artifacts(run_id, "checkpoints") if f.is_dir]
        files = [PurePosixPath(f.path) for folder in folders for f in client.list_artifacts(run_id, folder)]
    except MlflowException as error:
        raise ResumeError(f"run {run_id}: artifacts cannot be listed: {masked(str(error).splitlines()[0])}") from None
    steps = [(checkpoint.step_of(Path(file.name)), str(file)) for file in files]
    return sorted(((step, path) for step, path in steps if step is not None), reverse=True)


@dataclass(frozen=True)
class Mirrored:
    """A mirrored checkpoint.   checkpoint: URI that `resume` takes.   val_loss: nats per token, None if it was not evaluated."""

    checkpoint: str
    step: int
    val_loss: float | None
    run_name: str


def search(config: TrackingConfig, run_id: str | None, best: bool) -> list[Mirrored]:
    """Checkpoints of one run by step, or of all runs of the experiment, best first.   best: only the one of lowest validation loss.

    Raises InputError or TrackingError.
    """
    client = store.connect(config)
    with store.reported("mirrored checkpoints cannot be listed"):
        if run_id is not None:
            experiment_id = client.get_run(run_id).info.experiment_id
        else:
            experiment = client.get_experiment_by_name(config.experiment)
            if experiment is None:
                raise InputError(f"experiment {config.experiment}: not found at {masked(client.tracking_uri)}")
            experiment_id = experiment.experiment_id
        wanted = f"model_type = '{MODEL_TYPE}'" + (f" AND source_run_id = '{run_id}'" if run_id else "")
        order = [{"field_name": f"metrics.{VAL_LOSS}", "ascending": True}] if best or run_id is None else None
        found: list[LoggedModel] = []
        page = client.search_logged_models([experiment_id], wanted, max_results=1 if best else None, order_by=order)
        found += page
        while page.token and not best:
            page = client.search_logged_models([experiment_id], wanted, order_by=order, page_token=page.token)
            found += page
        names = {id: client.get_run(id).info.run_name or "" for id in {m.source_run_id for m in found} if id}
    rows = [_row(m, names.get(m.source_run_id or "", "")) for m in found]
    if best:
        return [row for row in rows if row.val_loss is not None][:1]
    return sorted(rows, key=lambda row: row.step) if run_id else rows


def _row(model: LoggedModel, run_name: str) -> Mirrored:
    values = [m.value for m in model.metrics or [] if m.key == VAL_LOSS]
    step = int((model.params or {}).get("step", 0))
    return Mirrored((model.tags or {}).get("bdh.checkpoint", model.name or ""), step, values[0] if values else None, run_name)
