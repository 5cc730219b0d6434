"""The mirror of a run's checkpoints among its artifacts: verified before one is tagged as the latest, and listed as LoggedModels.

Stored by hard link where the artifact store is a folder on the same file system, else uploaded, manifest last; through a server on this
machine throttled, so that the training beside it keeps its speed.
"""

import contextlib
import errno
import functools
import io
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Checkpoint
from bdh_mlflow.checkpoint.files import PIECE_BYTES
from bdh_mlflow.files import first_line
from bdh_mlflow.tracking import mlflow_internals, store
from bdh_mlflow.tracking.records import RunIdentity
from bdh_mlflow.tracking.store import local_path, on_this_machine

LARGE_BYTES = 50_000_000  # from here on a failed upload is worth a word about limits
SAME_HOST_UPLOAD_BYTES_PER_S = 32e6  # to a server on this machine, which receives and writes with the cores that train
MODEL_TYPE = "bdh-checkpoint"
VAL_LOSS = "val/loss"


class Mirror:
    """The mirror of one run's checkpoints.

    note: called with a line for the user.   throttle: called between pieces of an upload with the seconds to wait; returns sooner when
    there is no training run beside it any more.
    """

    def __init__(self, client: MlflowClient, run: RunIdentity, note: Callable[[str], None], throttle: Callable[[float], object]) -> None:
        self._client, self._run, self._note, self._throttle = client, run, note, throttle
        self._folder = local_path(run.artifact_uri)
        self._warned: set[str] = set()
        self._begun: set[str] = set()

    @functools.cached_property
    def _repository(self) -> ArtifactRepository:
        return get_artifact_repository(self._run.artifact_uri, tracking_uri=self._client.tracking_uri)

    def store(self, saved: Checkpoint, keep: int | None, evaluation: list[Metric], *, newest: bool = True) -> None:
        """Mirror a checkpoint, check what arrived, tag it, then prune.   Raises whatever the store does; may be called again.

        keep: newest checkpoints that retention keeps.   evaluation: points of the run's validation curves at its step.   newest: whether
        it is to be tagged as the latest.
        """
        started, manifest, run_id = time.perf_counter(), saved.manifest, self._run.run_id
        remote = f"checkpoints/{saved.path.parent.name}"
        manifest_file = saved.manifest_path.read_bytes()  # now: retention or a rewind may come while the file is under way
        if not self._is_there(saved, manifest_file, remote):
            self._client.log_artifact(run_id, str(saved.path.parent / checkpoint.CONFIG_NAME), remote)
            for file, said in saved.files:
                self._upload(file, said.bytes, remote)
            self._client.log_text(run_id, manifest_file.decode(), f"{remote}/{saved.manifest_path.name}")
        self._verify(saved, manifest_file, remote)
        run = self._client.get_run(run_id)
        self._describe(saved, evaluation, run)
        tags = self._pointers(saved, newest, run.data.tags)
        known = {m.step for m in self._client.get_metric_history(run_id, "ckpt/upload_s")}
        took = Metric("ckpt/upload_s", time.perf_counter() - started, int(time.time() * 1000), manifest.step)
        points = [] if manifest.step in known else [took]
        self._client.log_batch(run_id, metrics=points, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
        if keep is not None:
            self._prune(remote, keep, tags.get("bdh.best_checkpoint"), manifest.step)

    def _is_there(self, saved: Checkpoint, manifest_file: bytes, remote: str) -> bool:
        """Whether an earlier attempt has stored this very checkpoint. The manifest of another one goes before its file is replaced."""
        sizes, name = self._sizes(remote), saved.manifest_path.name
        if name not in sizes:
            return False
        if store.small_artifact(self._client, self._run.run_id, f"{remote}/{name}") == manifest_file:
            return all(sizes.get(file.name) == said.bytes for file, said in saved.files)
        with contextlib.suppress(Exception):  # not every store lets files be deleted; it is replaced in a moment anyway
            self._repository.delete_artifacts(f"{remote}/{name}")  # type: ignore[no-untyped-call]
        return False

    def _upload(self, file: Path, size: int, remote: str) -> None:
        if self._folder is not None:
            link_or_copy(file, self._folder / remote / file.name)
            return
        try:
            self._put(file, remote)
        except FileNotFoundError:
            raise
        except Exception as error:  # each artifact store raises its own kinds
            if size >= LARGE_BYTES and file.name not in self._warned:
                self._warned.add(file.name)
                self._note(_about_limits(file, size, error))
            raise

    def _put(self, path: Path, remote: str) -> None:
        """MLflow's own upload; through a server on this machine the same request, throttled.

        Throttled only the first time: there are servers that give a request no more than some seconds.
        """
        repository, again = self._repository, path.name in self._begun
        self._begun.add(path.name)
        throttled = not again and mlflow_internals.is_single_request(repository, path) and on_this_machine(repository.artifact_uri)
        if not throttled:
            self._client.log_artifact(self._run.run_id, str(path), remote)
            return
        with ThrottledFile(path, SAME_HOST_UPLOAD_BYTES_PER_S, self._throttle) as file:
            mlflow_internals.put(repository, f"/{remote}/{path.name}", file)

    def _verify(self, saved: Checkpoint, manifest_file: bytes, remote: str) -> None:
        """Size everywhere; the digest where the store is a folder here, unless both names are one file."""
        for file, said in saved.files if self._folder is not None else ():
            assert self._folder is not None
            copy = self._folder / remote / file.name
            if not copy.samefile(file) and checkpoint.file_digest(copy) != said.sha256:
                copy.unlink()
                raise OSError(f"{remote}/{file.name} arrived damaged")
        sizes = self._sizes(remote)
        for name, size in (*((file.name, said.bytes) for file, said in saved.files), (saved.manifest_path.name, len(manifest_file))):
            if name not in sizes:
                raise OSError(f"{remote}/{name} did not arrive")
            if sizes[name] not in (size, None):
                raise OSError(f"{remote}/{name} arrived with {sizes[name]} of {size} bytes")

    def _sizes(self, remote: str) -> dict[str, int | None]:
        return {PurePosixPath(f.path).name: f.file_size for f in self._client.list_artifacts(self._run.run_id, remote)}

    def _pointers(self, saved: Checkpoint, newest: bool, have: dict[str, str]) -> dict[str, str]:
        manifest = saved.manifest
        tags = {"bdh.run_dir": manifest.run_dir} | ({"bdh.latest_checkpoint": manifest.artifact_path} if newest else {})
        if manifest.val_loss is not None and manifest.val_loss < _number(have.get("bdh.best_val_loss")):
            return {**tags, "bdh.best_checkpoint": manifest.artifact_path, "bdh.best_val_loss": repr(manifest.val_loss)}
        return tags | {key: have[key] for key in ("bdh.best_checkpoint",) if key in have}

    def _describe(self, saved: Checkpoint, evaluation: list[Metric], run: Run) -> None:
        """A LoggedModel that points to the checkpoint, so that one search finds the best of all runs. Metadata, not a second copy."""
        client, manifest, run_id = self._client, saved.manifest, self._run.run_id
        model = self._model(manifest.step)
        digest = manifest.files[0].sha256
        tags = {"bdh.checkpoint": f"runs:/{run_id}/{manifest.artifact_path}", "bdh.sha256": digest}
        if model is None:
            params = {"step": str(manifest.step), "tokens_seen": str(manifest.tokens_seen)}
            name = f"bdh-step-{manifest.step}"  # not `checkpoint...`: runs:/ID/NAME would then mean the model
            model = client.create_logged_model(self._run.experiment_id, name, run_id, tags, params, MODEL_TYPE)
        elif model.tags.get("bdh.sha256") != digest:
            client.set_logged_model_tags(model.model_id, tags)
        if str(model.status) != "READY":
            linked_to = {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}
            if model.model_id not in linked_to:  # a second link of the two is refused, for ever
                client.log_outputs(run_id, [LoggedModelOutput(model.model_id, manifest.step)])
            client.finalize_logged_model(model.model_id, "READY")
        if evaluation and not any(m.key == VAL_LOSS for m in model.metrics or []):
            inputs = run.inputs.dataset_inputs if run.inputs else []
            datasets = [i.dataset for i in inputs if any(t.value == "validation" for t in i.tags)]
            data = datasets[0] if datasets else None
            # The points are those of the run, time stamp and all, so the run's curve does not get them twice.
            source = {"dataset_name": data.name, "dataset_digest": data.digest} if data else {}
            linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model.model_id, **source) for m in evaluation]
            client.log_batch(run_id, metrics=linked, synchronous=True)

    def _model(self, step: int) -> LoggedModel | None:
        wanted = f"name = 'bdh-step-{step}' AND source_run_id = '{self._run.run_id}'"
        return next(iter(self._client.search_logged_models([self._run.experiment_id], wanted, max_results=1)), None)

    def _prune(self, remote: str, keep: int, best: str | None, up_to: int) -> None:
        """The mirror keeps what retention keeps: the newest `keep` up to this step, and the best."""
        steps = sorted(s for name in self._sizes(remote) if (s := checkpoint.step_of(Path(name))) is not None and s <= up_to)
        for step in steps[:-keep]:
            file = checkpoint.file_name(step)
            if best == f"{remote}/{file}":
                continue
            try:
                if model := self._model(step):  # the file last: as long as it is there, what was interrupted here is done again
                    self._client.delete_logged_model(model.model_id)
            except MlflowException as error:
                if not store.is_refusal(error):
                    raise
                self._stays(file, error)
                continue
            try:
                for name in (Path(file).with_suffix(".json").name, file):
                    self._repository.delete_artifacts(f"{remote}/{name}")  # type: ignore[no-untyped-call]
            except FileNotFoundError:
                pass
            except Exception as error:  # each store refuses in its own way
                self._stays(file, error)

    def _stays(self, file: str, error: Exception) -> None:
        """Pruning is a convenience: a failure is reported once, and the file stays."""
        if file not in self._warned:
            self._warned.add(file)
            self._note(f"tracking: {file} stays in the mirror: {first_line(error)}")


