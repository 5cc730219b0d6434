"""The front door: words to calls, exceptions to messages and exit codes. The only home of echo and exit.

Heavy rooms are imported inside the commands that need them, so that `--help` and `config` answer at once.
"""

import difflib
import functools
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from bdh_mlflow import __version__, tokenizer
from bdh_mlflow.config import BDHConfig, Config, Problem
from bdh_mlflow.errors import BdhError, InputError, ResumeError, TrackingError

if TYPE_CHECKING:
    from bdh_mlflow.export import Format
    from bdh_mlflow.generation import Loaded, Sampling
    from bdh_mlflow.start import Outcome
    from bdh_mlflow.trainer import StopRequest

DEFAULT_CONFIG = "configs/config.yaml"
SHOWN_RUNS = 8  # columns that a terminal holds


class _Commands(click.Group):
    """Turns the package's errors into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BdhError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="bdh-mlflow")
def cli() -> None:
    """Train BDH from a YAML config, tracked by MLflow, resumable bit for bit."""
    _quiet_libraries()


def main() -> None:
    """Entry point of the console script and of `python -m bdh_mlflow`."""
    cli(prog_name="bdh-mlflow")


_config = click.option("--config", "config_path", default=DEFAULT_CONFIG, show_default=True, help="YAML file of the run.")
_set = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Replace a setting of the file; repeatable.")
_open_ended = {"ignore_unknown_options": True, "allow_extra_args": True}


@cli.command(context_settings=_open_ended)
@_config
@_set
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
    given = [*overrides, *_dotted_options(ctx)]
    if resume not in ("none", ""):
        given.append(f"training.resume_from_checkpoint={resume}")
    from bdh_mlflow import console, precision, start
    from bdh_mlflow.trainer import StopRequest

    config = Config.from_yaml(config_path, given, checks=(precision.problems,))
    stop = StopRequest()
    stop.install()
    try:
        with console.watching(sys.stdout, config.training.max_iters) as progress:
            outcome = start.train(config, progress, stop, fork=fork == "yes")
    except KeyboardInterrupt:
        _stopped_early(ctx, stop)
    click.echo(_farewell(outcome, config_path, given))
    if outcome.ending.reason != "finished":
        ctx.exit(128 + signal.Signals[outcome.ending.reason])


def _stopped_early(ctx: click.Context, stop: "StopRequest") -> NoReturn:
    """A signal came while nothing had begun."""
    click.echo("Stopped before the first step; nothing was saved.", err=True)
    ctx.exit(128 + (int(stop.received) if isinstance(stop.received, signal.Signals) else signal.SIGINT))


@cli.command(context_settings=_open_ended)
@_config
@_set
@click.option("--space", "space_path", default="configs/sweep.yaml", show_default=True, help="YAML file of what is searched.")
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1), help="Trials in all, those of earlier starts included.")
@click.pass_context
def sweep(ctx: click.Context, config_path: str, overrides: tuple[str, ...], space_path: str, trials: int) -> None:
    """Search for good settings: trainings judged by val/loss, under one parent run; started again, it goes on."""
    from bdh_mlflow import console
    from bdh_mlflow import sweep as room
    from bdh_mlflow.trainer import StopRequest

    given, space = [*overrides, *_dotted_options(ctx)], room.Space.from_yaml(space_path)
    stop = StopRequest()
    stop.install()
    try:
        done = room.sweep(config_path, space, trials, given, functools.partial(console.watching, sys.stdout), stop, click.echo)
    except KeyboardInterrupt:
        _stopped_early(ctx, stop)
    click.echo(f"{', '.join(f'{n} {what}' for what, n in done.counts.items())}; parent run {done.parent_run_id}; study {done.journal}")
    if done.best is not None:
        number, value, settings = done.best
        words = "".join(f" -P {shlex.quote(f'{key}={value}')}" for key, value in {**space.settings, **settings}.items())
        click.echo(f"Best: trial {number}, val/loss {value:.4f}")
        click.echo(f"Next: mlflow run . --env-manager local --experiment-name bdh -P config={config_path}{words}")
    if done.stopped:
        ctx.exit(128 + signal.Signals[done.stopped])


@cli.command()
@click.argument("run")
@_config
@click.option("--data", "folder", metavar="DIR", help="Folder of parquet files; the one it was trained on if not given.")
@click.option("--batches", type=click.IntRange(1), help="Validation batches to take; as many as the training took if not given.")
@click.option("--log/--no-log", default=True, show_default=True, help="Log the result to the MLflow run, under eval/.")
def evaluate(run: str, config_path: str, folder: str | None, batches: int | None, log: bool) -> None:
    """Loss and bits per byte of RUN (as for generate) on validation text, logged to its MLflow run if it has one."""
    import dataclasses

    from bdh_mlflow import serve

    loaded = _load(run, config_path)
    dataset = loaded.config.dataset
    if folder is not None:
        dataset = dataclasses.replace(dataset, parquet_dir=folder)
    loss = serve.validation_loss(loaded, dataset, batches or loaded.config.training.test_iters)
    click.echo(f"{loaded.path}: step {loaded.step}")
    click.echo(f"val/loss {loss:.4f} nats per byte, val/bpb {tokenizer.bits_per_byte(loss):.4f} on {dataset.parquet_dir}")
    if log and loaded.run_id is not None:
        names = serve.record(loaded, dataset, loss, Config.from_yaml(config_path).tracking)
        click.echo(f"Logged to run {loaded.run_id} as {' and '.join(names)}")


@cli.command()
@click.argument("run")
@_config
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; - reads standard input. Several are continued together.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Bytes to write.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 always takes the likeliest byte.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(1), help="Choose among the k likeliest bytes.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Choose among the likeliest bytes that together reach this.")
@click.option("--stop", default="", help="Text after which to write nothing more.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Repeatable randomness.")
@click.option("--interactive", is_flag=True, help="Ask for one prompt after the other; an empty end of input (Ctrl-D) leaves.")
def generate(run: str, config_path: str, prompts: tuple[str, ...], max_new_tokens: int, interactive: bool, **sampling: Any) -> None:
    """Continue a prompt with RUN: latest, a path, a run id, RUN:N for its step N, an exported file, models:/NAME@ALIAS or another URI.

    Without --prompt the prompt is read from standard input, if something is piped into it.
    """
    from bdh_mlflow import generation

    if interactive and prompts:
        raise click.UsageError("--interactive asks for prompts itself; give it without --prompt")
    if prompts.count("-") > 1:
        raise click.UsageError("standard input can be one --prompt only")
    if any(value != value for value in sampling.values()):
        raise click.UsageError("--temperature and --top-p must be numbers")
    how = generation.Sampling(**sampling)
    if interactive:
        _converse(_load(run, config_path), max_new_tokens, how)
        return
    piped = not prompts and not sys.stdin.isatty()
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts or ("-" if piped else "",)]
    loaded = _load(run, config_path)
    if len(texts) > 1:
        for text, written in zip(texts, generation.write_all(loaded, texts, max_new_tokens, how), strict=True):
            click.echo(f"{text}{written}\n")
        return
    _stream(loaded, texts[0], max_new_tokens, how)


def _converse(loaded: "Loaded", max_new_tokens: int, how: "Sampling") -> None:
    """Prompt and answer by turns, until the input ends. Each prompt stands for itself."""
    click.echo(f"{loaded.path}, step {loaded.step}. A line is a prompt; Ctrl-D leaves.", err=True)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        try:
            _stream(loaded, prompt, max_new_tokens, how)
        except InputError as error:
            click.echo(f"Error: {error}", err=True)


def _stream(loaded: "Loaded", prompt: str, max_new_tokens: int, how: "Sampling") -> None:
    from bdh_mlflow import generation

    pieces = generation.write(loaded, prompt, max_new_tokens, how)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@cli.command()
@click.argument("runs", nargs=-1, required=True)
@_config
@click.option(
    "--out", default="compare.html", show_default=True, type=click.Path(dir_okay=False), help="Report to write; its plots beside it."
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Draw this one, too; can be repeated.")
@click.option("--log/--no-log", default=True, show_default=True, help="Keep the report among the first run's artifacts, too.")
def compare(runs: tuple[str, ...], config_path: str, out: str, metrics: tuple[str, ...], log: bool) -> None:
    """What differs between RUNS, and their curves on steps, tokens and active time.

    A run is given by id, name or `latest`; an experiment's name stands for all its runs, and so does a filter such as
    "metrics.`val/loss` < 2" or "params.`model.n_layer` = '6'".
    """
    from bdh_mlflow import compare as report

    tracking, path = Config.from_yaml(config_path).tracking, Path(out)
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}")
    comparison = report.read(_split(runs, report.FILTER), tracking, metrics)
    table = report.rows(comparison)
    shown = comparison.runs[:SHOWN_RUNS]
    _print_table(["", *(run.label for run in shown)], [row[: 1 + len(shown)] for row in table])
    if len(shown) < len(comparison.runs):
        click.echo(f"... and {len(comparison.runs) - len(shown)} more runs in the report")
    drawn, files = report.pictures(comparison), [path]
    path.write_text(report.page(comparison, drawn), encoding="utf-8")
    for metric, png in drawn.items():
        files.append(path.with_name(f"{path.stem}_{metric.replace('/', '_')}.png"))
        files[-1].write_bytes(png)
    if log:
        report.keep(comparison, files, tracking)
    click.echo(f"Report with curves: {path.absolute()}")


@cli.command("verify-resume", context_settings=_open_ended)
@_config
@_set
@click.option("--steps", default=40, show_default=True, type=click.IntRange(2), help="Optimizer updates to train, twice.")
@click.option("--interruptions", default=5, show_default=True, type=click.IntRange(1), help="Stops and kills in the second training.")
@click.pass_context
def verify_resume(ctx: click.Context, config_path: str, overrides: tuple[str, ...], steps: int, interruptions: int) -> None:
    """Prove that a configuration resumes exactly; exit code 1 if one bit differs."""
    from bdh_mlflow import precision, verify

    config = Config.from_yaml(config_path, [*overrides, *_dotted_options(ctx)], checks=(precision.problems,))
    if interruptions >= steps:
        raise click.UsageError("--interruptions must be fewer than --steps", ctx)
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        rows = verify.verify(config, steps, interruptions, Path(folder), lambda text: click.echo(text, err=True))
    _print_table(["compared after step " + str(steps), ""], [[row.what, row.difference or "equal"] for row in rows])
    different = [row.what for row in rows if row.difference]
    if different:
        click.echo(f"Not exact: {', '.join(different)}")
        ctx.exit(1)
    click.echo(f"Exact: {len(rows)} of {len(rows)} rows equal to the bit")


@cli.group()
def data() -> None:
    """Text for training."""


@data.command("prepare")
@click.argument("source")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--column", default="text", show_default=True, help="Field or column of jsonl and parquet sources, and of the result.")
def data_prepare(source: str, folder: str, column: str) -> None:
    """Turn SOURCE (python-stdlib; a txt, jsonl or parquet file; a folder of them or of source code) into parquet files in FOLDER."""
    from bdh_mlflow import data as room

    out = Console(file=sys.stderr)
    with out.status("reading") as status:
        done = room.prepare(source, Path(folder), column, lambda n, size: status.update(f"{n:,} documents, {size / 1e6:,.1f} MB"))
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
    from bdh_mlflow import data as room

    tree = {"dataset": {"parquet_dir": folder, "text_column": column, "val_fraction": val_fraction}}
    text = room.ParquetText(Config.from_dict(tree, origin="options").dataset)
    first = text.row_groups[0]
    training, validation = text.training_bytes(first), text.validation_bytes(first)
    rows = [
        ["files", f"{len(text.files):,} ({text.bytes / 1e6:,.1f} MB)"],
        ["row groups", f"{len(text.row_groups):,}"],
        ["documents", f"{text.rows:,}"],
        ["digest", text.digest],
        ["first row group", f"{first.rows:,} documents, {len(training):,} training and {len(validation):,} validation bytes"],
        ["begins", tokenizer.decode(training[:200].tolist())],
    ]
    _print_table(["", str(text.root)], rows)


@cli.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False))
@_config
@click.option("--tracking-uri", help="Where to deliver to; where the training meant to if not given.")
@click.pass_context
def sync(ctx: click.Context, folder: str | None, config_path: str, tracking_uri: str | None) -> None:
    """Deliver to MLflow what an ended training could not: that of FOLDER, or of every run under the checkpoint directory.

    What has arrived before is not sent again. Exit code 1 if something is still left.
    """
    from bdh_mlflow import checkpoint, delivery, journal

    if folder is not None:
        folders = [Path(folder)]
        if not (folders[0] / journal.FILE_NAME).is_file():
            raise InputError(f"{folder}: no {journal.FILE_NAME} in this folder; name a run directory")
    else:
        directory = Path(Config.from_yaml(config_path).training.checkpoint_dir)
        folders = [f for f in (*checkpoint.pending(directory), *checkpoint.list_all(directory)) if (f / journal.FILE_NAME).is_file()]
    left = 0
    for place in folders:
        try:
            done = delivery.sync(place, tracking_uri, lambda said: click.echo(said["note"], err=True) if "note" in said else None)
        except (TrackingError, OSError) as error:  # the others may be better off
            click.echo(f"{place}: {error}", err=True)
            left += 1
        else:
            click.echo(f"{place}: {done.words}")
            left += done.left
    click.echo(f"{len(folders)} journals, {left} records left" + (f"; try again: {ctx.command_path}" if left else ""))
    if left:
        ctx.exit(1)


@cli.command()
@_config
@click.pass_context
def doctor(ctx: click.Context, config_path: str) -> None:
    """Say where runs go, whether they arrive and show, what this machine can do, and what to type; exit code 1 if something is wrong."""
    from bdh_mlflow import doctor as room

    config = Config.from_yaml(config_path)
    findings = room.examine(config)
    _print_table(["", "found", "do"], [[f.what, f"{f.found}{'' if f.good else '  <- '}", f.do] for f in findings])
    wrong = [f.what for f in findings if not f.good]
    click.echo(
        f"Not in order: {', '.join(wrong)}"
        if wrong
        else f"All in order. Next: mlflow run . --env-manager local --experiment-name bdh -P config={config_path}"
    )
    if wrong:
        ctx.exit(1)


@cli.group()
def checkpoints() -> None:
    """Checkpoints on disk and in the mirror."""


@checkpoints.command("list")
@click.argument("target", default="checkpoints")
@_config
@click.option("--best", is_flag=True, help="Only the one of lowest validation loss.")
@click.option("--all-runs", is_flag=True, help="Of every run in the experiment, best first (needs MLflow).")
def checkpoints_list(target: str, config_path: str, best: bool, all_runs: bool) -> None:
    """Checkpoints of TARGET: a run directory, the folder of run directories, or an MLflow run (its mirror)."""
    from bdh_mlflow import checkpoint

    if all_runs or not Path(target).exists():
        _list_mirrored(None if all_runs else target, config_path, best)
        return
    rows = []
    found = []
    for run_dir in checkpoint.list_all(Path(target)) or [Path(target)]:
        listing = checkpoint.list_run(run_dir)
        top = checkpoint.best(listing.checkpoints)
        found += [(c, c == top) for c in listing.checkpoints]
        rows += [[str(path), "", "", "", "", reason] for path, reason in listing.rejected if not best]
    if best:
        top = checkpoint.best(tuple(c for c, _ in found))
        found = [(c, True) for c, _ in found if c == top]
    for c, is_best in found:
        m = c.manifest
        val = "" if m.val_loss is None else f"{m.val_loss:.4f}{' best' if is_best else ''}"
        rows.append([str(c.path), str(m.step), f"{m.tokens_seen:,}", val, f"{m.bytes / 1e6:.1f} MB", m.mlflow_run_id or ""])
    if not rows:
        raise InputError(f"{target}: no checkpoints here{' with a validation loss' if best else ''}")
    _print_table(["checkpoint", "step", "tokens", "val/loss", "size", "MLflow run"], rows)


def _list_mirrored(target: str | None, config_path: str, best: bool) -> None:
    from bdh_mlflow import mirror, resume

    tracking = Config.from_yaml(config_path).tracking
    found = mirror.search(tracking, resume.mirrored(target, tracking)[0] if target else None, best)
    rows = [[m.checkpoint, str(m.step), "" if m.val_loss is None else f"{m.val_loss:.4f}", m.run_name] for m in found]
    if not rows:
        raise InputError(
            f"{target or 'experiment ' + tracking.experiment}: no mirrored checkpoints{' with a validation loss' if best else ''}"
        )
    _print_table(["checkpoint", "step", "val/loss", "run"], rows)


@checkpoints.command("verify")
@click.argument("target", default="checkpoints")
@_config
@click.pass_context
def checkpoints_verify(ctx: click.Context, target: str, config_path: str) -> None:
    """Read every checkpoint of TARGET (a folder, or an MLflow run: its mirror) and compare digests; exit code 1 if one is damaged."""
    from bdh_mlflow import checkpoint
    from bdh_mlflow.errors import CheckpointError

    good, bad = 0, 0

    def check(name: str, verify: Callable[[], object]) -> None:
        nonlocal good, bad
        try:
            verify()
        except (CheckpointError, ResumeError) as error:
            click.echo(f"{name}: {error}")
            bad += 1
        else:
            click.echo(f"{name}: whole")
            good += 1

    if Path(target).exists():
        for run_dir in checkpoint.list_all(Path(target)) or [Path(target)]:
            listing = checkpoint.list_run(run_dir)
            for path, reason in listing.rejected:
                click.echo(f"{path}: {reason}")
            bad += len(listing.rejected)
            for c in listing.checkpoints:
                check(str(c.path), functools.partial(checkpoint.verify, c))
    else:
        from bdh_mlflow import resume

        tracking = Config.from_yaml(config_path).tracking
        run_id, paths = resume.mirrored(target, tracking)
        for _, file in paths:
            with tempfile.TemporaryDirectory(prefix="verify-") as folder:  # one at a time: a mirror can be larger than a disk
                check(f"runs:/{run_id}/{file}", functools.partial(resume.fetch, run_id, file, Path(folder), tracking))
    if not good and not bad:
        raise InputError(f"{target}: no checkpoints here")
    click.echo(f"{good} whole, {bad} not")
    if bad:
        ctx.exit(1)


@checkpoints.command("pull")
@click.argument("target")
@_config
def checkpoints_pull(target: str, config_path: str) -> None:
    """Bring the checkpoint that TARGET names (a run id, runs:/..., an artifact URI) to this machine."""
    from bdh_mlflow import resume

    config = Config.from_yaml(config_path)
    found = resume.find(target, Path(config.training.checkpoint_dir), config.tracking)
    click.echo(str(found.path))


@checkpoints.command("export")
@click.argument("target")
@click.option("--format", "kind", type=click.Choice(["4bit", "safetensors"]), required=True, help="Packed in 4 bits, or plain float32.")
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="File to write; beside the checkpoint if not given.")
@_config
def checkpoints_export(target: str, kind: "Format", output: str | None, config_path: str) -> None:
    """Write the model of TARGET (as for resume) to one safetensors file, which generate and evaluate take in place of a run."""
    from bdh_mlflow import checkpoint, export, resume

    config = Config.from_yaml(config_path)
    found = resume.find(target, Path(config.training.checkpoint_dir), config.tracking)
    if found.checkpoint is None or found.state.get("format") != checkpoint.FORMAT:
        raise InputError(f"{found.path}: bare weights without a configuration; train from it first (a warm start)")
    path = Path(output) if output else export.default_path(found.checkpoint, kind)
    if path.suffix != export.SUFFIX:
        raise InputError(f"--output {path}: its name must end in {export.SUFFIX}, by which generate and evaluate know it")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")
    done = export.write(path, found.state, found.checkpoint.manifest.val_loss, kind)
    formats = Config.from_dict(found.state["config"]).low_precision
    weights = "float32"
    if done.bits is not None:
        nested = "with" if formats.use_double_quant else "without"
        weights = f"{formats.quantization_type} {nested} double-quantised scales, {done.bits:.3f} bits a quantised weight"
    click.echo(f"{done.path}: {done.bytes / 1e6:.2f} MB of step {found.checkpoint.manifest.step}; {weights}")
    if done.bits is not None and not formats.use_4bit:
        click.echo("This run was not trained for 4-bit weights (low_precision.use_4bit: false): expect a higher loss than its val/loss.")
    click.echo(f"Next: bdh-mlflow evaluate {done.path} (or generate {done.path} --prompt 'def ')")


@checkpoints.command("register")
@click.argument("target")
@click.option("--name", required=True, help="Registered model to make a version of.")
@click.option("--alias", help="Name that points to this version from now on: champion, say.")
@click.option(
    "--format", "kind", type=click.Choice(["4bit", "safetensors"]), help="Packed in 4 bits, or float32; as it was trained if not given."
)
@_config
def checkpoints_register(target: str, name: str, alias: str | None, kind: "Format | None", config_path: str) -> None:
    """Make the model of TARGET (as for resume) a version of a registered model that `mlflow models serve` serves."""
    from bdh_mlflow import registry

    config = Config.from_yaml(config_path)
    version, uri = registry.register(
        target, name, alias, kind, Path(config.training.checkpoint_dir), config.tracking, lambda text: click.echo(text, err=True)
    )
    click.echo(f"{name}, version {version}: {uri}")
    click.echo(f"Serve: mlflow models serve -m {uri} --env-manager local --port 5001")
    click.echo(
        """Ask:   curl -H 'Content-Type: application/json' -d '{"inputs": {"prompt": ["def "]}}' http://127.0.0.1:5001/invocations"""
    )


