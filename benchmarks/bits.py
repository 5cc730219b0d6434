"""Do two commits train to the same bits? Trains a fixed set of configurations at one commit, and compares two such records.

    python benchmarks/bits.py record before.json --checkout ../before   # a clone at the commit before; without --checkout, this one
    python benchmarks/bits.py record after.json
    python benchmarks/bits.py compare before.json after.json            # exit code 1 if one tensor or one logged value differs

Each case is a training run of its own process through the command line, with one thread, so that a record does not depend on the machine's
load. Recorded: sha256 of every tensor and every plain value of the last checkpoint, and all points of all metrics but those that
measure time, memory or the tracker itself.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from mlflow import MlflowClient

QUICKSTART, DEFAULT = "configs/quickstart.yaml", "configs/config.yaml"
OFTEN = {"log_freq": 5, "test_freq": 10, "test_iters": 4, "checkpoint_freq": 10}
MEASURED = ("perf/", "mem/", "ckpt/", "tracker/", "system/")
SETTINGS_KEYS = {"config", "format"}  # of a checkpoint: what a commit may add a setting to, and number its formats by

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart, 300 steps": (QUICKSTART, {"training.max_iters": 300, "training.test_freq": 100, "training.checkpoint_freq": 100}),
    "default network, 2 steps": (DEFAULT, {"training.max_iters": 2, "training.block_size": 64, "training.batch_size": 2}),
    "float16": (QUICKSTART, {"training.max_iters": 30, "low_precision.compute_dtype": "float16"}),
    "8-bit optimizer": (QUICKSTART, {"training.max_iters": 30, "low_precision.optimizer_bits": 8}),
    "4-bit optimizer": (QUICKSTART, {"training.max_iters": 10, "low_precision.use_4bit_optimizer": True}),
    "FP8 emulated": (
        QUICKSTART,
        {"training.max_iters": 20, "low_precision.use_fp8": True, "low_precision.use_4bit": False, "fp8.emulate": True}
        | {"fp8.amax_history_len": 8, "training.gradient_accumulation_steps": 2},
    ),
    "plateau": (QUICKSTART, {"training.max_iters": 60, "scheduler.type": "plateau", "scheduler.patience": 0}),
    "accumulation 3, dropout": (
        QUICKSTART,
        {"training.max_iters": 20, "training.gradient_accumulation_steps": 3, "model.dropout": 0.1},
    ),
    "two loader workers": (QUICKSTART, {"training.max_iters": 30, "dataloader.num_workers": 2}),
    "reference form, dropout": (
        QUICKSTART,
        {"training.max_iters": 20, "training.layer_form": "reference", "model.dropout": 0.1, "low_precision.compute_dtype": "float32"},
    ),
}


@click.group()
def cli() -> None:
    """Record what a commit trains to, or compare two records."""


@cli.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--checkout", default=".", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Clone to run.")
@click.option("--case", "chosen", multiple=True, type=click.Choice(list(CASES)), help="Only this one; can be repeated.")
def record(out: Path, checkout: Path, chosen: tuple[str, ...]) -> None:
    """Train every case with the code of --checkout and write what came of it to OUT."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="bits-") as home:
        run(checkout, Path(home), "data", "prepare", "python-stdlib", f"{home}/text")
        for number, name in enumerate(chosen or CASES):
            folder = Path(home) / str(number)
            folder.mkdir()
            started = time.perf_counter()
            found[name] = trained(checkout, folder, f"{home}/text", *CASES[name])
            tensors, points = len(found[name]["state"]), len(found[name]["points"])
            click.echo(f"{name}: {tensors} values in the last checkpoint, {points} points, {time.perf_counter() - started:.0f} s")
    out.write_text(json.dumps(found, indent=1))


@cli.command()
@click.argument("before", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(before: Path, after: Path) -> None:
    """Name every value that BEFORE and AFTER disagree on."""
    one, other = (json.loads(path.read_text()) for path in (before, after))
    differences = 0
    for name in dict.fromkeys((*one, *other)):
        if name not in one or name not in other:
            click.echo(f"{name}: only in {before if name in one else after}")
            differences += 1
            continue
        for part in ("state", "points"):
            a, b = one[name][part], other[name][part]
            differ = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
            differences += len(differ)
            equal = len(a.keys() | b.keys()) - len(differ)
            click.echo(f"{name}: {part}: {equal} equal, {len(differ)} different")
            for key in differ[:10]:
                click.echo(f"    {key}: {a.get(key, 'missing')} and {b.get(key, 'missing')}")
    click.echo("equal" if not differences else f"{differences} differences")
    sys.exit(bool(differences))


def trained(checkout: Path, folder: Path, text: str, config: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One case in a folder of its own, read back."""
    often = {f"training.{key}": value for key, value in OFTEN.items()}
    own = {
        "training.checkpoint_dir": str(folder / "checkpoints"),
        "dataset.parquet_dir": text,
        "dataset.source": None,
        "tracking.tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "tracking.log_system_metrics": False,
        "tracking.mirror_checkpoints": False,
    }
    words = [word for key, value in {**often, **settings, **own}.items() for word in ("--set", f"{key}={json.dumps(value).strip(chr(34))}")]
    run(checkout, folder, "train", "--config", str(checkout.absolute() / config), *words)
    steps = int(settings["training.max_iters"])
    (file,) = (folder / "checkpoints").glob(f"run_*/checkpoint_{steps}.pt")
    state = torch.load(file, weights_only=True)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("bdh")
    assert experiment is not None
    (mlflow_run,) = client.search_runs([experiment.experiment_id])
    points = {
        f"{key} at {point.step}": repr(point.value)
        for key in mlflow_run.data.metrics
        if not key.startswith(MEASURED)
        for point in client.get_metric_history(mlflow_run.info.run_id, key)
    }
    return {"state": dict(leaves({k: v for k, v in state.items() if k not in SETTINGS_KEYS})), "points": points}


def run(checkout: Path, cwd: Path, *words: str) -> None:
    """A command of that checkout's package."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.absolute()), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, "-m", "bdh_mlflow", *words], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every tensor as the digest of its dtype, shape and bytes, every plain value as its text."""
    if isinstance(tree, torch.Tensor):
        whole = tree.contiguous().view(-1).view(torch.uint8).numpy() if tree.numel() else b""
        yield path, f"{tree.dtype} {tuple(tree.shape)} {hashlib.sha256(bytes(whole)).hexdigest()[:16]}"
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}/{number}")
    else:
        yield path, repr(tree)


if __name__ == "__main__":
    cli()
