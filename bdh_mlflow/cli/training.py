"""Commands that prepare, begin or prove a training."""

import functools
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from bdh_mlflow.config import BDHConfig, Config, Problem, resolve
from bdh_mlflow.text import bits_per_byte, decode

if TYPE_CHECKING:
    from bdh_mlflow.training.start import Outcome
from bdh_mlflow.cli.common import DEFAULT_CONFIG, OPEN_ENDED, config_option, dotted_options, print_table, set_option, stopped_early


@click.command(context_settings=OPEN_ENDED)
@config_option
@set_option
@click.option(
    "--resume",
    default="none",
    metavar="TARGET",
    help="Continue: latest, a path, a run id, runs:/... or an artifact URI; RUN:N for its step N.",
)
@click.option(
    "--fork",
    type=click.Choice(["yes", "no"]),
    is_flag=False,
    flag_value="yes",
    default="no",
    help="With --resume: begin a new run from the checkpoint, in which settings may differ.",
)
@click.pass_context
def train(ctx: click.Context, config_path: str, overrides: tuple[str, ...], resume: str, fork: str) -> None:
    """Train, from the start or from a checkpoint.

    Settings can also be given as --section.key VALUE, which is how `mlflow run -P section.key=value` passes them on.
    """
    given = [*overrides, *dotted_options(ctx)]
    if resume not in ("none", ""):
        given.append(f"training.resume_from_checkpoint={resume}")
    from bdh_mlflow.cli import console
    from bdh_mlflow.tracking.sender import SubprocessSender
    from bdh_mlflow.training import build, start
    from bdh_mlflow.training.stop import StopRequest

    config = Config.from_yaml(config_path, given, checks=(build.problems,))
    stop = StopRequest()
    stop.install()
    try:
        with console.watching(sys.stdout, config.training.max_iters) as progress:
            outcome = start.train(config, progress, stop, fork=fork == "yes", make_sender=ctx.obj or SubprocessSender)
    except KeyboardInterrupt:
        stopped_early(ctx, stop)
    click.echo(_farewell(outcome, config_path, given))
    if outcome.ending.reason != "finished":
        ctx.exit(128 + signal.Signals[outcome.ending.reason])


@click.command(context_settings=OPEN_ENDED)
@config_option
@set_option
@click.option("--space", "space_path", default="configs/sweep.yaml", show_default=True, help="YAML file of what is searched.")
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1), help="Trials in all, those of earlier starts included.")
@click.pass_context
def sweep(ctx: click.Context, config_path: str, overrides: tuple[str, ...], space_path: str, trials: int) -> None:
    """Search for good settings: trainings judged by val/loss, under one parent run; started again, it goes on."""
    from bdh_mlflow.cli import console
    from bdh_mlflow.studies import sweep as study
    from bdh_mlflow.tracking.sender import SubprocessSender
    from bdh_mlflow.training.stop import StopRequest

    given, space = [*overrides, *dotted_options(ctx)], study.Space.from_yaml(space_path)
    stop = StopRequest()
    stop.install()
    try:
        done = study.sweep(
            config_path,
            space,
            trials,
            given,
            functools.partial(console.watching, sys.stdout),
            stop,
            click.echo,
            ctx.obj or SubprocessSender,
        )
    except KeyboardInterrupt:
        stopped_early(ctx, stop)
    click.echo(f"{', '.join(f'{n} {what}' for what, n in done.counts.items())}; parent run {done.parent_run_id}; study {done.journal}")
    if done.best is not None:
        number, value, settings = done.best
        words = "".join(f" -P {shlex.quote(f'{key}={value}')}" for key, value in {**space.settings, **settings}.items())
        click.echo(f"Best: trial {number}, val/loss {value:.4f}")
        click.echo(f"Next: mlflow run . --env-manager local --experiment-name bdh -P config={config_path}{words}")
    if done.stopped:
        ctx.exit(128 + signal.Signals[done.stopped])


@click.command("verify-resume", context_settings=OPEN_ENDED)
@config_option
@set_option
@click.option("--steps", default=40, show_default=True, type=click.IntRange(2), help="Optimizer updates to train, twice.")
@click.option("--interruptions", default=5, show_default=True, type=click.IntRange(1), help="Stops and kills in the second training.")
@click.pass_context
def verify_resume(ctx: click.Context, config_path: str, overrides: tuple[str, ...], steps: int, interruptions: int) -> None:
    """Prove that a configuration resumes exactly; exit code 1 if one bit differs."""
    from bdh_mlflow.studies import verify
    from bdh_mlflow.training import build

    config = Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)], checks=(build.problems,))
    if interruptions >= steps:
        raise click.UsageError("--interruptions must be fewer than --steps", ctx)
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        rows = verify.verify(config, steps, interruptions, Path(folder), lambda text: click.echo(text, err=True))
    print_table(["compared after step " + str(steps), ""], [[row.what, row.difference or "equal"] for row in rows])
    different = [row.what for row in rows if row.difference]
    if different:
        click.echo(f"Not exact: {', '.join(different)}")
        ctx.exit(1)
    click.echo(f"Exact: {len(rows)} of {len(rows)} rows equal to the bit")


@click.group()
def data() -> None:
    """Text for training."""


