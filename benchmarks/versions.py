"""Which MLflow servers and clients work together: `python benchmarks/versions.py [--venvs FOLDER] [--servers 3.15.2 ...]`.

For each server version a virtual environment is made under FOLDER, once; 3.18.0, whose parts are not all in the registry, is put over the
installed version (`pip install --no-deps --target`), for the server and, in its last rows, for the client. Each row is a training of 60
steps with 3 checkpoints against a fresh server (SQLite, artifacts through the server), which must end FINISHED with every point once and
all checkpoints verified; then the folder is removed and the training resumed from the artifact path of its second checkpoint. Exit code 1
if a row fails. The table in docs/tracking.md is this one.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlflow
import yaml
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from scripts.servers import Server

ROOT = Path(__file__).parent.parent
SERVERS = ("3.15.2", "3.16.1", "3.17.2", "3.18.0")
INCOMPLETE = "3.18.0"  # the registry has mlflow of this version, but neither mlflow-skinny nor mlflow-tracing
CONFIG = {
    "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "mlp_internal_dim_multiplier": 16},
    "training": {
        "block_size": 32,
        "batch_size": 2,
        "max_iters": 60,
        "log_freq": 5,
        "test_freq": 20,
        "test_iters": 2,
        "checkpoint_freq": 20,
    },
    "dataset": {"parquet_dir": "text", "source": str(ROOT / "docs"), "val_fraction": 0.2},
    "low_precision": {"compute_dtype": "float32", "use_4bit": False},
}


@dataclass(frozen=True)
class Version:
    """An MLflow.   python: interpreter that has it.   search: folder to look for modules in first."""

    name: str
    python: str = sys.executable
    search: Path | None = None


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--venvs", type=Path, default=ROOT / ".venv" / "versions")
    options.add_argument("--servers", nargs="+", default=SERVERS)
    given = options.parse_args()
    own = Version(mlflow.__version__)
    servers = [installed(name, given.venvs) for name in given.servers]
    rows = [(own, server) for server in servers]
    rows += [(installed(INCOMPLETE, given.venvs), server) for server in servers if server.name in (own.name, INCOMPLETE)]
    print("| client | server | training | resumed from the artifact path |\n| --- | --- | --- | --- |", flush=True)
    wrong = 0
    for client, server in rows:
        with tempfile.TemporaryDirectory() as name:
            results = tried(Path(name), client, server)
        wrong += any(not result.startswith("ok") for result in results)
        print(f"| {client.name} | {server.name} | {' | '.join(results)} |", flush=True)
    return bool(wrong)


def installed(name: str, folder: Path) -> Version:
    if name == mlflow.__version__:
        return Version(name)
    place = folder / name
    if name == INCOMPLETE:
        if not place.exists():
            run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), f"mlflow=={name}"])
        return Version(name, search=place)
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        run([sys.executable, "-m", "venv", str(place)])
        run([str(python), "-m", "pip", "install", "-q", f"mlflow=={name}"])
        (place / "complete").touch()
    return Version(name, str(python))


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def tried(folder: Path, client: Version, version: Version) -> list[str]:
    """What became of the training and of its resumption: `ok` and a time, or the reason."""
    server = Server(None, folder / "server", version.python, version.search)
    try:
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
        if client.search is not None:
            environment["PYTHONPATH"] = str(client.search)
        started = time.monotonic()
        problem = bdh(folder, environment, "train", "--config", "config.yaml") or whole(server.client, folder, environment)
        first = problem or f"ok, {time.monotonic() - started:.0f} s"
        if problem:
            return [first, "not tried"]
        (run_dir,) = checkpoint.list_all(folder / "checkpoints")
        run_id = checkpoint.list_run(run_dir).checkpoints[-1].manifest.mlflow_run_id
        shutil.rmtree(folder / "checkpoints")
        target = f"runs:/{run_id}/checkpoints/{run_dir.name}/checkpoint_40.pt"
        started = time.monotonic()
        problem = bdh(folder, environment, "train", "--config", "config.yaml", "--resume", target) or whole(
            server.client, folder, environment
        )
        return [first, problem or f"ok, {time.monotonic() - started:.0f} s"]
    finally:
        server.signal(signal.SIGKILL)


def bdh(folder: Path, environment: dict[str, str], *words: str) -> str:
    """Run a command.   Returns its last line if it fails, else nothing."""
    command = [sys.executable, "-m", "bdh_mlflow", *words]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    return done.stdout.strip().splitlines()[-1] if done.returncode else ""


def whole(client: MlflowClient, folder: Path, environment: dict[str, str]) -> str:
    """What is missing of a training at the server; nothing if it is whole."""
    experiment = client.get_experiment_by_name("bdh")
    if experiment is None:
        return "no experiment"
    runs = client.search_runs([experiment.experiment_id])
    if len(runs) != 1 or runs[0].info.status != "FINISHED":
        return f"{len(runs)} runs, {', '.join(run.info.status for run in runs)}"
    steps = sorted(m.step for m in client.get_metric_history(runs[0].info.run_id, "train/loss"))
    if steps != list(range(5, 61, 5)):
        return f"points of steps {steps}"
    models = client.search_logged_models([experiment.experiment_id])
    if sorted(model.name for model in models) != ["bdh-step-20", "bdh-step-40", "bdh-step-60"]:
        return f"models {', '.join(str(model.name) for model in models)}"
    return bdh(folder, environment, "checkpoints", "verify", runs[0].info.run_id)


if __name__ == "__main__":
    sys.exit(main())
