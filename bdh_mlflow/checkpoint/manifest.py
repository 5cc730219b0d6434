"""What is known of a checkpoint without opening it: the JSON file beside it, written last."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint as it was written.   name: in the run directory."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from: the part of a manifest that is the same for every checkpoint of a process.

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
class Manifest(Provenance):
    """What is known of a checkpoint without opening it.   files: `checkpoint_N.pt` first.   val_bpb: `val_loss` as bits per byte."""

    step: int
    tokens_seen: int
    files: tuple[FileRecord, ...]
    loss: float | None
    val_loss: float | None
    val_bpb: float | None = None
    run_dir: str
    artifact_path: str
    saved_at: str

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Manifest":
        """What a manifest file holds; fields of a newer version are skipped.   Raises ValueError for missing and invalid ones."""
        names = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in tree.items() if name in names}
        if "files" not in values and "bytes" in tree:  # version 0.2.0: of the one file
            values["files"] = [{"name": f"checkpoint_{tree.get('step')}.pt", "bytes": tree["bytes"], "sha256": tree.get("sha256")}]
        for name in ("loss", "val_loss", "val_bpb"):  # version 0.2.0 wrote NaN
            if isinstance(values.get(name), float) and not math.isfinite(values[name]):
                values[name] = None
        manifest = _ADAPTER.validate_json(json.dumps(values), strict=True)  # strict about types, but for objects that JSON has not
        if manifest.step < 0 or manifest.run_dir in ("", ".", "..") or Path(manifest.run_dir).name != manifest.run_dir:
            raise ValueError(f"step {manifest.step} in a run directory {manifest.run_dir!r}")
        named = (*manifest.files, *([manifest.tokenizer] if manifest.tokenizer else []))
        if not manifest.files or any(f.name in ("", ".", "..") or Path(f.name).name != f.name for f in named):
            raise ValueError(f"files {', '.join(repr(f.name) for f in named) or 'are none'}")
        return manifest

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.bytes for file in self.files)

    @property
    def is_evaluated(self) -> bool:
        """Whether it has a validation loss that can be compared with others."""
        return self.val_loss is not None and math.isfinite(self.val_loss)

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


_ADAPTER = TypeAdapter(Manifest)
