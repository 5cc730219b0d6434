"""The group `bdh-mlflow checkpoints`: list, verify, pull, export and register them."""

import dataclasses
import functools
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from bdh_mlflow.cli.common import config_option, ema_option, print_table, read_config
from bdh_mlflow.errors import CheckpointError, InputError, ResumeError
from bdh_mlflow.files import shown

if TYPE_CHECKING:
    from bdh_mlflow.inference.export import Format
    from bdh_mlflow.tracking.resolved import ResolvedCheckpoint


@click.group()
def checkpoints() -> None:
    """Work with checkpoints on disk and those mirrored to MLflow."""


@checkpoints.command("list")
@click.argument("target", required=False)
@config_option
@click.option("--best", is_flag=True, help="Only the one with the lowest validation loss.")
@click.option("--all-runs", is_flag=True, help="Mirrored checkpoints of every run in the experiment, best first.")
def checkpoints_list(target: str | None, config_path: str, best: bool, all_runs: bool) -> None:
    """List the checkpoints of TARGET.

    TARGET is a run directory, the folder of run directories (by default that of the configuration), or an MLflow run (whose mirrored
    checkpoints are listed).
    """
    target = target or read_config(config_path).training.checkpoint_dir
    if all_runs or not _is_local(target):
        _list_mirrored(None if all_runs else target, config_path, best)
    else:
        _list_local(Path(target), best)


def _is_local(target: str) -> bool:
    """Whether a target is a folder here rather than an MLflow run; also told of a name that is too long for one."""
    return os.path.isabs(target) or os.path.exists(target)  # noqa: PTH110, PTH117


def _list_local(target: Path, best: bool) -> None:
    """Files that are no checkpoints with the reason, then checkpoints; with `best` the best checkpoint alone."""
    from bdh_mlflow import checkpoint
    from bdh_mlflow.checkpoint import Manifest

    rows, found = [], []
    for run_dir in checkpoint.list_all(target) or [target]:
        listing = checkpoint.list_run(run_dir)
        top = checkpoint.best(listing.checkpoints)
        found += [(c, c == top) for c in listing.checkpoints]
        rows += [[str(path), "", "", "", "", reason] for path, reason in listing.rejected if not best]
    if best:
        top = checkpoint.best([c for c, _ in found if isinstance(c.manifest, Manifest)])
        found = [(c, True) for c, _ in found if c == top]
    for c, is_best in found:
        m = c.manifest
        loss, tokens = (m.val_loss, f"{m.tokens_seen:,}") if isinstance(m, Manifest) else (None, "")
        val = " ".join([*([] if loss is None else [f"{loss:.4f}"]), *(["best"] if is_best else [])])
        rows.append([str(c.path), str(m.step), tokens, val, f"{m.bytes / 1e6:.1f} MB", m.mlflow_run_id or ""])
    if not rows:
        raise InputError(f"{shown(target)}: no checkpoints here{' with a validation loss' if best else ''}")
    print_table(["checkpoint", "step", "tokens", "val/loss", "size", "MLflow run"], rows)


def _list_mirrored(target: str | None, config_path: str, best: bool) -> None:
    from bdh_mlflow.tracking import locate

    tracking = read_config(config_path).tracking
    locator = locate.Locator(Path(), tracking)
    found = locator.mirror.search(locator.mirrored(target)[0] if target else None, best)
    rows = [[m.uri, str(m.step), *("" if v is None else f"{v:.4f}" for v in (m.val_loss, m.val_bpb)), m.run_name] for m in found]
    if not rows:
        where = target or f"experiment {tracking.experiment}"
        raise InputError(f"{where}: no mirrored checkpoints{' with a validation loss' if best else ''}")
    print_table(["checkpoint", "step", "val/loss", "val/bpb", "run"], rows)


@checkpoints.command("verify")
@click.argument("target", required=False)
@config_option
@click.pass_context
def checkpoints_verify(ctx: click.Context, target: str | None, config_path: str) -> None:
    """Read every checkpoint of TARGET and compare it with the digest in its manifest.

    TARGET is a folder, or an MLflow run (whose mirrored checkpoints are downloaded one by one). Exit code 1 if any is damaged.
    """
    from bdh_mlflow import checkpoint

    target = target or read_config(config_path).training.checkpoint_dir
    intact, damaged = 0, 0

    def check(name: str, verify: Callable[[], object]) -> None:
        nonlocal intact, damaged
        try:
            verify()
        except (CheckpointError, ResumeError) as error:
            click.echo(f"{name}: {error}")
            damaged += 1
        else:
            click.echo(f"{name}: intact")
            intact += 1

    if _is_local(target):
        for run_dir in checkpoint.list_all(Path(target)) or [Path(target)]:
            listing = checkpoint.list_run(run_dir)
            for path, reason in listing.rejected:
                click.echo(f"{path}: {reason}")
            damaged += len(listing.rejected)
            for c in listing.checkpoints:
                check(str(c.path), functools.partial(checkpoint.verify, c))
    else:
        from bdh_mlflow.tracking import locate

        locator = locate.Locator(Path(), read_config(config_path).tracking)
        run_id, paths = locator.mirrored(target)
        for file in paths:
            with tempfile.TemporaryDirectory(prefix="verify-") as folder:  # one at a time: all of them may not fit on this disk
                check(f"runs:/{run_id}/{file}", functools.partial(locator.mirror.fetch, run_id, file, Path(folder)))
    if not intact and not damaged:
        raise InputError(f"{shown(target)}: no checkpoints here")
    click.echo(f"{intact} intact, {damaged} damaged")
    if damaged:
        ctx.exit(1)


