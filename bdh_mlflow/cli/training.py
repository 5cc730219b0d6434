"""The command `train`, and what it prints at the end."""

import contextlib
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from bdh_mlflow import host
from bdh_mlflow.cli.common import (
    ACCEPTS_SETTINGS,
    Launch,
    config_option,
    dotted_options,
    exit_stopped_early,
    processes_option,
    set_option,
)
from bdh_mlflow.cli.output import TrainingCommand
from bdh_mlflow.config import Config
from bdh_mlflow.files import shown

if TYPE_CHECKING:
    from bdh_mlflow.distributed import World
    from bdh_mlflow.tracking.tracker import MakeSender
    from bdh_mlflow.training.parts import Ending
    from bdh_mlflow.training.start import Outcome
    from bdh_mlflow.training.stop import StopRequest


@click.command(cls=TrainingCommand, context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.option(
    "--resume",
    default="none",
    metavar="TARGET",
    help="Continue a run: latest, a path, a run id, runs:/... or an artifact URI; RUN:N continues from its step N.",
)
@click.option(
    "--fork",
    type=click.Choice(["yes", "no"]),
    is_flag=False,
    flag_value="yes",
    default="no",
    help="With --resume: start a new run from the checkpoint; any setting may then change.",
)
@processes_option
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(min=1.0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long several processes wait for each other before one that does not answer ends them all.",
)
def train(config_path: str, overrides: tuple[str, ...], resume: str, fork: str, processes: int, patience_s: float) -> None:
    """Train a model, from random weights or from a checkpoint.

    Settings can also be given as --section.key VALUE, which is how `mlflow run -P section.key=value` passes them on.
    """
    ctx = click.get_current_context()
    given = [*overrides, *dotted_options(ctx)]
    if not resume.strip():
        raise click.UsageError("--resume names nothing; accepted: none for a new run, latest, a path, a run id, ...", ctx)
    if resume != "none":
        given.append(f"training.resume_from_checkpoint={resume}")
    host.loading()
    try:
        with _senders(ctx) as make_sender:  # before torch is imported: the sender loads MLflow meanwhile
            _train_and_tell(ctx, config_path, given, Wish(fork == "yes", processes, patience_s, make_sender))
    finally:
        host.loaded()


class Wish(NamedTuple):
    """How to train, besides the configuration.   patience_s: of several processes with each other."""

    fork: bool
    processes: int
    patience_s: float
    make_sender: "MakeSender | None"


def _senders(ctx: click.Context) -> "contextlib.AbstractContextManager[MakeSender | None]":
    """What makes the senders of this process: rank 0 alone tells MLflow."""
    if ctx.obj or os.environ.get("RANK", "0") not in ("", "0"):
        return contextlib.nullcontext(ctx.obj)
    from bdh_mlflow.tracking.sender_process import prepared

    return prepared()


def _train_and_tell(ctx: click.Context, config_path: str, given: list[str], wish: Wish) -> None:
    """Train; print the last lines; exit with another code than 0 where the training did not finish."""
    from bdh_mlflow.errors import BdhError
    from bdh_mlflow.training import processes as group
    from bdh_mlflow.training.problems import problems
    from bdh_mlflow.training.stop import StopRequest

    if wish.processes > 1 and group.launched():
        raise click.UsageError("--processes starts processes, but a launcher (torchrun) has started this one; leave it out", ctx)
    stop = StopRequest()
    stop.install()
    try:
        read = functools.partial(Config.from_yaml, config_path, given, checks=(problems,))
        with _together(wish.processes, wish.patience_s, read) as (world, config):
            ending, outcome = _train(config, wish, world, stop)
    except KeyboardInterrupt:
        if group.speaks():
            exit_stopped_early(ctx, stop)
        ctx.exit(128 + stop.number)
    except BdhError as error:
        if group.speaks() or getattr(error, "speaks", False):
            raise
        ctx.exit(error.exit_code)
    if outcome is not None:
        click.echo("\n".join(_summary(outcome, config_path, given)))
    if ending.reason != "finished":
        ctx.exit(128 + signal.Signals[ending.reason])


@contextlib.contextmanager
def _together(processes: int, patience_s: float, read: Callable[[], Config]) -> Iterator[tuple["World", Config]]:
    """The processes that train, and what they train.   read: the configuration, which each process that a launcher started reads itself."""
    from bdh_mlflow.training import processes as group
    from bdh_mlflow.training.agreement import refuse_different

    if not group.launched():
        config = read()
        with group.started(processes, patience_s) as world:
            yield world, config
        return
    with group.joined(patience_s) as world:
        with world.failing():
            config = read()
        own = {f"{section}.{key}": value for section, values in config.portable().items() for key, value in values.items()}
        refuse_different(world, world.gather(own))
        yield world, config


def _train(config: Config, wish: Wish, world: "World", stop: "StopRequest") -> "tuple[Ending, Outcome | None]":
    """What this process has to do. Rank 0 alone has an outcome to tell."""
    if world.rank:
        from bdh_mlflow.training.follower import follow

        return follow(world, stop, config.dataset.parquet_dir), None
    from bdh_mlflow.cli import console
    from bdh_mlflow.training import start

    assert wish.make_sender is not None, "of rank 0"
    with console.watching(sys.stdout, config.training.max_iters) as progress:
        outcome = start.train(config, progress, stop, fork=wish.fork, make_sender=wish.make_sender, world=world)
    return outcome.ending, outcome


def _summary(outcome: "Outcome", config_path: str, overrides: Sequence[str]) -> Iterator[str]:
    """The last lines: result, where checkpoints and the MLflow run are, and commands to type next."""
    ending, identity, finished = outcome.ending, outcome.identity, outcome.ending.reason == "finished"
    yield ""
    if ending.samples:
        yield "Samples (text in \u27e6 \u27e7 is the model's):"
        yield from map(str, ending.samples)
    how = "Finished" if finished else f"Stopped by {ending.reason}"
    if finished and outcome.first_step == ending.step:
        how = "Nothing to do: the run was"
    val = f", val/loss {measured.loss:.4f}, val/bpb {measured.bits_per_byte:.4f}" if (measured := ending.evaluation) else ""
    yield f"{how} at step {ending.step}{val}; peak memory {outcome.peak_gib:.2f} GiB"
    if outcome.run_dir:
        place = shown(outcome.run_dir)
        yield f"Checkpoints: {place}"
        if finished:
            yield f"Try it:  bdh-mlflow generate {shlex.quote(place)} --prompt 'def '"
        yield f"Resume:  {_resume_line(outcome, config_path, overrides)}"
    if outcome.undelivered and outcome.journal:
        yield f"{outcome.undelivered} records wait for the tracking server; they are kept, and the checkpoints here are complete"
        yield f"Deliver: bdh-mlflow sync {shlex.quote(shown(outcome.journal))}"
    elif identity and not identity.on_server:
        uri = shlex.quote(identity.tracking_uri) if "***" not in identity.tracking_uri else '"$MLFLOW_TRACKING_URI"'
        yield f"Look:    mlflow ui --backend-store-uri {uri}"
        yield f"         then open {identity.page}"
    elif identity:
        yield f"Look:    {identity.page}"


def _resume_line(outcome: "Outcome", config_path: str, overrides: Sequence[str]) -> str:
    """The command that continues this run with the same settings; a finished one for as many steps again."""
    identity, ending = outcome.identity, outcome.ending
    target = identity.run_id if identity and not outcome.undelivered else shown(outcome.run_dir or "")
    settings = dict(override.split("=", 1) for override in overrides)  # `mlflow run` refuses a parameter given twice
    settings.pop("training.resume_from_checkpoint", None)
    if outcome.processes > 1:
        settings["processes"] = str(outcome.processes)
    if ending.reason == "finished":
        settings["training.max_iters"] = str(2 * ending.step)
    experiment = identity.experiment if identity else outcome.experiment
    return Launch.of_this_process().train(config_path, {"resume": target, **settings}, experiment)
