"""Where training begins (fresh, resumed, forked, or from weights of another program), and proof that its configuration may begin there.

A resumed run must follow the trajectory it would have had without the interruption, so a setting that would change it is refused; which
ones do, each field of the configuration says (`config.Role`).
"""

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Manifest, RunDirectory
from bdh_mlflow.config import Config, Difference, Machine, Role, changes_trajectory, incompatible, resolve, role_of
from bdh_mlflow.data import order
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import ResumeError
from bdh_mlflow.files import shown
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.tracking import locate
from bdh_mlflow.training.problems import problems
from bdh_mlflow.training.trainer import Progress


@dataclass(frozen=True)
class Origin:
    """Where a training run begins.

    fresh: random weights.   resumed: one of our checkpoints, in its run.   forked: one of our checkpoints, in a new run whose settings may
    differ.   warm: weights of another program.   saved: the checkpoint's configuration, resolved, for resumed and forked.
    """

    kind: Literal["fresh", "resumed", "forked", "warm"]
    found: locate.ResolvedCheckpoint | None = None
    saved: Config | None = None

    @property
    def state(self) -> dict[str, Any] | None:
        """State to continue from; None where training starts at step 0."""
        return self.found.state if self.found and self.saved else None

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the checkpoint, if it had one or its journal has got one since."""
        if self.found is None or self.found.checkpoint is None:
            return None
        return self.found.run_id or locate.run_of(self.found.checkpoint)

    @property
    def manifest(self) -> Manifest | None:
        """What the checkpoint's manifest says."""
        return self.found.checkpoint.manifest if self.found and self.found.checkpoint else None


def run_directory(origin: Origin, checkpoint_dir: Path, config: Config) -> RunDirectory:
    """The directory of the resumed run, or a new one."""
    if origin.kind != "resumed" or origin.found is None or origin.manifest is None:
        return RunDirectory.new(checkpoint_dir, config.to_yaml(), datetime.now())
    folder = origin.found.path.absolute().parent
    if folder.name != origin.manifest.run_dir:  # a copy elsewhere, among files of other runs
        folder = checkpoint_dir / origin.manifest.run_dir
    return RunDirectory(folder, config.to_yaml())


def find_origin(config: Config, machine: Machine, progress: Progress, fork: bool) -> Origin:
    """What training begins from.   Raises ResumeError if this configuration may not go on from there, with both values of each setting."""
    target = config.training.resume_from_checkpoint
    if not target or target == "none":
        if fork:
            raise ResumeError("--fork needs a checkpoint to fork from: --resume TARGET")
        return Origin("fresh")
    found = locate.Locator(Path(config.training.checkpoint_dir), config.tracking).find(target)
    for note in found.notes:
        progress.note(f"skipped {note}")
    if found.checkpoint is None:
        return Origin("warm", found)
    settings = found.state["config"]
    settings = {**settings, "training": {"layer_form": "reference", **settings["training"]}}  # the only form before there was the setting
    saved = resolve(Config.from_saved(settings, found.path, found.checkpoint.manifest.written_by), machine).config
    step, last = found.state["step"], config.training.max_iters
    if step > last or (fork and step == last):
        raise ResumeError(
            f"cannot resume {found.path}: nothing to do, it is at step {step} and training.max_iters is {last}. "
            f"Set training.max_iters above {step}"
        )
    changes = _refused_changes(saved, config, machine, fork)
    if changes:
        lines = [f"{d.key} was {d.before}, config says {d.after}" for d in changes]
        shapes = " Shapes are fixed for the life of a run." if any(role_of(d.key) is Role.SHAPE for d in changes) else ""
        ways = "start a new run" if shapes else "begin a new run from this checkpoint with --fork"
        raise ResumeError(
            "\n  ".join([f"cannot resume {found.path}: this configuration would leave the trajectory of the run.{shapes}", *lines])
            + f"\nRestore the values (its own configuration is {found.path.parent / checkpoint.CONFIG_NAME}) or {ways}"
        )
    continued = resolve(config, machine, None if fork else saved).config
    if not fork and (clashing := list(incompatible(continued))):
        raise ResumeError(
            "\n  ".join([f"cannot resume {found.path}: what the run keeps does not go with this configuration", *map(str, clashing)])
        )
    if not fork and (unable := list(problems(continued))):
        raise ResumeError(
            "\n  ".join(
                [f"cannot resume {found.path} on this machine: what the run was trained with does not work here", *map(str, unable)]
            )
            + "\nMake it work, or begin a new run from this checkpoint with --fork, in which `auto` is settled for this machine"
        )
    if found.state["format"] == 1 and (saved.model.dropout or saved.training.gradient_accumulation_steps > 2):
        progress.note(
            f"{shown(found.path)} is of format 1: from here on dropout masks are drawn, and gradients summed, otherwise than before"
        )
    return Origin("forked" if fork else "resumed", found, saved)


def _refused_changes(saved: Config, config: Config, machine: Machine, fork: bool) -> list[Difference]:
    """What a resumed or forked run may not change. `debug` may come and go although nothing is compiled under it."""
    alike = dataclasses.replace(config, training=dataclasses.replace(config.training, debug=saved.training.debug))
    changes = saved.differences(resolve(alike, machine, None if fork else saved).config)
    if fork:
        return [d for d in changes if role_of(d.key) is Role.SHAPE]
    return [d for d in changes if changes_trajectory(d, saved)]


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
    if same_data and not any(role_of(d.key) is Role.ORDER for d in origin.saved.differences(config)):
        return position
    progress.note("fork: other data or another order of it, so it is read from its beginning")
    return None


def load_warm(network: BDH, origin: Origin) -> None:
    """Load the weights of another program.   Raises ResumeError with every name and shape that does not fit."""
    assert origin.found is not None
    weights = checkpoint.published_weights(origin.found.state)
    assert weights is not None, "checked when the target was resolved"
    own = network.state_dict()
    given = {key: value for key, value in weights.items() if key != "attn.freqs"}
    wrong = [f"{key}: the file has no such weight" for key in own if key not in given]
    wrong += [f"{key}: unknown weight" for key in given if key not in own]
    wrong += [
        f"{key}: shape {tuple(given[key].shape)}, config says {tuple(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    if wrong:
        raise ResumeError("\n  ".join([f"cannot start from {origin.found.path}: its weights do not fit the model section", *wrong]))
    network.load_published(given)
