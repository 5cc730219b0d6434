"""Checkpoint files: a step is on disk completely, or it is not a checkpoint.

A step is written to `checkpoint_500.pt.partial`, synced and renamed; then its manifest `checkpoint_500.json` (bytes, sha256, step) the
same way. The manifest is the commit record: a file without a matching one is never listed, so a kill during a save costs that save alone.
Files are opened with `weights_only=True`: tensors and plain values, never code. Knows nothing of MLflow; `tracking` mirrors finished files.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from bdh_mlflow.checkpoint.manifest import FileRecord, Manifest, Provenance
from bdh_mlflow.checkpoint.saved import PARTIAL, Checkpoint, file_name
from bdh_mlflow.errors import CheckpointError, SaveError
from bdh_mlflow.files import atomic_write, reason_of
from bdh_mlflow.text import Evaluation

if TYPE_CHECKING:  # imported in the functions that open a file: listing and mirroring do without
    import torch

FORMAT = 3
PIECE_BYTES = 2**18

State = dict[str, Any]
Throttle = Callable[[float], object]
"""Called after each piece of a file with the seconds that writing it took; may wait, to leave the machine to the training."""


def load(path: Path) -> State:
    """Tensors and plain values of a file, on the CPU.   Raises CheckpointError for anything that holds code or is no torch file."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:Unsupported (?:global|class|operand)|GLOBAL)[: ]+(\S+)", str(error))
        what = f" ({wanted[1]})" if wanted else ""
        raise CheckpointError(f"{path}: refused: it holds Python objects{what}, not only tensors and plain values") from None
    except Exception as error:  # damaged bytes make torch's unpickler raise whatever it runs into
        reason = str(error).split("\n")[0] or "it is empty or cut short"
        raise CheckpointError(f"{path}: not a checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: holds a {type(state).__name__}, not a dict")
    if isinstance(number := state.get("format"), int) and number > FORMAT:
        raise CheckpointError(f"{path}: its format is {number}, of a later version of bdh-mlflow; this one reads up to {FORMAT}: upgrade")
    return state


def published_weights(state: Mapping[str, Any]) -> "dict[str, torch.Tensor] | None":
    """Model weights in a file of another program: a bare state dict, or one under `model_state_dict` or `model`; None if ours or none."""
    import torch

    if "format" in state:
        return None
    for weights in (state.get("model_state_dict"), state.get("model"), state):
        if isinstance(weights, Mapping):
            bare = {str(key).removeprefix("_orig_mod."): value for key, value in weights.items()}
            if "encoder" in bare and "lm_head" in bare:
                return {key: value for key, value in bare.items() if isinstance(value, torch.Tensor)}
    return None


def not_saved(path: Path, error: Exception) -> SaveError:
    """The error of a file that could not be written."""
    return SaveError(f"{path}: not saved: {reason_of(error)}. Earlier checkpoints are untouched")


class _Pieces:
    """A file for torch.save: written and digested piece by piece, with a call of `throttle` after each."""

    def __init__(self, file: BinaryIO, throttle: Throttle) -> None:
        self._file = file
        self._throttle = throttle
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        whole = memoryview(content).cast("B")
        for start in range(0, len(whole), PIECE_BYTES):
            began = time.perf_counter()
            piece = whole[start : start + PIECE_BYTES]
            self.digest.update(piece)
            self._file.write(piece)
            self._throttle(time.perf_counter() - began)
        return len(whole)

    def flush(self) -> None:
        self._file.flush()


def _canonical(tree: Any) -> Any:
    """The same values, so that equal states are equal files: pickle refers back to a text only where it is the same object."""
    if isinstance(tree, Mapping):
        return {_canonical(key): _canonical(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(_canonical, tree))
    return sys.intern(tree) if type(tree) is str else tree


@dataclass(frozen=True)
class SaveInfo:
    """What a manifest says besides the state.   saved_at: later than that of every checkpoint before."""

    provenance: Provenance
    evaluation: Evaluation | None
    saved_at: datetime


def write(run_dir: Path, state: State, about: SaveInfo, throttle: Throttle) -> Checkpoint:
    """Write a state and then its manifest into a run directory.   Raises OSError or RuntimeError; then neither is there."""
    import torch

    path = run_dir / file_name(state["step"])
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            pieces = _Pieces(file, throttle)
            torch.save(_canonical(state), cast("IO[bytes]", pieces))
            file.flush()
            os.fsync(file.fileno())
        manifest = Manifest(
            step=state["step"],
            tokens_seen=state["tokens_seen"],
            files=(FileRecord(path.name, partial.stat().st_size, pieces.digest.hexdigest()),),
            loss=state["loss"],
            val_loss=about.evaluation.loss if about.evaluation else None,
            val_bpb=about.evaluation.bits_per_byte if about.evaluation else None,
            run_dir=run_dir.name,
            artifact_path=f"checkpoints/{run_dir.name}/{path.name}",
            saved_at=about.saved_at.isoformat(timespec="microseconds"),
            **{field.name: getattr(about.provenance, field.name) for field in dataclasses.fields(about.provenance)},
        )
        checkpoint = Checkpoint(path, manifest)
        # A file of that name from before a rewind: its manifest must never stand beside the new bytes, nor the new manifest beside the old.
        checkpoint.manifest_path.unlink(missing_ok=True)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    atomic_write(checkpoint.manifest_path, json.dumps(manifest.to_json(), indent=1, allow_nan=False).encode())
    return checkpoint