class ThrottledFile(io.FileIO):
    """A file that is read no faster than `bytes_per_s`, also after a pause: lost time is not made up for.   throttle: waits."""

    def __init__(self, path: Path, bytes_per_s: float, throttle: Callable[[float], object]) -> None:
        super().__init__(path)
        self._bytes_per_s, self._throttle = bytes_per_s, throttle
        self._began, self._read = time.monotonic(), 0

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, after a pause where they come too early."""
        if self._read >= PIECE_BYTES:
            self._throttle(max(0.0, self._read / self._bytes_per_s - (time.monotonic() - self._began)))
            self._began, self._read = time.monotonic(), 0
        block = super().read(-1 if size is None else size)
        self._read += len(block)
        return block


def link_or_copy(source: Path, target: Path) -> None:
    """One file under two names where the file system allows it, else a synced copy; never half of one.   Raises OSError.

    Safe because checkpoints are written once and renamed, never changed in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS):
            raise
        with source.open("rb") as read, partial.open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 20)
            write.flush()
            os.fsync(write.fileno())
    partial.replace(target)
    partial.unlink(missing_ok=True)  # renaming a name of one file onto another name of it does nothing (rename(2))


def _number(text: str | None) -> float:
    """A finite number in a tag; infinity where there is none."""
    try:
        value = float(text or "inf")
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf


def _about_limits(file: Path, size: int, error: Exception) -> str:
    return (
        f"tracking: {file.name} ({size / 1e6:,.0f} MB) was not taken ({first_line(error)}). If a proxy limits "
        f"bodies, raise its limit (nginx: client_max_body_size); against time-outs set MLFLOW_HTTP_REQUEST_TIMEOUT (s) here and the "
        f"server's own; for a server before S3 or the like MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=true; tracking.mirror_checkpoints: false "
        f"keeps files here only"
    )
