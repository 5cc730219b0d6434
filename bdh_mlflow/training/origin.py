"""Where training begins: fresh, resumed, forked, from weights of another program or made of others. Every rank begins there."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Manifest, RunDirectory
from bdh_mlflow.config import Config, Role, role_of
from bdh_mlflow.data import order
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import ResumeError
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.rope import FREQUENCIES, why_no_frequencies
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.resolved import ResolvedCheckpoint
from bdh_mlflow.training.parts import Progress
from bdh_mlflow.vocabulary import Tokenizer


@dataclass(frozen=True)
class Made:
    """Weights that were computed from those of checkpoints.   weights: a state dict.   how: in a word, of tags and messages."""

    weights: Mapping[str, Tensor]
    how: Literal["merged", "grown"]
    of: tuple[ResolvedCheckpoint, ...]


@dataclass(frozen=True)
class Origin:
    """Where a training run begins.

    fresh: random weights.   resumed: one of our checkpoints, in its run.   forked: one of our checkpoints, in a new run whose settings may
    differ.   warm: weights of another program.   made: weights made of checkpoints, in a new run.   saved: the checkpoint's configuration,
    resolved, for resumed and forked.   begun: folder of a run without a checkpoint that this job began before its launcher restarted it:
    the run goes on, from step 0.
    """

    kind: Literal["fresh", "resumed", "forked", "warm", "made"]
    found: ResolvedCheckpoint | None = None
    saved: Config | None = None
    begun: Path | None = None
    made: Made | None = None

    @property
    def state(self) -> dict[str, Any] | None:
        """State to continue from; None where training starts at step 0."""
        return self.found.state if self.found and self.saved else None

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the checkpoint, if it had one or its journal has got one since."""
        return self.found.run_id if self.found else None

    @property
    def continues(self) -> str | None:
        """The MLflow run that goes on, as far as it is known."""
        if self.begun is not None:
            delivered = journal.delivered(self.begun)
            return delivered.run_id if delivered else None
        return self.run_id if self.kind == "resumed" else None

    @property
    def manifest(self) -> Manifest | None:
        """What the checkpoint's manifest says."""
        return self.found.checkpoint.manifest if self.found and self.found.checkpoint else None


@dataclass(frozen=True)
class Settled:
    """What is trained, and from where: decided by rank 0 for all.   why: reasons of settings that were `auto`, see `resolve`."""

    config: Config
    why: Mapping[str, str]
    origin: Origin
    tokenizer: Tokenizer


def run_directory(origin: Origin, checkpoint_dir: Path, config: Config, tokenizer: Tokenizer) -> RunDirectory:
    """The directory of the run that goes on, or a new one."""
    files = {checkpoint.CONFIG_NAME: config.to_yaml().encode()}
    if tokenizer.file_name is not None and tokenizer.content is not None:
        files[tokenizer.file_name] = tokenizer.content
    if origin.begun is not None:
        return RunDirectory.begun(origin.begun, files)
    if origin.kind != "resumed" or origin.found is None or origin.manifest is None:
        return RunDirectory.new(checkpoint_dir, files, datetime.now())
    folder = origin.found.path.absolute().parent
    if folder.name != origin.manifest.run_dir:  # a copy elsewhere, among files of other runs
        folder = checkpoint_dir / origin.manifest.run_dir
    return RunDirectory(folder, files)


def position_of(origin: Origin, config: Config, text: ParquetText, progress: Progress) -> order.Position | None:
    """Where to continue in the data: where the checkpoint was, unless a fork reads other data or in another order."""
    if origin.state is None or origin.saved is None or origin.manifest is None or origin.found is None:
        return None
    position: order.Position = origin.state["data_position"]
    same_data = origin.manifest.data_digest == text.digest
    if origin.kind == "resumed" and not same_data:
        raise ResumeError(
            f"cannot resume: the data in {text.root} is not what {origin.found.path} was trained on "
            f"(digest {text.digest[:12]}, was {origin.manifest.data_digest[:12]}). "
            f"Restore it, or begin a new run from the checkpoint with --fork"
        )
    settings, before = config.training, origin.saved.training
    rows, rows_before = (each.batch_size * each.gradient_accumulation_steps for each in (settings, before))
    other_rows = settings.carry_state and rows != rows_before
    if same_data and not other_rows and not any(role_of(d.key) is Role.ORDER for d in origin.saved.differences(config)):
        return position
    progress.note("fork: other data or another order of it, so it is read from its beginning")
    return None


def load_warm(network: BDH, origin: Origin) -> None:
    """Load the weights of another program.   Raises ResumeError with every name and shape that does not fit."""
    assert origin.found is not None
    weights = checkpoint.published_weights(origin.found.state)
    assert weights is not None, "checked when the target was resolved"
    own = network.state_dict()
    given = {FREQUENCIES: own[FREQUENCIES], **weights}
    wrong = [f"{key}: the file has no such weight" for key in own if key not in given]
    wrong += [f"{key}: unknown weight" for key in given if key not in own]
    wrong += [
        f"{key}: shape {tuple(given[key].shape)}, config says {tuple(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    if reason := why_no_frequencies(given[FREQUENCIES]):
        wrong.append(f"{FREQUENCIES}: {reason}")
    if wrong:
        raise ResumeError("\n  ".join([f"cannot start from {origin.found.path}: its weights do not fit the model section", *wrong]))
    network.load_state_dict(given)
