"""The mirror of a run's checkpoints among its artifacts: verified before one is tagged as the latest, and listed as LoggedModels.

Stored by hard link where the artifact store is a folder on the same file system, else uploaded, manifest last; through a server on this
machine throttled, so that the training beside it keeps its speed.
"""

import contextlib
import functools
import io
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, RunTag
from mlflow.exceptions import MlflowException

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Checkpoint, Saved, Snapshot
from bdh_mlflow.checkpoint.files import PIECE_BYTES
from bdh_mlflow.files import UNLINKABLE, first_line
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.run_store import RunStore

LARGE_BYTES = 50_000_000  # from here on a failed upload is worth a word about limits
SAME_HOST_UPLOAD_BYTES_PER_S = 32e6  # to a server on this machine, which receives and writes with the cores that train
MODEL_TYPE, SNAPSHOT_TYPE = "bdh-checkpoint", "checkpoint"
VAL_LOSS, VAL_BPB = "val/loss", "val/bpb"


@dataclass
class _Model:
    """A checkpoint in the run's list of models.   linked: the run names it as its output.   evaluated: it has a validation loss."""

    model_id: str
    sha256: str | None
    ready: bool = False
    linked: bool = False
    evaluated: bool = False


@dataclass
class _Known:
    """What the store has of this run's checkpoints: of a run that this delivery has made, what was sent; of another one, what it says.

    sizes: files of a folder, once it was listed.   models: by step.   uploads: steps with a point `ckpt/upload_s`.   best: artifact path
    and score of the best checkpoint.   compared_by: what the score is of.   validation: name and digest of the validation text.
    """

    sizes: dict[str, dict[str, int | None]] = field(default_factory=dict)
    models: dict[int, _Model] = field(default_factory=dict)
    uploads: set[int] = field(default_factory=set)
    best: tuple[str | None, float] = (None, math.inf)
    compared_by: str | None = None
    validation: tuple[str, str] | None = None


