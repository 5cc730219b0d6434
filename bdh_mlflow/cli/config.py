"""The group `bdh-mlflow config`: check a configuration, or print it with every default filled in."""

from pathlib import Path

import click

from bdh_mlflow.cli.common import ACCEPTS_SETTINGS, config_option, dotted_options, set_option
from bdh_mlflow.config import Config, Problem, resolve


@click.group("config")
def config_group() -> None:
    """Check or show a configuration."""


@config_group.command("check", context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.pass_context
def config_check(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """List everything that is wrong with a configuration, or say that this machine can run it."""
    from bdh_mlflow import checkpoint
    from bdh_mlflow.training.problems import problems

    def folder(config: Config) -> list[Problem]:
        reason = checkpoint.why_unwritable(Path(config.training.checkpoint_dir))
        return [Problem("training.checkpoint_dir", reason)] if reason else []

    config = Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)], checks=(problems, folder))
    size = f"{config.parameters / 1e6:.2f} M parameters, {config.tokens_per_step:,} tokens a step, {config.training.max_iters:,} steps"
    click.echo(f"{config_path}: valid. {size}")


@config_group.command("show", context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.pass_context
def config_show(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """Print every setting with its value; `auto` stays where the machine that trains decides."""
    click.echo(resolve(Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)])).config.to_yaml(), nl=False)
