"""What is known of a checkpoint without opening it: the JSON file beside it, written last.

There are two sorts: states of a BDH training (`Manifest`), and snapshots of files that another program wrote (`SnapshotManifest`).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter

SNAPSHOT = "snapshot"
"""What the manifest of a snapshot has as its `kind`; that of a state has none."""


BEST_LOSS, BEST_METRIC, BEST_VALUE = "bdh.best_val_loss", "bdh.best_metric", "bdh.best_value"
"""Tags of a run: the score of its best checkpoint."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint as it was written.   name: in the run directory; of a snapshot in its folder, with `/`."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint of a BDH training comes from: what is the same for every checkpoint of a process.

    git_commit, git_dirty: None if unknown (`host.source_state`).   tokenizer: the file beside the checkpoints that says what tokens are;
    None where they are bytes.
    """

    mlflow_run_id: str | None
    segment: int
    git_commit: str | None
    git_dirty: bool | None
    config_digest: str
    data_digest: str
    versions: dict[str, str]
    tokenizer: FileRecord | None = None


@dataclass(frozen=True, kw_only=True)
class CommonManifest:
    """What every manifest says.   run_dir: name of the run directory.   artifact_path: among the artifacts of its MLflow run."""

    step: int
    files: tuple[FileRecord, ...]
    run_dir: str
    artifact_path: str
    saved_at: str
    mlflow_run_id: str | None
    segment: int
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        return dataclasses.asdict(self)

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """sha256 of its file; of several, of their names and digests."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return hashlib.sha256("".join(f"{f.sha256}  {f.name}\n" for f in self.files).encode()).hexdigest()

    @property
    def score(self) -> float | None:
        """By which checkpoints of a run compare, lower is better; None if it has none that compares."""
        return None

    @property
    def compared_by(self) -> str:
        """What the score is of: those of other things do not compare with it."""
        return ""

    def score_as_tags(self) -> dict[str, str]:
        """The score as tags of a run, whose best checkpoint this is."""
        return {}

    def score_in(self, tags: Mapping[str, str]) -> float:
        """The score of a run's best checkpoint as its tags have it; infinity where they have none that compares."""
        return math.inf

    @property
    def instant(self) -> datetime | None:
        """When it was saved; None where the text is no time."""
        try:
            return datetime.fromisoformat(self.saved_at).astimezone(UTC)
        except (ValueError, OverflowError):
            return None

    @property
    def written_by(self) -> str:
        """Version of this package that wrote the checkpoint."""
        return self.versions.get("bdh-mlflow", "an unknown version")


@dataclass(frozen=True, kw_only=True)
class Manifest(CommonManifest):
    """Of the state of a BDH training.   files: `checkpoint_N.pt` first.   val_bpb: `val_loss` as bits per byte.   Others: `Provenance`."""

    config_digest: str
    data_digest: str
    tokenizer: FileRecord | None = None
    tokens_seen: int
    loss: float | None
    val_loss: float | None
    val_bpb: float | None = None

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Manifest":
        """What a manifest file holds; fields of a newer version are skipped.   Raises ValueError for missing and invalid ones."""
        values = _known(cls, tree)
        if "files" not in values and "bytes" in tree:  # version 0.2.0: of the one file
            values["files"] = [{"name": f"checkpoint_{tree.get('step')}.pt", "bytes": tree["bytes"], "sha256": tree.get("sha256")}]
        for name in ("loss", "val_loss", "val_bpb"):  # version 0.2.0 wrote NaN
            if isinstance(values.get(name), float) and not math.isfinite(values[name]):
                values[name] = None
        manifest = _STATE.validate_json(json.dumps(values), strict=True)  # strict about types, but for objects that JSON has not
        named = (*manifest.files, *([manifest.tokenizer] if manifest.tokenizer else []))
        _check(manifest, [f.name for f in named], lambda name: Path(name).name == name)
        return manifest

    @property
    def score(self) -> float | None:
        """Its validation loss, if it has a finite one."""
        return self.val_loss if self.val_loss is not None and math.isfinite(self.val_loss) else None

    def score_as_tags(self) -> dict[str, str]:
        """The validation loss."""
        return {BEST_LOSS: repr(self.score)}

    def score_in(self, tags: Mapping[str, str]) -> float:
        """The validation loss."""
        return _number(tags.get(BEST_LOSS))


@dataclass(frozen=True, kw_only=True)
class SnapshotManifest(CommonManifest):
    """Of files that another program wrote.

    name: of the file or folder that it gave.   is_folder: which of the two.   metrics: what it said of them.   best: the metric by which
    its checkpoints compare, None if it named none.   higher_is_better: how they do.
    """

    kind: str = SNAPSHOT
    name: str
    is_folder: bool
    metrics: dict[str, float]
    best: str | None = None
    higher_is_better: bool = False

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "SnapshotManifest":
        """What a manifest file holds; fields of a newer version are skipped.   Raises ValueError for missing and invalid ones."""
        manifest = _SNAPSHOT.validate_json(json.dumps(_known(cls, tree)), strict=True)
        _check(manifest, [manifest.name], lambda name: Path(name).name == name)
        _check(manifest, [f.name for f in manifest.files], is_inside)
        return manifest

    @property
    def score(self) -> float | None:
        """The named metric, turned round where higher is better."""
        value = _number(repr(self.metrics.get(self.best))) if self.best else math.inf
        return None if value == math.inf else self._turned(value)

    def score_as_tags(self) -> dict[str, str]:
        """The metric, its value, and which way it compares."""
        return {BEST_METRIC: self.compared_by, BEST_VALUE: repr(self.metrics.get(self.best or ""))}

    def score_in(self, tags: Mapping[str, str]) -> float:
        """The value, of the same metric."""
        value = _number(tags.get(BEST_VALUE)) if tags.get(BEST_METRIC) == self.compared_by else math.inf
        return value if value == math.inf else self._turned(value)

    @property
    def compared_by(self) -> str:
        """The metric, and which way it compares."""
        return f"{self.best} ({'higher' if self.higher_is_better else 'lower'} is better)"

    def _turned(self, value: float) -> float:
        return -value if self.higher_is_better else value


def manifest_of(tree: Mapping[str, Any]) -> Manifest | SnapshotManifest:
    """What a manifest file of either sort holds.   Raises ValueError or TypeError for what is none."""
    return SnapshotManifest.from_json(tree) if tree.get("kind") == SNAPSHOT else Manifest.from_json(tree)


def is_inside(name: str) -> bool:
    """Whether a relative path with `/` leads to something in its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and not {".", ".."} & set(parts) and "/".join(parts) == name


def _number(text: str | None) -> float:
    """A finite number in a tag; infinity where there is none."""
    try:
        value = float(text or "inf")
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf


def _known(cls: type[CommonManifest], tree: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in tree.items() if name in names}


def _check(manifest: CommonManifest, names: list[str], is_good: Callable[[str], bool]) -> None:
    """Raises ValueError for names that would lead elsewhere, and for a negative step."""
    if manifest.step < 0 or manifest.run_dir in ("", ".", "..") or Path(manifest.run_dir).name != manifest.run_dir:
        raise ValueError(f"step {manifest.step} in a run directory {manifest.run_dir!r}")
    if not names or any(name in ("", ".", "..") or not is_good(name) for name in names):
        raise ValueError(f"files {', '.join(map(repr, names)) or 'are none'}")


_STATE = TypeAdapter(Manifest)
_SNAPSHOT = TypeAdapter(SnapshotManifest)
