"""The group `bdh-mlflow config`: check a configuration, or print it with every default filled in."""

from pathlib import Path

import click

from bdh_mlflow.cli.common import ACCEPTS_SETTINGS, config_option, dotted_options, set_option
from bdh_mlflow.config import BDHConfig, Config, Problem


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
    from bdh_mlflow.training import build

    def folder(config: Config) -> list[Problem]:
        reason = checkpoint.why_unwritable(Path(config.training.checkpoint_dir))
        return [Problem("training.checkpoint_dir", reason)] if reason else []

    config = Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)], checks=(build.problems, folder))
    tokens = config.training.batch_size * config.training.block_size * config.training.gradient_accumulation_steps
    parameters = _parameters(config.to_bdh_config())
    click.echo(f"{config_path}: valid. {parameters / 1e6:.2f} M parameters, {tokens:,} tokens a step, {config.training.max_iters:,} steps")


@config_group.command("show", context_settings=ACCEPTS_SETTINGS)
@config_option
@set_option
@click.pass_context
def config_show(ctx: click.Context, config_path: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration: every setting with its value."""
    click.echo(Config.from_yaml(config_path, [*overrides, *dotted_options(ctx)]).resolved().to_yaml(), nl=False)


def _parameters(shape: BDHConfig) -> int:
    wide = shape.mlp_internal_dim_multiplier * shape.n_embd
    return 3 * wide * shape.n_embd + 2 * shape.vocab_size * shape.n_embd
