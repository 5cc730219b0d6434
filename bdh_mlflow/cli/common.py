"""What several commands share: options, settings given as words, the `mlflow run` line, tables, loading a model."""

import difflib
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from rich.console import Console
from rich.table import Table

from bdh_mlflow.config import Config

if TYPE_CHECKING:
    from bdh_mlflow.inference.generate import Loaded
    from bdh_mlflow.training.stop import StopRequest

DEFAULT_CONFIG = "configs/config.yaml"
DEFAULT_EXPERIMENT = "bdh"
PIPED_WIDTH = 200  # columns of a table that is written to a file or pipe

config_option = click.option("--config", "config_path", default=DEFAULT_CONFIG, show_default=True, help="YAML file of settings.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Replace one setting of the file; repeatable."
)
ACCEPTS_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of commands that also take settings as `--section.key VALUE`; `dotted_options` reads them."""


def dotted_options(ctx: click.Context) -> list[str]:
    """The command's `--section.key VALUE` pairs as overrides.   Raises a usage error for any other unknown word."""
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


def mlflow_run(config_path: str, parameters: Mapping[str, object], experiment: str = DEFAULT_EXPERIMENT) -> str:
    """The shell line that trains with a configuration.   parameters: further `-P` options (`resume` or settings) and their values."""
    words = ["mlflow", "run", ".", "--env-manager", "local", "--experiment-name", experiment]
    for name, value in {"config": config_path, **parameters}.items():
        words += ["-P", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def exit_stopped_early(ctx: click.Context, stop: "StopRequest") -> NoReturn:
    """End the command after a signal that came before the first step, with the signal's exit code."""
    click.echo("Stopped before the first step; nothing was saved.", err=True)
    ctx.exit(128 + (int(stop.received) if isinstance(stop.received, signal.Signals) else signal.SIGINT))


def load_model(target: str, config_path: str) -> "Loaded":
    """The model that a target names (same grammar as `--resume`); prints each file that was skipped to standard error."""
    from bdh_mlflow.inference import load

    config = Config.from_yaml(config_path)
    loaded = load.load(target, Path(config.training.checkpoint_dir), config.tracking)
    for note in loaded.notes:
        click.echo(note, err=True)
    return loaded


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output, PIPED_WIDTH columns wide where that is no terminal."""
    table = Table(*(str(h).replace("[", "\\[") for h in header))
    for row in rows:
        table.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)
