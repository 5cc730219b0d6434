"""The group `bdh-mlflow config`: check a configuration, print it in full, or take one over from the earlier program."""

from pathlib import Path

import click
import yaml

from bdh_mlflow.cli.common import ACCEPTS_SETTINGS, Launch, config_option, dotted_options, set_option
from bdh_mlflow.config import Config, Problem, resolve
from bdh_mlflow.errors import InputError
from bdh_mlflow.files import atomic_write, shown


@click.group("config")
def config_group() -> None:
    """Check, show or migrate a configuration."""


@config_group.command("check", context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.pass_context
def config_check(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """List everything that is wrong with a configuration, or say that this machine can run it."""
    from bdh_mlflow import checkpoint
    from bdh_mlflow.training.corpus import with_vocabulary_size
    from bdh_mlflow.training.problems import problems

    def folder(config: Config) -> list[Problem]:
        reason = checkpoint.why_unwritable(Path(config.training.checkpoint_dir))
        return [Problem("training.checkpoint_dir", reason)] if reason else []

    config = Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)], checks=(problems, folder))
    config = with_vocabulary_size(config)
    size = f"{config.parameters / 1e6:.2f} M parameters, {config.tokens_per_step:,} tokens a step, {config.training.max_iters:,} steps"
    click.echo(f"{config_path}: valid. {size}")


@config_group.command("show", context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.pass_context
def config_show(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """Print every setting with its value; `auto` stays where the machine that trains decides."""
    click.echo(resolve(Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)])).config.to_yaml(), nl=False)


@config_group.command("migrate")
@click.argument("file")
@click.option("--out", "-o", type=click.Path(dir_okay=False), help="File to write; standard output if not given.")
def config_migrate(file: str, out: str | None) -> None:
    """Take over a configuration of the program that this one descends from (config.yaml of the BDH fork with parquet files).

    Every key is mapped, or named with the reason why it is not.
    """
    from bdh_mlflow.config.migrate import migrate
    from bdh_mlflow.config.reading import plain_values, read_yaml

    if out is not None and Path(out).exists():
        raise InputError(f"--out {shown(out)}: there already; give another name or remove it first")
    tree, notes = migrate(plain_values(read_yaml(Path(file))))
    Config.from_dict(tree, origin=f"{file}, migrated")
    text = f"# Taken over from {Path(file).name}.\n{yaml.safe_dump(tree, sort_keys=False)}"
    if out is None:
        click.echo(text, nl=False)
    else:
        atomic_write(Path(out), text.encode())
    for note in notes:
        click.echo(note, err=True)
    if out is not None:
        click.echo(f"Next: {Launch.of_this_process().train(out, {})}")
