"""Commands that study trainings: compare, sweep, verify-resume, embeddings."""

import functools
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bdh_mlflow.cli.common import (
    ACCEPTS_SETTINGS,
    Launch,
    config_option,
    dotted_options,
    ema_option,
    exit_stopped_early,
    load_model,
    print_table,
    processes_option,
    read_config,
    set_option,
)
from bdh_mlflow.cli.output import TrainingCommand
from bdh_mlflow.config import Config
from bdh_mlflow.config.messages import yaml_scalar
from bdh_mlflow.errors import InputError
from bdh_mlflow.files import reason_of

SHOWN_RUNS = 8  # columns of runs that a terminal holds
SHOWN_TOKENS = 8  # with the longest vectors, and with the shortest


@click.command()
@click.argument("runs", nargs=-1, required=True)
@config_option
@click.option(
    "--out",
    default="compare.html",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="Report to write; its plots are written beside it.",
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Plot this metric as well; repeatable.")
@click.option("--log/--no-log", default=True, show_default=True, help="Also store the report among the first run's artifacts.")
def compare(runs: tuple[str, ...], config_path: str, out: str, metrics: tuple[str, ...], log: bool) -> None:
    """Compare trained runs side by side.

    Prints which settings differ between RUNS and where each stands, and writes a report with their samples and their curves over steps,
    tokens and time in training.

    A run is given by id, by name or as `latest`. The name of an experiment means all its runs; a filter such as "metrics.`val/loss` < 2"
    or "params.`model.n_layer` = '6'" means all runs that match.
    """
    from bdh_mlflow.studies import compare as study
    from bdh_mlflow.studies import report

    tracking, path = read_config(config_path).tracking, Path(out)
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}")
    if not path.name or path.is_dir():
        raise InputError(f"--out {out!r}: a folder, or no name; name a file")
    if not (names := _split(runs, study.FILTER)):
        raise InputError("no run is named; give an id, a name, latest, an experiment or a filter")
    comparison = study.read(names, tracking, metrics)
    shown = comparison.runs[:SHOWN_RUNS]
    print_table(["", *(run.label for run in shown)], [row[: 1 + len(shown)] for row in study.rows(comparison)])
    if len(shown) < len(comparison.runs):
        click.echo(f"... and {len(comparison.runs) - len(shown)} more runs in the report")
    try:
        files = report.write(comparison, path)
    except OSError as error:
        raise InputError(f"--out {path}: {error.filename or path} cannot be written: {reason_of(error)}") from None
    if log:
        report.log(comparison, files, tracking)
    click.echo(f"Report with curves: {path.absolute()}")


def _split(runs: Sequence[str], filters: re.Pattern[str]) -> list[str]:
    """One name per run, also where `mlflow run` passes them all in one parameter.   filters: what contains spaces and is one name."""
    return [word for run in runs for word in ([run] if filters.search(run) else run.split())]


@click.command(cls=TrainingCommand, context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.option("--space", "space_path", default="configs/sweep.yaml", show_default=True, help="YAML file of what is searched.")
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1), help="Trials in all, those of earlier calls included.")
@processes_option
@click.pass_context
def sweep(ctx: click.Context, config_path: str, overrides: tuple[str, ...], space_path: str, trials: int, processes: int) -> None:
    """Search for good settings.

    Trains once per trial and judges trials by val/loss; hopeless ones are pruned. All are children of one parent run. Called again,
    it continues the study of the same name, including a trial that was interrupted.
    """
    from bdh_mlflow.cli import console
    from bdh_mlflow.studies import sweep as study
    from bdh_mlflow.studies.space import Space
    from bdh_mlflow.tracking.sender_process import SubprocessSender
    from bdh_mlflow.training.problems import problems
    from bdh_mlflow.training.stop import StopRequest

    launch = Launch.of_this_process()  # now: the sweep hides the wrapper run from its trials
    given, space = [*overrides, *dotted_options(ctx)], Space.from_yaml(space_path)
    shared = [f"{key}={value if isinstance(value, str) else yaml_scalar(value)}" for key, value in space.settings.items()]
    config, stop = Config.from_yaml(config_path, [*given, *shared], checks=(problems,)), StopRequest()
    stop.install()
    try:
        controls = study.Controls(stop, functools.partial(console.watching, sys.stdout), click.echo, ctx.obj or SubprocessSender, processes)
        result = study.sweep(config, space, trials, controls)
    except KeyboardInterrupt:
        exit_stopped_early(ctx, stop)
    counts = ", ".join(f"{count} {state}" for state, count in result.counts.items())
    click.echo(f"{counts}; parent run {result.parent_run_id}; {result.place}")
    if result.best is not None:
        number, value, found = result.best
        named = dict(override.split("=", 1) for override in given)
        click.echo(f"Best: trial {number}, val/loss {value:.4f}")
        click.echo(f"Next: {launch.train(config_path, {**named, **space.settings, **found}, result.experiment)}")
    elif not result.stopped:
        click.echo("No trial is complete: see above why")
        ctx.exit(0 if result.counts["pruned"] else 1)
    if result.stopped:
        ctx.exit(128 + signal.Signals[result.stopped])


