"""What is trained and from where, and proof that this configuration may begin there. Rank 0 decides it for all processes.

A resumed run must follow the trajectory it would have had without the interruption, so a setting that would change it is refused; which
ones do, each field of the configuration says (`config.Role`).
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from bdh_mlflow import checkpoint
from bdh_mlflow.config import Config, Difference, Machine, Role, changes_trajectory, incompatible, resolve, role_of
from bdh_mlflow.config.messages import yaml_scalar
from bdh_mlflow.errors import ResumeError, TrackingError
from bdh_mlflow.files import shown
from bdh_mlflow.model import precision
from bdh_mlflow.tracking import journal, locate
from bdh_mlflow.training import processes
from bdh_mlflow.training.agreement import refuse_for_several
from bdh_mlflow.training.corpus import with_tokenizer
from bdh_mlflow.training.origin import Made, Origin, Settled
from bdh_mlflow.training.parts import Progress
from bdh_mlflow.training.problems import problems
from bdh_mlflow.vocabulary import Tokenizer


def settle(config: Config, progress: Progress, fork: bool, size: int) -> Settled:
    """Where training begins and with which settings.   Raises InputError for what the checkpoint or the number of processes forbid."""
    machine = precision.machine(precision.pick_device(config.training.device))
    config, tokenizer, origin = find_origin(config, machine, progress, fork)
    resolved, why = resolve(config, machine, origin.saved if origin.kind == "resumed" else None)
    refuse_for_several(resolved, size)
    return Settled(resolved, why, origin, tokenizer)


def settle_made(config: Config, made: Made, progress: Progress) -> Settled:
    """As `settle`, for weights made of checkpoints: a new run, with the tokenizer of the first of them."""
    config, tokenizer = with_tokenizer(config, made.of[0].path.parent, progress)
    resolved, why = resolve(config, precision.machine(precision.pick_device(config.training.device)))
    return Settled(resolved, why, Origin("made", made=made), tokenizer)


class Begun(NamedTuple):
    """Where training begins.   config: with what the tokenizer settles."""

    config: Config
    tokenizer: Tokenizer
    origin: Origin


def find_origin(config: Config, machine: Machine, progress: Progress, fork: bool) -> Begun:
    """What training begins from: the configured target, or what this job had reached before its launcher started it again.

    Raises ResumeError if this configuration may not go on from there, with both values of each setting.
    """
    job = processes.job()
    begun = job.restarted and journal.of_job(_folders(config), job.id) if job else None
    if begun and checkpoint.list_run(begun).checkpoints:
        return _origin_at(str(begun), config, machine, progress, fork=False)
    if job and job.restarted and not begun and (run_id := _mirrored_run_of(job.id, config, progress)):
        return _origin_at(run_id, config, machine, progress, fork=False)
    at = _origin_at(config.training.resume_from_checkpoint, config, machine, progress, fork)
    return at._replace(origin=dataclasses.replace(at.origin, begun=begun or None))


def _folders(config: Config) -> list[Path]:
    checkpoint_dir = Path(config.training.checkpoint_dir)
    return [*checkpoint.list_all(checkpoint_dir), *checkpoint.pending(checkpoint_dir)]


def _mirrored_run_of(job: str, config: Config, progress: Progress) -> str | None:
    """The MLflow run with checkpoints that a job has begun on another machine; None if there is none, or the store does not answer."""
    try:
        return locate.Locator(Path(config.training.checkpoint_dir), config.tracking).mirror.run_of_job(job)
    except TrackingError as error:
        progress.note(f"what this job has done on other machines is not known: {error}")
        return None


def _origin_at(target: str | None, config: Config, machine: Machine, progress: Progress, fork: bool) -> Begun:
    """What training begins from.   target: in the resume grammar."""
    if not target or target == "none":
        if fork:
            raise ResumeError("--fork needs a checkpoint to fork from: --resume TARGET")
        return Begun(*with_tokenizer(config, None, progress), Origin("fresh"))
    found = locate.Locator(Path(config.training.checkpoint_dir), config.tracking).find(target)
    for note in found.notes:
        progress.note(f"skipped {note}")
    config, tokenizer = with_tokenizer(config, found.path.parent, progress)
    if found.checkpoint is None:
        return Begun(config, tokenizer, Origin("warm", found))
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
        lines = [f"{d.key} was {_written(d.before)}, config says {_written(d.after)}" for d in changes]
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
    if saved.tokenizer.digest != config.tokenizer.digest:  # of a fork
        progress.note("fork: another tokenizer than the checkpoint's: its weights know other texts under these ids")
    return Begun(config, tokenizer, Origin("forked" if fork else "resumed", found, saved))


def _refused_changes(saved: Config, config: Config, machine: Machine, fork: bool) -> list[Difference]:
    """What a resumed or forked run may not change. `debug` may come and go although nothing is compiled under it."""
    alike = dataclasses.replace(config, training=dataclasses.replace(config.training, debug=saved.training.debug))
    changes = saved.differences(resolve(alike, machine, None if fork else saved).config)
    if fork:
        return [d for d in changes if role_of(d.key) is Role.SHAPE]
    return [d for d in changes if changes_trajectory(d, saved)]


def _written(value: object) -> str:
    """A setting as a configuration has it: true, null, and text without quotes."""
    return value if isinstance(value, str) else yaml_scalar(value)