@data.command("prepare")
@click.argument("source")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--column", default="text", show_default=True, help="Field or column of jsonl and parquet sources, and of the result.")
def data_prepare(source: str, folder: str, column: str) -> None:
    """Turn SOURCE (python-stdlib; a txt, jsonl or parquet file; a folder of them or of source code) into parquet files in FOLDER."""

    from bdh_mlflow.data.prepare import prepare

    out = Console(file=sys.stderr)
    with out.status("reading") as status:
        done = prepare(source, Path(folder), column, lambda n, size: status.update(f"{n:,} documents, {size / 1e6:,.1f} MB"))
    for name, reason in done.skipped[:10]:
        click.echo(f"passed over {name}: {reason}")
    if len(done.skipped) > 10:
        click.echo(f"... and {len(done.skipped) - 10} more")
    click.echo(f"{done.folder}: {done.documents:,} documents, {done.bytes / 1e6:,.1f} MB of text in {done.files} files")
    click.echo(f"Next: mlflow run . --env-manager local -P config={DEFAULT_CONFIG} -P dataset.parquet_dir={done.folder}")


@data.command("inspect")
@click.argument("folder", type=click.Path())
@click.option("--column", default="text", show_default=True, help="Column of the documents.")
@click.option("--val-fraction", default=0.01, show_default=True, help="Share kept for validation.")
def data_inspect(folder: str, column: str, val_fraction: float) -> None:
    """What a FOLDER of parquet files holds, as training will see it."""

    from bdh_mlflow.data.parquet import ParquetText

    tree = {"dataset": {"parquet_dir": folder, "text_column": column, "val_fraction": val_fraction}}
    text = ParquetText(Config.from_dict(tree, origin="options").dataset)
    first = text.row_groups[0]
    training, validation = text.training_bytes(first), text.validation_bytes(first)
    rows = [
        ["files", f"{len(text.files):,} ({text.bytes / 1e6:,.1f} MB)"],
        ["row groups", f"{len(text.row_groups):,}"],
        ["documents", f"{text.rows:,}"],
        ["digest", text.digest],
        ["first row group", f"{first.rows:,} documents, {len(training):,} training and {len(validation):,} validation bytes"],
        ["begins", decode(training[:200].tolist())],
    ]
    print_table(["", str(text.root)], rows)


@click.group("config")
def config_group() -> None:
    """Configuration files."""


@config_group.command("check", context_settings=OPEN_ENDED)
@config_option
@set_option
@click.pass_context
def config_check(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """Say everything that is wrong with a configuration, or that this machine can run it."""
    from bdh_mlflow import checkpoint
    from bdh_mlflow.training import build

    def folder(config: Config) -> list[Problem]:
        reason = checkpoint.why_unwritable(Path(config.training.checkpoint_dir))
        return [Problem("training.checkpoint_dir", reason)] if reason else []

    config = Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)], checks=(build.problems, folder))
    tokens = config.training.batch_size * config.training.block_size * config.training.gradient_accumulation_steps
    parameters = _parameters(config.to_bdh_config())
    click.echo(f"{config_path}: sound. {parameters / 1e6:.2f} M parameters, {tokens:,} tokens a step, {config.training.max_iters:,} steps")


@config_group.command("show", context_settings=OPEN_ENDED)
@config_option
@set_option
@click.pass_context
def config_show(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration: every setting with its value."""
    click.echo(resolve(Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)])).config.to_yaml(), nl=False)


def _farewell(outcome: "Outcome", config_path: str, overrides: Sequence[str]) -> str:
    """Where everything is, and what to type next."""
    ending, identity = outcome.ending, outcome.identity
    lines = [""]
    if ending.samples:
        lines += ["Samples (what stands in \u27e6 \u27e7 is the model's):", *map(str, ending.samples)]
    val = f", val/loss {ending.val_loss:.4f}, val/bpb {bits_per_byte(ending.val_loss):.4f}" if ending.val_loss is not None else ""
    how = "Finished" if ending.reason == "finished" else f"Stopped by {ending.reason}"
    lines.append(f"{how} at step {ending.step}{val}; peak memory {outcome.peak_gib:.2f} GiB")
    if outcome.run_dir:
        lines.append(f"Checkpoints: {outcome.run_dir}")
    name = identity.experiment if identity else outcome.experiment
    target = identity.run_id if identity and not outcome.undelivered else str(outcome.run_dir)
    again = f"mlflow run . --env-manager local --experiment-name {name} -P config={config_path} -P resume={target}"
    settings = dict(override.split("=", 1) for override in overrides)  # `mlflow run` refuses a parameter given twice
    settings.pop("training.resume_from_checkpoint", None)
    if ending.reason == "finished":
        settings["training.max_iters"] = str(2 * ending.step)
    again += "".join(f" -P {shlex.quote(f'{key}={value}')}" for key, value in settings.items())
    if ending.reason != "finished" and outcome.run_dir:
        lines.append(f"Go on:   {again}")
    elif outcome.run_dir:
        lines.append(f"Try it:  bdh-mlflow generate {outcome.run_dir} --prompt 'def '")
        lines.append(f"Go on:   {again}")
    if outcome.undelivered:
        lines.append(f"{outcome.undelivered} records wait for the tracking server; they are kept, and the checkpoints here are whole")
        lines.append(f"Deliver: bdh-mlflow sync {outcome.journal}")
    elif identity and not identity.on_server:
        lines.append(f"Look:    mlflow ui --backend-store-uri {identity.tracking_uri}")
        lines.append(f"         then open {identity.page}")
    elif identity:
        lines.append(f"Look:    {identity.page}")
    return "\n".join(lines)


def _parameters(shape: BDHConfig) -> int:
    wide = shape.mlp_internal_dim_multiplier * shape.n_embd
    return 3 * wide * shape.n_embd + 2 * shape.vocab_size * shape.n_embd
