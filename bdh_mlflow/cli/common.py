"""What commands share: options, leftover words as settings, tables, a target ready to answer."""

import difflib
import signal
import sys
from collections.abc import Sequence
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
SHOWN_RUNS = 8  # columns that a terminal holds


config_option = click.option("--config", "config_path", default=DEFAULT_CONFIG, show_default=True, help="YAML file of the run.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Replace a setting of the file; repeatable."
)
OPEN_ENDED = {"ignore_unknown_options": True, "allow_extra_args": True}


def stopped_early(ctx: click.Context, stop: "StopRequest") -> NoReturn:
    """A signal came while nothing had begun."""
    click.echo("Stopped before the first step; nothing was saved.", err=True)
    ctx.exit(128 + (int(stop.received) if isinstance(stop.received, signal.Signals) else signal.SIGINT))


def dotted_options(ctx: click.Context) -> list[str]:
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


def load_target(target: str, config_path: str) -> "Loaded":
    """The model that a target names (grammar of `--resume`), with a line on standard error for each file that was skipped."""
    from bdh_mlflow.inference import load

    config = Config.from_yaml(config_path)
    loaded = load.load(target, Path(config.training.checkpoint_dir), config.tracking)
    for note in loaded.notes:
        click.echo(f"passed over {note}", err=True)
    return loaded


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; 200 columns wide where that is no terminal."""
    table = Table(*(str(h).replace("[", "\\[") for h in header))
    for row in rows:
        table.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 200
    console.print(table)