@cli.group("config")
def config_group() -> None:
    """Configuration files."""


@config_group.command("check", context_settings=_open_ended)
@_config
@_set
@click.pass_context
def config_check(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """Say everything that is wrong with a configuration, or that this machine can run it."""
    from bdh_mlflow import checkpoint, precision

    def folder(config: Config) -> list[Problem]:
        reason = checkpoint.unwritable(Path(config.training.checkpoint_dir))
        return [Problem("training.checkpoint_dir", reason)] if reason else []

    config = Config.from_yaml(config_path, [*overrides, *_dotted_options(ctx)], checks=(precision.problems, folder))
    tokens = config.training.batch_size * config.training.block_size * config.training.gradient_accumulation_steps
    parameters = _parameters(config.to_bdh_config())
    click.echo(f"{config_path}: sound. {parameters / 1e6:.2f} M parameters, {tokens:,} tokens a step, {config.training.max_iters:,} steps")


@config_group.command("show", context_settings=_open_ended)
@_config
@_set
@click.pass_context
def config_show(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration: every setting with its value."""
    click.echo(Config.from_yaml(config_path, [*overrides, *_dotted_options(ctx)]).resolved().to_yaml(), nl=False)


def _dotted_options(ctx: click.Context) -> list[str]:
    """`--section.key VALUE` pairs as overrides.   Raises a usage error for anything else that was left over."""
    overrides, words = [], list(ctx.args)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            known = [option for parameter in ctx.command.params for option in parameter.opts]
            near = difflib.get_close_matches(word, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(
                f"No such option: {word}.{hint} Settings are given as --section.key VALUE or --set section.key=VALUE.", ctx
            )
        if not equals:
            if not words:
                raise click.UsageError(f"Option {word} needs a value.", ctx)
            value = words.pop(0)
        overrides.append(f"{name}={value}")
    return overrides


def _load(target: str, config_path: str) -> "Loaded":
    from bdh_mlflow import serve

    config = Config.from_yaml(config_path)
    loaded = serve.load(target, Path(config.training.checkpoint_dir), config.tracking)
    for note in loaded.notes:
        click.echo(f"passed over {note}", err=True)
    return loaded


def _farewell(outcome: "Outcome", config_path: str, overrides: Sequence[str]) -> str:
    """Where everything is, and what to type next."""
    ending, identity = outcome.ending, outcome.identity
    lines = [""]
    if ending.samples:
        lines += ["Samples (what stands in \u27e6 \u27e7 is the model's):", *map(str, ending.samples)]
    val = f", val/loss {ending.val_loss:.4f}, val/bpb {tokenizer.bits_per_byte(ending.val_loss):.4f}" if ending.val_loss is not None else ""
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


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*(str(h).replace("[", "\\[") for h in header))
    for row in rows:
        table.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _split(runs: Sequence[str], whole: re.Pattern[str]) -> list[str]:
    """Runs as separate words, also when `mlflow run` hands them over in one parameter.   whole: what is not to be split."""
    return [word for run in runs for word in ([run] if whole.search(run) else run.split())]


def _quiet_libraries() -> None:
    """Notes of libraries that a user can do nothing about; warnings and errors stay."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each file, over our own words
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # our last lines name the page
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics", "mlflow.utils.requirements_utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"mlflow\..*")
    warnings.filterwarnings("ignore", ".*Any type hint is inferred", UserWarning)  # of its own classes, when mlflow.pyfunc is imported
