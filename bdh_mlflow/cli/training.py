"""The command `train`, and what it prints at the end."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from bdh_mlflow.cli.common import (
    ACCEPTS_SETTINGS,
    Launch,
    config_option,
    dotted_options,
    exit_stopped_early,
    set_option,
)
from bdh_mlflow.cli.output import TrainingCommand
from bdh_mlflow.config import Config
from bdh_mlflow.files import shown
from bdh_mlflow.text import bits_per_byte

if TYPE_CHECKING:
    from bdh_mlflow.training.start import Outcome


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
@click.pass_context
def train(ctx: click.Context, config_path: str, overrides: tuple[str, ...], resume: str, fork: str) -> None:
    """Train a model, from random weights or from a checkpoint.

    Settings can also be given as --section.key VALUE, which is how `mlflow run -P section.key=value` passes them on.
    """
    from bdh_mlflow.cli import console
    from bdh_mlflow.tracking.sender import SubprocessSender
    from bdh_mlflow.training import start
    from bdh_mlflow.training.problems import problems
    from bdh_mlflow.training.stop import StopRequest

    given = [*overrides, *dotted_options(ctx)]
    if not resume.strip():
        raise click.UsageError("--resume names nothing; accepted: none for a new run, latest, a path, a run id, ...", ctx)
    if resume != "none":
        given.append(f"training.resume_from_checkpoint={resume}")
    config = Config.from_yaml(config_path, given, checks=(problems,))
    stop = StopRequest()
    stop.install()
    try:
        with console.watching(sys.stdout, config.training.max_iters) as progress:
            outcome = start.train(config, progress, stop, fork=fork == "yes", make_sender=ctx.obj or SubprocessSender)
    except KeyboardInterrupt:
        exit_stopped_early(ctx, stop)
    click.echo("\n".join(_summary(outcome, config_path, given)))
    if outcome.ending.reason != "finished":
        ctx.exit(128 + signal.Signals[outcome.ending.reason])


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
    val = f", val/loss {ending.val_loss:.4f}, val/bpb {bits_per_byte(ending.val_loss):.4f}" if ending.val_loss is not None else ""
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
    if ending.reason == "finished":
        settings["training.max_iters"] = str(2 * ending.step)
    experiment = identity.experiment if identity else outcome.experiment
    return Launch.of_this_process().train(config_path, {"resume": target, **settings}, experiment)
