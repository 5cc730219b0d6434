"""Commands about trained runs: evaluate, generate, compare, sync."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdh_mlflow.config import Config
from bdh_mlflow.errors import InputError, TrackingError
from bdh_mlflow.text import bits_per_byte

if TYPE_CHECKING:
    from bdh_mlflow.inference.generate import Loaded, Sampling
from bdh_mlflow.cli.common import SHOWN_RUNS, config_option, load_target, print_table


@click.command()
@click.argument("run")
@config_option
@click.option("--data", "folder", metavar="DIR", help="Folder of parquet files; the one it was trained on if not given.")
@click.option("--batches", type=click.IntRange(1), help="Validation batches to take; as many as the training took if not given.")
@click.option("--log/--no-log", default=True, show_default=True, help="Log the result to the MLflow run, under eval/.")
def evaluate(run: str, config_path: str, folder: str | None, batches: int | None, log: bool) -> None:
    """Loss and bits per byte of RUN (as for generate) on validation text, logged to its MLflow run if it has one."""
    import dataclasses

    from bdh_mlflow.inference import load

    loaded = load_target(run, config_path)
    dataset = loaded.config.dataset
    if folder is not None:
        dataset = dataclasses.replace(dataset, parquet_dir=folder)
    loss = load.validation_loss(loaded, dataset, batches or loaded.config.training.test_iters)
    click.echo(f"{loaded.path}: step {loaded.step}")
    click.echo(f"val/loss {loss:.4f} nats per byte, val/bpb {bits_per_byte(loss):.4f} on {dataset.parquet_dir}")
    if log and loaded.run_id is not None:
        names = load.record(loaded, dataset, loss, Config.from_yaml(config_path).tracking)
        click.echo(f"Logged to run {loaded.run_id} as {' and '.join(names)}")


@click.command()
@click.argument("run")
@config_option
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
    from bdh_mlflow.inference import generate

    if interactive and prompts:
        raise click.UsageError("--interactive asks for prompts itself; give it without --prompt")
    if prompts.count("-") > 1:
        raise click.UsageError("standard input can be one --prompt only")
    if any(value != value for value in sampling.values()):
        raise click.UsageError("--temperature and --top-p must be numbers")
    how = generate.Sampling(**sampling)
    if interactive:
        _converse(load_target(run, config_path), max_new_tokens, how)
        return
    piped = not prompts and not sys.stdin.isatty()
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts or ("-" if piped else "",)]
    loaded = load_target(run, config_path)
    if len(texts) > 1:
        for text, written in zip(texts, generate.write_all(loaded, texts, max_new_tokens, how), strict=True):
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
    from bdh_mlflow.inference import generate

    pieces = generate.write(loaded, prompt, max_new_tokens, how)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@click.argument("runs", nargs=-1, required=True)
@config_option
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
    from bdh_mlflow.studies import compare as report

    tracking, path = Config.from_yaml(config_path).tracking, Path(out)
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}")
    comparison = report.read(_split(runs, report.FILTER), tracking, metrics)
    table = report.rows(comparison)
    shown = comparison.runs[:SHOWN_RUNS]
    print_table(["", *(run.label for run in shown)], [row[: 1 + len(shown)] for row in table])
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


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False))
@config_option
@click.option("--tracking-uri", help="Where to deliver to; where the training meant to if not given.")
@click.pass_context
def sync(ctx: click.Context, folder: str | None, config_path: str, tracking_uri: str | None) -> None:
    """Deliver to MLflow what an ended training could not: that of FOLDER, or of every run under the checkpoint directory.

    What has arrived before is not sent again. Exit code 1 if something is still left.
    """
    from bdh_mlflow import checkpoint
    from bdh_mlflow.tracking import journal, sync

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
            done = sync.sync(place, tracking_uri, lambda text: click.echo(text, err=True))
        except (TrackingError, OSError) as error:  # the others may be better off
            click.echo(f"{place}: {error}", err=True)
            left += 1
        else:
            click.echo(f"{place}: {done.words}")
            left += done.left
    click.echo(f"{len(folders)} journals, {left} records left" + (f"; try again: {ctx.command_path}" if left else ""))
    if left:
        ctx.exit(1)


def _split(runs: Sequence[str], whole: re.Pattern[str]) -> list[str]:
    """Runs as separate words, also when `mlflow run` hands them over in one parameter.   whole: what is not to be split."""
    return [word for run in runs for word in ([run] if whole.search(run) else run.split())]


@click.command()
@config_option
@click.pass_context
def doctor(ctx: click.Context, config_path: str) -> None:
    """Say where runs go, whether they arrive and show, what this machine can do, and what to type; exit code 1 if something is wrong."""

    from bdh_mlflow.cli.doctor import examine

    config = Config.from_yaml(config_path)
    findings = examine(config)
    print_table(["", "found", "do"], [[f.what, f"{f.found}{'' if f.good else '  <- '}", f.do] for f in findings])
    wrong = [f.what for f in findings if not f.good]
    click.echo(
        f"Not in order: {', '.join(wrong)}"
        if wrong
        else f"All in order. Next: mlflow run . --env-manager local --experiment-name bdh -P config={config_path}"
    )
    if wrong:
        ctx.exit(1)