@checkpoints.command("pull")
@click.argument("target")
@config_option
def checkpoints_pull(target: str, config_path: str) -> None:
    """Download the checkpoint that TARGET names (a run id, runs:/..., an artifact URI), verify it and print its path.

    It is stored under the checkpoint directory, in the run directory that it was saved in. What another program has saved with
    bdh_mlflow.track is the file or folder that it gave.
    """
    from bdh_mlflow.checkpoint import Checkpoint, Saved, Snapshot
    from bdh_mlflow.tracking import locate

    config = read_config(config_path)
    found = locate.Locator(Path(config.training.checkpoint_dir), config.tracking, (Checkpoint, Snapshot)).locate(target).found
    match found:
        case Snapshot(content=content):
            click.echo(str(content))
        case Saved(path=path):
            click.echo(str(path))
        case _:
            click.echo(str(found))


@checkpoints.command("export")
@click.argument("target")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["4bit", "safetensors", "huggingface"]),
    required=True,
    help="One file of weights packed in 4 bits or float32, or a folder for Hugging Face transformers.",
)
@click.option("--output", "-o", type=click.Path(), help="File or folder to write; default: beside the checkpoint.")
@ema_option
@config_option
def checkpoints_export(target: str, kind: "Format | Literal['huggingface']", output: str | None, ema: bool, config_path: str) -> None:
    """Write the model of TARGET (given as for --resume) to one safetensors file, or to a folder for Hugging Face transformers.

    `generate` and `evaluate` take such a file in place of a run. Transformers opens the folder with trust_remote_code=True, without this
    package.
    """
    from bdh_mlflow.tracking import locate

    config = read_config(config_path)
    found = locate.Locator(Path(config.training.checkpoint_dir), config.tracking).find(target)
    if kind == "huggingface":
        _export_folder(found, output, ema)
    else:
        _export_file(found, kind, output, ema)


def _export_folder(found: "ResolvedCheckpoint", output: str | None, ema: bool) -> None:
    from bdh_mlflow.inference import huggingface, load

    loaded = load.of_checkpoint(found, ema)
    assert found.checkpoint is not None, "it was loaded"
    if output and "://" in output:
        raise InputError(f"--output {output}: a folder on this machine is written; copy it there afterwards")
    folder = Path(output) if output else found.path.with_suffix(".huggingface")
    manifest = found.checkpoint.manifest
    size = huggingface.write(folder, loaded, dataclasses.replace(manifest, val_loss=None, val_bpb=None) if ema else manifest)
    click.echo(f"{shown(folder)}: {size / 1e6:.2f} MB of step {found.checkpoint.manifest.step}; weights, tokenizer, code and a model card")
    opened = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    click.echo(f'Next: python -c "from transformers import AutoModelForCausalLM; print({opened})"')


def _export_file(found: "ResolvedCheckpoint", kind: "Format", output: str | None, ema: bool) -> None:
    from bdh_mlflow.inference import export

    source = export.Source.of(found, ema)
    assert found.checkpoint is not None, "a source has a configuration"
    path = Path(output) if output else export.default_path(found.checkpoint, kind)
    if path.suffix != export.SUFFIX:
        raise InputError(f"--output {path}: its name must end in {export.SUFFIX}, by which generate and evaluate recognise it")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--output {path}: " + ("a folder, not a file" if path.is_dir() else f"there is no folder {path.parent}"))
    exported = export.write(path, source, kind)
    formats = source.config.low_precision
    weights = "float32"
    if exported.bits is not None:
        nested = "with" if formats.use_double_quant else "without"
        weights = f"{formats.quantization_type} {nested} double-quantised scales, {exported.bits:.3f} bits per quantised weight"
    click.echo(f"{exported.path}: {exported.bytes / 1e6:.2f} MB of step {found.checkpoint.manifest.step}; {weights}")
    if exported.bits is not None and not formats.use_4bit:
        click.echo("This run was not trained for 4-bit weights (low_precision.use_4bit: false): expect a higher loss than its val/loss.")
    file = shlex.quote(str(exported.path))
    click.echo(f"Next: bdh-mlflow evaluate {file} (or generate {file} --prompt 'def ')")


@checkpoints.command("register")
@click.argument("target")
@click.option("--name", required=True, help="Registered model to add a version to.")
@click.option("--alias", help="Alias to move to this version, for example champion.")
@click.option(
    "--format", "kind", type=click.Choice(["4bit", "safetensors"]), help="Weights packed in 4 bits, or float32; default: as trained."
)
@config_option
def checkpoints_register(target: str, name: str, alias: str | None, kind: "Format | None", config_path: str) -> None:
    """Register the model of TARGET (given as for --resume) as a new version of a model that `mlflow models serve` can serve."""
    from bdh_mlflow.inference import registry

    config = read_config(config_path)
    registration = registry.Registration(name, alias, kind)
    version, uri = registry.register(
        target, registration, Path(config.training.checkpoint_dir), config.tracking, lambda text: click.echo(text, err=True)
    )
    click.echo(f"{name}, version {version}: {uri}")
    click.echo(f"Serve: mlflow models serve -m {shlex.quote(uri)} --env-manager local --port 5001")
    click.echo(
        """Ask:   curl -H 'Content-Type: application/json' -d '{"inputs": {"prompt": ["def "]}}' http://127.0.0.1:5001/invocations"""
    )
