"""What several commands share: options, settings given as words, the line to type next, tables, loading a model."""

import dataclasses
import difflib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import click
from rich.table import Table

from bdh_mlflow.cli.output import console_on
from bdh_mlflow.config import Config, DatasetConfig
from bdh_mlflow.config.places import BUILT_IN, bucket_uri, expanded, is_bucket
from bdh_mlflow.errors import InputError
from bdh_mlflow.files import shown
from bdh_mlflow.text import printable

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
processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many processes of this machine train together, a GPU each where there are some. They give the same numbers as one.",
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


class Launch(NamedTuple):
    """How this process was started, so that the lines to type next start another one the same way.

    project: of `mlflow run`, as its user names it; None for `bdh-mlflow`.   env_manager: of `mlflow run`.   nodes, processes: of torchrun,
    on as many machines and on each of them; 0 without it.
    """

    project: str | None
    env_manager: str
    nodes: int = 0
    processes: int = 0

    @classmethod
    def of_this_process(cls) -> "Launch":
        """Under `mlflow run` the current folder is the project, whatever folder its user is in."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return cls(None, "local", *(int(os.environ[name]) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE")))
        if not os.environ.get("MLFLOW_RUN_ID") or not Path("MLproject").is_file():
            return cls(None, "local")
        try:
            same = os.readlink(f"/proc/{os.getppid()}/cwd") == str(Path.cwd())  # noqa: PTH115 - as it is, not followed
        except OSError:  # not on Linux
            same = True
        return cls("." if same else str(Path.cwd()), _env_manager(Path(sys.prefix)))

    def train(self, config_path: str, parameters: Mapping[str, object], experiment: str = DEFAULT_EXPERIMENT) -> str:
        """The shell line that trains with a configuration.   parameters: `resume`, `processes`, settings, and their values."""
        given = {name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()}
        if self.processes:
            given.pop("processes", None)
            ours = Launch(None, "local").train(config_path, given, experiment).removeprefix("bdh-mlflow ")
            return f"torchrun --nnodes {self.nodes} --nproc-per-node {self.processes} ... -m bdh_mlflow {ours}"
        if self.project is None:
            words = ["bdh-mlflow", "train", "--config", config_path]
            for name, value in given.items():
                words += [f"--{name}", value] if "." not in name else ["--set", f"{name}={value}"]
            return shlex.join(words)
        words = ["mlflow", "run", self.project, "--env-manager", self.env_manager, "--experiment-name", experiment]
        for name, value in {"config": config_path, **given}.items():
            words += ["-P", f"{name}={value}"]
        return shlex.join(words)


def _env_manager(prefix: Path) -> str:
    """Which of MLflow's environment managers has made this environment; `local` for one that none has."""
    if not re.fullmatch(r"mlflow-[0-9a-f]{32,}", prefix.name):
        return "local"
    if (prefix / "conda-meta").is_dir():
        return "conda"
    settings = prefix / "pyvenv.cfg"
    return "uv" if settings.is_file() and re.search(r"^uv\s*=", settings.read_text(encoding="utf-8"), re.MULTILINE) else "virtualenv"


def read_config(config_path: str) -> Config:
    """The configuration of a command that only needs to know where things are: without the default file, the defaults, with a line.

    Raises ConfigError for a file that is named and missing.
    """
    if config_path != DEFAULT_CONFIG or Path(config_path).exists():
        return Config.from_yaml(config_path)
    config = Config.from_dict({}, base=Path.cwd())
    click.echo(f"{DEFAULT_CONFIG} is not here: using the defaults, with checkpoints in {shown(config.training.checkpoint_dir)}", err=True)
    return config


def exit_stopped_early(ctx: click.Context, stop: "StopRequest") -> NoReturn:
    """End the command after a signal that came before the first step, with the signal's exit code."""
    click.echo("Stopped before the first step; nothing was saved.", err=True)
    ctx.exit(128 + (int(stop.received) if isinstance(stop.received, signal.Signals) else signal.SIGINT))


ema_option = click.option("--ema", is_flag=True, help="The moving average of the weights that the run kept (training.ema_decay).")


def load_model(target: str, config_path: str, average: bool) -> "Loaded":
    """The model that a target names (same grammar as `--resume`); prints each file that was skipped to standard error."""
    from bdh_mlflow.inference import load

    config = read_config(config_path)
    loaded = load.load(target, Path(config.training.checkpoint_dir), config.tracking, average=average)
    for note in loaded.notes:
        click.echo(note, err=True)
    return loaded


def text_for(loaded: "Loaded", folder: str | None, config_path: str) -> DatasetConfig:
    """The text to evaluate on: a folder that is named, that of the training, or, where that is not here, the configuration's."""
    dataset = loaded.config.dataset
    if folder is not None:
        share = dataset.val_fraction
        if not share:
            share = DatasetConfig().val_fraction
            click.echo(f"its training kept no text for validation: taking {100 * share:g} % of the documents of {folder}", err=True)
        return dataclasses.replace(dataset, parquet_dir=place(folder), val_fraction=share)
    if is_bucket(dataset.parquet_dir) or os.path.exists(dataset.parquet_dir):  # noqa: PTH110 - it was trained on another machine
        return dataset
    here = read_config(config_path).dataset.parquet_dir
    click.echo(
        f"{dataset.parquet_dir}, where it was trained, is not here: evaluating on {shown(here)}; --data DIR names other text", err=True
    )
    return dataclasses.replace(dataset, parquet_dir=here)


def place(text: str) -> str:
    """A path given as a word: what is there as it is written, else with `~` and `${NAME}` expanded, which a shell may not have done.

    Raises InputError for what stands for nothing.
    """
    if not text.strip():
        raise InputError("empty text names no file or folder")
    try:
        if is_bucket(text):
            return bucket_uri(text)
        return text if text in BUILT_IN else expanded(text, Path.cwd())
    except ValueError as error:
        raise InputError(f"{printable(text)}: {error}") from None


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output, PIPED_WIDTH columns wide where that is no terminal."""
    table = Table(*(str(h).replace("[", "\\[") for h in header))
    for row in rows:
        table.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console = console_on(sys.stdout)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)
