"""The group `bdh-mlflow checkpoints`."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdh_mlflow.config import Config
from bdh_mlflow.errors import InputError, ResumeError

if TYPE_CHECKING:
    from bdh_mlflow.inference.export import Format
from bdh_mlflow.cli.common import config_option, print_table


@click.group()
def checkpoints() -> None:
    """Checkpoints on disk and in the mirror."""


@checkpoints.command("list")
@click.argument("target", default="checkpoints")
@config_option
@click.option("--best", is_flag=True, help="Only the one of lowest validation loss.")
@click.option("--all-runs", is_flag=True, help="Of every run in the experiment, best first (needs MLflow).")
def checkpoints_list(target: str, config_path: str, best: bool, all_runs: bool) -> None:
    """Checkpoints of TARGET: a run directory, the folder of run directories, or an MLflow run (its mirror)."""
    from bdh_mlflow import checkpoint

    if all_runs or not Path(target).exists():
        _list_mirrored(None if all_runs else target, config_path, best)
        return
    rows = []
    found = []
    for run_dir in checkpoint.list_all(Path(target)) or [Path(target)]:
        listing = checkpoint.list_run(run_dir)
        top = checkpoint.best(listing.checkpoints)
        found += [(c, c == top) for c in listing.checkpoints]
        rows += [[str(path), "", "", "", "", reason] for path, reason in listing.rejected if not best]
    if best:
        top = checkpoint.best(tuple(c for c, _ in found))
        found = [(c, True) for c, _ in found if c == top]
    for c, is_best in found:
        m = c.manifest
        val = "" if m.val_loss is None else f"{m.val_loss:.4f}{' best' if is_best else ''}"
        rows.append([str(c.path), str(m.step), f"{m.tokens_seen:,}", val, f"{m.bytes / 1e6:.1f} MB", m.mlflow_run_id or ""])
    if not rows:
        raise InputError(f"{target}: no checkpoints here{' with a validation loss' if best else ''}")
    print_table(["checkpoint", "step", "tokens", "val/loss", "size", "MLflow run"], rows)


def _list_mirrored(target: str | None, config_path: str, best: bool) -> None:
    from bdh_mlflow.tracking import locate

    tracking = Config.from_yaml(config_path).tracking
    locator = locate.Locator(Path(), tracking)
    found = locator.mirror.search(locator.mirrored(target)[0] if target else None, best)
    rows = [[m.uri, str(m.step), "" if m.val_loss is None else f"{m.val_loss:.4f}", m.run_name] for m in found]
    if not rows:
        raise InputError(
            f"{target or 'experiment ' + tracking.experiment}: no mirrored checkpoints{' with a validation loss' if best else ''}"
        )
    print_table(["checkpoint", "step", "val/loss", "run"], rows)


@checkpoints.command("verify")
@click.argument("target", default="checkpoints")
@config_option
@click.pass_context
def checkpoints_verify(ctx: click.Context, target: str, config_path: str) -> None:
    """Read every checkpoint of TARGET (a folder, or an MLflow run: its mirror) and compare digests; exit code 1 if one is damaged."""
    from bdh_mlflow import checkpoint
    from bdh_mlflow.errors import CheckpointError

    good, bad = 0, 0

    def check(name: str, verify: Callable[[], object]) -> None:
        nonlocal good, bad
        try:
            verify()
        except (CheckpointError, ResumeError) as error:
            click.echo(f"{name}: {error}")
            bad += 1
        else:
            click.echo(f"{name}: whole")
            good += 1

    if Path(target).exists():
        for run_dir in checkpoint.list_all(Path(target)) or [Path(target)]:
            listing = checkpoint.list_run(run_dir)
            for path, reason in listing.rejected:
                click.echo(f"{path}: {reason}")
            bad += len(listing.rejected)
            for c in listing.checkpoints:
                check(str(c.path), functools.partial(checkpoint.verify, c))
    else:
        from bdh_mlflow.tracking import locate

        locator = locate.Locator(Path(), Config.from_yaml(config_path).tracking)
        run_id, paths = locator.mirrored(target)
        for file in paths:
            with tempfile.TemporaryDirectory(prefix="verify-") as folder:  # one at a time: a mirror can be larger than a disk
                check(f"runs:/{run_id}/{file}", functools.partial(locator.mirror.fetch, run_id, file, Path(folder)))
    if not good and not bad:
        raise InputError(f"{target}: no checkpoints here")
    click.echo(f"{good} whole, {bad} not")
    if bad:
        ctx.exit(1)


@checkpoints.command("pull")
@click.argument("target")
@config_option
def checkpoints_pull(target: str, config_path: str) -> None:
    """Bring the checkpoint that TARGET names (a run id, runs:/..., an artifact URI) to this machine."""
    from bdh_mlflow.tracking import locate

    config = Config.from_yaml(config_path)
    found = locate.Locator(Path(config.training.checkpoint_dir), config.tracking).find(target)
    click.echo(str(found.path))


@checkpoints.command("export")
@click.argument("target")
@click.option("--format", "kind", type=click.Choice(["4bit", "safetensors"]), required=True, help="Packed in 4 bits, or plain float32.")
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="File to write; beside the checkpoint if not given.")
@config_option
def checkpoints_export(target: str, kind: "Format", output: str | None, config_path: str) -> None:
    """Write the model of TARGET (as for resume) to one safetensors file, which generate and evaluate take in place of a run."""
    from bdh_mlflow import checkpoint
    from bdh_mlflow.inference import export
    from bdh_mlflow.tracking import locate

    config = Config.from_yaml(config_path)
    found = locate.Locator(Path(config.training.checkpoint_dir), config.tracking).find(target)
    if found.checkpoint is None or found.state.get("format") != checkpoint.FORMAT:
        raise InputError(f"{found.path}: bare weights without a configuration; train from it first (a warm start)")
    path = Path(output) if output else export.default_path(found.checkpoint, kind)
    if path.suffix != export.SUFFIX:
        raise InputError(f"--output {path}: its name must end in {export.SUFFIX}, by which generate and evaluate know it")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")
    done = export.write(path, found.state, found.checkpoint.manifest.val_loss, kind)
    formats = Config.from_dict(found.state["config"]).low_precision
    weights = "float32"
    if done.bits is not None:
        nested = "with" if formats.use_double_quant else "without"
        weights = f"{formats.quantization_type} {nested} double-quantised scales, {done.bits:.3f} bits a quantised weight"
    click.echo(f"{done.path}: {done.bytes / 1e6:.2f} MB of step {found.checkpoint.manifest.step}; {weights}")
    if done.bits is not None and not formats.use_4bit:
        click.echo("This run was not trained for 4-bit weights (low_precision.use_4bit: false): expect a higher loss than its val/loss.")
    click.echo(f"Next: bdh-mlflow evaluate {done.path} (or generate {done.path} --prompt 'def ')")


@checkpoints.command("register")
@click.argument("target")
@click.option("--name", required=True, help="Registered model to make a version of.")
@click.option("--alias", help="Name that points to this version from now on: champion, say.")
@click.option(
    "--format", "kind", type=click.Choice(["4bit", "safetensors"]), help="Packed in 4 bits, or float32; as it was trained if not given."
)
@config_option
def checkpoints_register(target: str, name: str, alias: str | None, kind: "Format | None", config_path: str) -> None:
    """Make the model of TARGET (as for resume) a version of a registered model that `mlflow models serve` serves."""
    from bdh_mlflow.inference import registry

    config = Config.from_yaml(config_path)
    registration = registry.Registration(name, alias, kind)
    version, uri = registry.register(
        target, registration, Path(config.training.checkpoint_dir), config.tracking, lambda text: click.echo(text, err=True)
    )
    click.echo(f"{name}, version {version}: {uri}")
    click.echo(f"Serve: mlflow models serve -m {uri} --env-manager local --port 5001")
    click.echo(
        """Ask:   curl -H 'Content-Type: application/json' -d '{"inputs": {"prompt": ["def "]}}' http://127.0.0.1:5001/invocations"""
    )