class Mirror:
    """The mirror of one run's checkpoints.

    note: called with a line for the user.   throttle: called between pieces of an upload with the seconds to wait; returns sooner when
    there is no training run beside it any more.   made_here: this delivery has made the run, so that nothing is there that it has not sent.
    """

    def __init__(self, run: RunStore, note: Callable[[str], None], throttle: Callable[[float], object], *, made_here: bool) -> None:
        self._run, self._note, self._throttle = run, note, throttle
        self._client, self._artifacts = run.client, run.artifacts
        self._known = _Known() if made_here else None
        self._beside: set[str] = set()
        self._warned: set[str] = set()
        self._begun: set[str] = set()
        self.validation: tuple[str, str] | None = None
        """Name and digest of the validation text, where this delivery has sent them."""

    def store(self, saved: Saved, keep: int | None, evaluation: Callable[[], list[Metric]], *, newest: bool = True) -> None:
        """Mirror a checkpoint, check what arrived, tag it, then prune.   Raises whatever the store does; may be called again.

        keep: newest checkpoints that retention keeps.   evaluation: gives the points of the run's validation curves at its step; asked when
        the files are there.   newest: whether it is to be tagged as the latest.
        """
        started, manifest = time.perf_counter(), saved.manifest
        remote = f"checkpoints/{saved.path.parent.name}"
        manifest_file = saved.manifest_path.read_bytes()  # now: retention or a rewind may come while the file is under way
        known, self._known = self._known or self._asked(saved, remote), None  # until all of it has gone well
        if not self._is_there(saved, manifest_file, remote, known):
            self._run.together(
                lambda: self._put_beside(saved, remote),
                *(functools.partial(self._upload, file, said.bytes, f"{remote}/{name}") for file, name, said in saved.files),
            )
            arrive = functools.partial(self._complete, saved, manifest_file, remote, known)
        else:
            arrive = functools.partial(self._verify, saved, len(manifest_file), remote, known)
        model: list[_Model] = []
        self._run.together(arrive, lambda: model.append(self._listed(saved, known)))
        points = self._linked(evaluation(), model[0], known)
        if manifest.step not in known.uploads:
            points.append(Metric("ckpt/upload_s", time.perf_counter() - started, int(time.time() * 1000), manifest.step))
        tags = [RunTag(k, v) for k, v in self._pointers(saved, newest, known).items()]
        log = functools.partial(self._client.log_batch, self._run.run_id, points, tags=tags, synchronous=True)
        self._run.together(log, *[functools.partial(self._finalize, model[0])] * (not model[0].ready))
        known.uploads.add(manifest.step)
        model[0].evaluated = model[0].evaluated or any(m.model_id for m in points)
        if keep is not None:
            self._prune(remote, keep, manifest.step, known)
        self._known = known

    def _asked(self, saved: Saved, remote: str) -> _Known:
        """What the store says."""
        client, run_id, known = self._client, self._run.run_id, _Known()

        def of_the_run() -> None:
            run = client.get_run(run_id)
            inputs = run.inputs.dataset_inputs if run.inputs else []
            texts = [i.dataset for i in inputs if any(t.value == "validation" for t in i.tags)]
            known.validation = (texts[0].name, texts[0].digest) if texts else None
            known.best = run.data.tags.get("bdh.best_checkpoint"), saved.manifest.score_in(run.data.tags)
            linked.update(output.model_id for output in (run.outputs.model_outputs if run.outputs else []))

        linked: set[str] = set()
        models: list[LoggedModel] = []
        self._run.together(
            of_the_run,
            lambda: self._list(remote, known),
            lambda: models.extend(store.models_of(client, self._run.identity.experiment_id, _type_of(saved), run_id)),
            lambda: known.uploads.update(m.step for m in client.get_metric_history(run_id, "ckpt/upload_s")),
        )
        for model in models:
            digest, ready = model.tags.get("bdh.sha256"), str(model.status) == "READY"
            found = _Model(model.model_id, digest, ready, model.model_id in linked, evaluated=bool(model.metrics))
            known.models[store.whole_number((model.params or {}).get("step"))] = found
        return known

    def _list(self, remote: str, known: _Known) -> dict[str, int | None]:
        known.sizes[remote] = self._artifacts.sizes(remote)
        return known.sizes[remote]

    def _size(self, path: str, known: _Known) -> int | None:
        """Size of a file among the artifacts; None where it is not there, or the store does not tell."""
        folder, _, name = path.rpartition("/")
        return (known.sizes[folder] if folder in known.sizes else self._list(folder, known)).get(name)

    def _is_there(self, saved: Saved, manifest_file: bytes, remote: str, known: _Known) -> bool:
        """Whether an earlier attempt has stored this very checkpoint. The manifest of another one goes before its file is replaced."""
        sizes, name = known.sizes.get(remote, {}), saved.manifest_path.name
        if name not in sizes:
            return False
        if self._artifacts.read(f"{remote}/{name}") == manifest_file:
            return all(self._size(f"{remote}/{name}", known) == said.bytes for _, name, said in saved.files)
        with contextlib.suppress(Exception):  # not every store lets files be deleted; it is replaced in a moment anyway
            self._artifacts.delete(f"{remote}/{name}")
        return False

    def _put_beside(self, saved: Saved, remote: str) -> None:
        """The files beside the checkpoints, once."""
        if remote not in self._beside:
            for name in saved.beside:
                self._artifacts.put(saved.path.parent / name, remote)
            self._beside.add(remote)

    def _complete(self, saved: Saved, manifest_file: bytes, remote: str, known: _Known) -> None:
        """The manifest, behind its files."""
        self._artifacts.put_text(manifest_file.decode(), f"{remote}/{saved.manifest_path.name}")
        self._verify(saved, len(manifest_file), remote, known)

    def _upload(self, file: Path, size: int, path: str) -> None:
        if self._artifacts.folder is not None:
            link_or_copy(file, self._artifacts.folder / path)
            return
        throttled = path not in self._begun  # only the first time: there are servers that give a request no more than some seconds
        self._begun.add(path)
        try:
            if throttled and self._artifacts.shares_this_machine(file):
                with ThrottledFile(file, SAME_HOST_UPLOAD_BYTES_PER_S, self._throttle) as content:
                    self._artifacts.put_content(content, path)
            else:
                self._artifacts.put(file, str(PurePosixPath(path).parent))
        except FileNotFoundError:
            raise
        except Exception as error:  # each artifact store raises its own kinds
            if size >= LARGE_BYTES and path not in self._warned:
                self._warned.add(path)
                self._note(_about_limits(file, size, error))
            raise

    def _verify(self, saved: Saved, manifest_bytes: int, remote: str, known: _Known) -> None:
        """Size everywhere; the digest where the store is a folder here, unless both names are one file."""
        for file, name, said in saved.files if self._artifacts.folder is not None else ():
            assert self._artifacts.folder is not None
            copy = self._artifacts.folder / remote / name
            if not copy.samefile(file) and checkpoint.file_digest(copy) != said.sha256:
                copy.unlink()
                raise OSError(f"{remote}/{name} arrived damaged")
        expected = {f"{remote}/{name}": said.bytes for _, name, said in saved.files}
        expected[f"{remote}/{saved.manifest_path.name}"] = manifest_bytes
        if saved.tokenizer:
            expected[f"{remote}/{saved.tokenizer.name}"] = saved.tokenizer.bytes
        folders = {path.rpartition("/")[0] for path in expected}
        self._run.together(*(functools.partial(self._list, folder, known) for folder in sorted(folders)))
        for path, size in expected.items():
            folder, _, name = path.rpartition("/")
            if name not in known.sizes[folder]:
                raise OSError(f"{path} did not arrive")
            if known.sizes[folder][name] not in (size, None):
                raise OSError(f"{path} arrived with {known.sizes[folder][name]} of {size} bytes")

    def _pointers(self, saved: Saved, newest: bool, known: _Known) -> dict[str, str]:
        manifest = saved.manifest
        lowest = known.best[1] if known.compared_by in (None, manifest.compared_by) else math.inf
        known.compared_by = manifest.compared_by
        tags = {"bdh.run_dir": manifest.run_dir} | ({"bdh.latest_checkpoint": manifest.artifact_path} if newest else {})
        if manifest.score is not None and manifest.score < lowest:
            known.best = manifest.artifact_path, manifest.score
            tags |= {"bdh.best_checkpoint": manifest.artifact_path, **manifest.score_as_tags()}
        return tags

    def _listed(self, saved: Saved, known: _Known) -> _Model:
        """A LoggedModel that points to the checkpoint, so that one search finds the best of all runs. Metadata, not a second copy."""
        client, manifest, run_id = self._client, saved.manifest, self._run.run_id
        digest = manifest.digest
        tags = {"bdh.checkpoint": f"runs:/{run_id}/{manifest.artifact_path}", "bdh.sha256": digest}
        model = known.models.get(manifest.step)
        if model is None:
            params = {"step": str(manifest.step), **_facts_of(saved)}
            # not `checkpoint...`: runs:/ID/NAME would then mean the model
            name = f"step-{manifest.step}" if isinstance(saved, Snapshot) else f"bdh-step-{manifest.step}"
            made = client.create_logged_model(self._run.identity.experiment_id, name, run_id, tags, params, _type_of(saved))
            model = known.models[manifest.step] = _Model(made.model_id, digest)
        elif model.sha256 != digest:
            client.set_logged_model_tags(model.model_id, tags)
            model.sha256 = digest
        if not (model.ready or model.linked):  # a second link of the two is refused, for ever
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, manifest.step)])
            model.linked = True
        return model

    def _finalize(self, model: _Model) -> None:
        self._client.finalize_logged_model(model.model_id, "READY")
        model.ready = True

    def _linked(self, evaluation: list[Metric], model: _Model, known: _Known) -> list[Metric]:
        """The points of the run, time stamp and all, so that its curve does not get them twice, as values of the model."""
        if model.evaluated:
            return []
        data = self.validation or known.validation
        source = {"dataset_name": data[0], "dataset_digest": data[1]} if data else {}
        return [Metric(m.key, m.value, m.timestamp, m.step, model_id=model.model_id, **source) for m in evaluation]

    def _prune(self, remote: str, keep: int, up_to: int, known: _Known) -> None:
        """The mirror keeps what retention keeps: the newest `keep` up to this step, and the best."""
        there = {step: name for name in known.sizes[remote] if (step := checkpoint.step_of(Path(name))) is not None and step <= up_to}
        for step in sorted(there)[:-keep]:
            file = there[step]
            if known.best[0] == f"{remote}/{file}":
                continue
            try:
                if model := known.models.get(step):  # the file last: as long as it is there, what was interrupted here is done again
                    self._client.delete_logged_model(model.model_id)
                    del known.models[step]
            except MlflowException as error:
                if not store.is_refusal(error):
                    raise
                self._stays(file, error)
                continue
            try:
                for name in (Path(file).with_suffix(".json").name, file):
                    self._artifacts.delete(f"{remote}/{name}")
                    known.sizes[remote].pop(name, None)
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
        if error.errno not in UNLINKABLE:
            raise
        with source.open("rb") as read, partial.open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 20)
            write.flush()
            os.fsync(write.fileno())
    partial.replace(target)
    partial.unlink(missing_ok=True)  # renaming a name of one file onto another name of it does nothing (rename(2))


def _type_of(saved: Saved) -> str:
    return SNAPSHOT_TYPE if isinstance(saved, Snapshot) else MODEL_TYPE


def _facts_of(saved: Saved) -> dict[str, str]:
    """What a LoggedModel says of a checkpoint besides its step."""
    match saved:
        case Checkpoint(manifest=state):
            return {"tokens_seen": str(state.tokens_seen)}
        case Snapshot(manifest=snapshot):
            return {"name": snapshot.name}
    return {}


def _about_limits(file: Path, size: int, error: Exception) -> str:
    return (
        f"tracking: {file.name} ({size / 1e6:,.0f} MB) was not taken ({first_line(error)}). If a proxy limits "
        f"bodies, raise its limit (nginx: client_max_body_size); against time-outs set MLFLOW_HTTP_REQUEST_TIMEOUT (s) here and the "
        f"server's own; for a server before S3 or the like MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=true; tracking.mirror_checkpoints: false "
        f"keeps files here only"
    )
