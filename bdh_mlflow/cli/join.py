"""Commands of `bdh-mlflow checkpoints` that begin a run with weights made of others: merge and grow."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdh_mlflow.cli.common import Launch, config_option, read_config, set_option
from bdh_mlflow.config import Config
from bdh_mlflow.files import shown

if TYPE_CHECKING:
    from bdh_mlflow.training.join import Begun
    from bdh_mlflow.training.start import Outcome

OUT = "Folder in which the new run's directory is made; default: training.checkpoint_dir."


@click.command()
@click.argument("forks", nargs=-1, required=True, metavar="FORK FORK ...")
@config_option
@set_option
@click.option("--out", metavar="DIR", help=OUT)
@click.option("--strangers", is_flag=True, help="Also models that are no forks of one model, as far as their weights tell.")
def merge(forks: tuple[str, ...], config_path: str, overrides: tuple[str, ...], out: str | None, strangers: bool) -> None:
    """Lay the neurons of several FORKs of one model side by side, as the first checkpoint of a run of its own.

    Each FORK is given as for --resume. Embedding and output weights are averaged; settings are those of the first fork, with --set on top.
    The run is evaluated on the first fork's text; `bdh-mlflow evaluate BASE FORK FORK MERGED --data A --data B` compares all.
    """
    from bdh_mlflow.tracking import locate
    from bdh_mlflow.training import join

    here = read_config(config_path)
    locator = locate.Locator(Path(here.training.checkpoint_dir), here.tracking)
    begun = join.merged([locator.find(fork) for fork in forks], here, strangers=strangers)
    click.echo(f"forks are alike by {begun.likeness:.2f} (cosine of their weights; 1: the same, 0: strangers)")
    outcome = _begin(begun, out, overrides)
    click.echo(f"Compare: bdh-mlflow evaluate {' '.join(map(shlex.quote, forks))} {shlex.quote(_place(outcome))} --data DIR --data DIR")


@click.command()
@click.argument("target")
@click.option("--multiplier", required=True, type=click.IntRange(1), help="The new model.mlp_internal_dim_multiplier.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of what makes copies of a neuron unlike."
)
@config_option
@set_option
@click.option("--out", metavar="DIR", help=OUT)
def grow(target: str, multiplier: int, seed: int, config_path: str, overrides: tuple[str, ...], out: str | None) -> None:
    """Give the model of TARGET (given as for --resume) more neurons, as the first checkpoint of a run of its own.

    Each neuron is copied such that the model computes what it did; training makes the copies differ.
    """
    from bdh_mlflow.tracking import locate
    from bdh_mlflow.training import join

    here = read_config(config_path)
    found = locate.Locator(Path(here.training.checkpoint_dir), here.tracking).find(target)
    _begin(join.grown(found, here, multiplier, seed), out, overrides)


def _begin(begun: "Begun", out: str | None, overrides: tuple[str, ...]) -> "Outcome":
    """Begin the run, and say where it is and how it goes on."""
    from bdh_mlflow.cli import console
    from bdh_mlflow.tracking.sender_process import SubprocessSender
    from bdh_mlflow.training import join, start
    from bdh_mlflow.training.problems import problems
    from bdh_mlflow.training.stop import StopRequest

    folder = [f"training.checkpoint_dir={out}"] if out is not None else []
    config = Config.from_dict(begun.config.to_dict(), [*folder, *overrides], (problems,), origin="the new run", base=Path.cwd())
    join.check_kept(begun, config)
    maker = click.get_current_context().obj or SubprocessSender
    with console.watching(sys.stdout, config.training.max_iters) as progress:
        outcome = start.save_start(config, begun.made, progress, StopRequest(), maker)
    val = f", val/loss {measured.loss:.4f}, val/bpb {measured.bits_per_byte:.4f}" if (measured := outcome.ending.evaluation) else ""
    click.echo(f"{begun.made.how.capitalize()}: {config.parameters / 1e6:.2f} M parameters at step 0{val}")
    click.echo(f"Checkpoint: {_place(outcome)}")
    saved = shown(Path(_place(outcome)) / "config.yaml")
    click.echo(f"Train on: {Launch.of_this_process().train(saved, {'resume': _place(outcome)}, outcome.experiment)}")
    if outcome.undelivered and outcome.journal:
        click.echo(f"Deliver:  bdh-mlflow sync {shlex.quote(shown(outcome.journal))}")
    return outcome


def _place(outcome: "Outcome") -> str:
    assert outcome.run_dir is not None, "a checkpoint was saved"
    return shown(outcome.run_dir)