def _numbers(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """Positive whole numbers between commas."""
    if not re.fullmatch(r"\s*[1-9]\d{0,3}\s*(,\s*[1-9]\d{0,3}\s*)*", text):
        raise click.BadParameter(f"{text!r} is not a list of numbers from 1 on, such as 4,1,2", ctx, parameter)
    return tuple(map(int, text.split(",")))


@click.command("verify-resume", cls=TrainingCommand, context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.option("--steps", default=40, show_default=True, type=click.IntRange(2), help="Optimizer updates to train, twice.")
@click.option("--interruptions", default=5, show_default=True, type=click.IntRange(1), help="Stops and kills in the second training.")
@click.option(
    "--processes",
    "sizes",
    default="1",
    show_default=True,
    metavar="N,N,...",
    callback=_numbers,
    help="Numbers of processes that train the parts of the second training, in turn; the first training is that of one process.",
)
@click.pass_context
def verify_resume(
    ctx: click.Context, config_path: str, overrides: tuple[str, ...], steps: int, interruptions: int, sizes: tuple[int, ...]
) -> None:
    """Prove that a configuration resumes exactly.

    Trains it twice, with and without interruptions, and compares every bit of the last checkpoint and of the curves. Exit code 1 if
    anything differs. With --processes 4,1,2 also that the number of processes does not matter.
    """
    from bdh_mlflow.studies import verify
    from bdh_mlflow.training.problems import problems

    config = Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)], checks=(problems,))
    if interruptions >= steps:
        raise click.UsageError("--interruptions must be fewer than --steps", ctx)
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        plan = verify.Plan(steps, interruptions, sizes)
        rows = verify.verify(config, plan, Path(folder), lambda text: click.echo(text, err=True))
    print_table([f"compared after step {steps}", ""], [[row.what, row.difference or "equal"] for row in rows])
    different = [row.what for row in rows if row.difference]
    if different:
        click.echo(f"Not exact: {', '.join(different)}")
        ctx.exit(1)
    click.echo(f"Exact: {len(rows)} of {len(rows)} rows equal to the bit")


@click.command()
@click.argument("run")
@config_option
@click.option("--token", "tokens", multiple=True, metavar="TEXT", help="Show the tokens nearest to this one; repeatable.")
@click.option("--nearest", default=6, show_default=True, type=click.IntRange(1), help="How many of them.")
@click.option("--out", type=click.Path(dir_okay=False), help="PNG file of the map; by default embeddings_STEP.png.")
@click.option("--log/--no-log", default=True, show_default=True, help="Also store the map among the run's artifacts.")
@ema_option
def embeddings(run: str, config_path: str, tokens: tuple[str, ...], nearest: int, ema: bool, **written: Any) -> None:
    """Look at the tokens of RUN: the lengths of their vectors, which are near each other, and a map of all of them.

    RUN is given as for `generate`. Without --token the tokens with the longest and the shortest vectors are shown.
    """
    from bdh_mlflow.studies.embeddings import FOLDER, Embeddings, log

    path = Path(written["out"]) if written["out"] else None
    if path is not None and (path.suffix != ".png" or not path.absolute().parent.is_dir()):
        raise InputError(f"--out {path}: accepted: the name of a .png file in a folder that exists")
    loaded = load_model(run, config_path, ema)
    look = Embeddings(loaded.model.embed.weight, loaded.tokenizer)
    if tokens:
        chosen = [look.token_of(token) for token in tokens]
    else:
        by_length = sorted(look.ids, key=lambda token: -look.norms[token])
        chosen = list(dict.fromkeys([*by_length[:SHOWN_TOKENS], *by_length[-SHOWN_TOKENS:]]))
    print_table(["token", "id", "length", f"nearest {nearest}, and their cosines"], look.table(chosen, nearest))
    path = path or Path(f"embeddings_{loaded.step}.png")
    path.write_bytes(look.picture())
    click.echo(f"{path}: a map of {len(look.ids):,} tokens of step {loaded.step}")
    if written["log"] and loaded.run_id is not None:
        log(path, loaded.run_id, read_config(config_path).tracking)
        click.echo(f"Stored among the artifacts of run {loaded.run_id}: {FOLDER}/{path.name}")
