"""The command `bdh-mlflow`: parses words, calls the library, prints messages and sets exit codes.

Only this package prints and exits. Modules that import torch, mlflow or pyarrow are imported inside the commands that need them, so that
`--help` and `config show` answer at once.
"""

import atexit
import errno
import io
import logging
import os
import sys
import warnings
from typing import Any

import click

from bdh_mlflow import __version__, host
from bdh_mlflow.cli import analyze, checkpoints, config, data, join, runs, studies, training
from bdh_mlflow.errors import BdhError, InputError


class _Commands(click.Group):
    """A group that prints an error of this package as one message and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BdhError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.filename is None and error.errno in (
                errno.ENOSPC,
                errno.EIO,
                errno.EBADF,
            ):  # standard output, of which nothing names it
                click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
                ctx.exit(1)
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
                raise
            click.echo(f"Error: {str(error.filename)[:80]}...: {error.strerror}; give another path", err=True)
            ctx.exit(InputError.exit_code)


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="bdh-mlflow")
def cli() -> None:
    """Train BDH language models from a YAML config, track them with MLflow, and resume them bit for bit."""
    _quiet_libraries()
    _guard_processes()


def main() -> None:
    """Entry point of the console script and of `python -m bdh_mlflow`."""
    try:
        cli(prog_name="bdh-mlflow")
    except SystemExit as ending:
        atexit._run_exitfuncs()  # among them the end of worker processes
        host.leave(ending.code if isinstance(ending.code, int) else int(bool(ending.code)))


def _quiet_libraries() -> None:
    """Hide notes of libraries that a user can do nothing about; their warnings and errors stay."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar per file would be drawn over our own output
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `train` prints the address at its end
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics", "mlflow.utils.requirements_utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"mlflow\..*")
    warnings.filterwarnings("ignore", ".*Any type hint is inferred", UserWarning)  # MLflow's, about its own classes in mlflow.pyfunc


def _guard_processes() -> None:
    """What holds for this process and all that it starts.

    None looks for modules in the current folder, where a user may have a random.py. A warning of a library is a line, not the end, also
    where PYTHONWARNINGS=error is set. A character that the output cannot show is printed as its code.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    given = os.environ.get("PYTHONWARNINGS", "").split(",")
    if any(option.strip().startswith("error") for option in given):
        os.environ["PYTHONWARNINGS"] = ",".join(option for option in given if not option.strip().startswith("error"))
        sys.warnoptions[:] = [option for option in sys.warnoptions if not option.startswith("error")]  # for processes started from here
        kept = [each for each in warnings.filters if each[0] != "error"]
        warnings.resetwarnings()  # and with it what was cached
        warnings.filters[:] = kept  # type: ignore[index]
    sys.stdout = sys.stdout or io.StringIO()  # None where it was closed (`>&-`)
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a prompt is bytes, whatever they are


for _command in (
    training.train,
    studies.sweep,
    studies.verify_resume,
    studies.compare,
    runs.evaluate,
    runs.generate,
    analyze.analyze,
    studies.embeddings,
    runs.sync,
    runs.doctor,
    checkpoints.checkpoints,
    data.data,
    config.config_group,
):
    cli.add_command(_command)
for _command in (join.merge, join.grow):
    checkpoints.checkpoints.add_command(_command)
