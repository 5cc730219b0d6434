"""The front door: words to calls, exceptions to messages and exit codes. The only home of echo and exit.

Heavy rooms are imported inside the commands that need them, so that `--help` and `config` answer at once.
"""

import logging
import os
import warnings
from typing import Any

import click

from bdh_mlflow import __version__
from bdh_mlflow.cli import checkpoints, runs, training
from bdh_mlflow.errors import BdhError


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


for _command in (
    training.train,
    training.sweep,
    training.verify_resume,
    training.data,
    training.config_group,
    runs.evaluate,
    runs.generate,
    runs.compare,
    runs.sync,
    runs.doctor,
    checkpoints.checkpoints,
):
    cli.add_command(_command)
