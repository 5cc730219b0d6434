"""What a tracking server far away costs a training: `python benchmarks/remote.py [--uri URL] [--only CASE ...] [--show]`.

Each case is one training, in processes of its own, through a relay that delays every request and counts them: `tiny` (60 steps, 3
checkpoints of 0.5 MB with evaluations and samples), `far` (300 steps of about 30 ms, 3 checkpoints of 12.6 MB with evaluations and samples,
200 ms a request), `plain` (the same without evaluations), `login` (as `far`, 400 ms: a server that hashes a password for each request).
requests: through the relay. first step: from the first request to the end of the first step. exit: from the end of the last step to the end
of the process. Then each run must be there whole: every point once, every checkpoint mirrored and verified, status FINISHED.
--uri: a server to use; else one on SQLite and a folder, which is started here.   --show: print the requests of each case.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.records import Points
from scripts.relay import Relay
from scripts.servers import Server

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """One training.   delay_s: of each request."""

    delay_s: float
    model: dict[str, float]
    training: dict[str, int]


TINY = {"n_layer": 1, "n_embd": 32, "n_head": 2, "mlp_internal_dim_multiplier": 16, "dropout": 0.0}
SMALL = {"n_layer": 2, "n_embd": 128, "n_head": 4, "mlp_internal_dim_multiplier": 21, "dropout": 0.0}  # a checkpoint of 12.6 MB
SHORT = {"max_iters": 60, "log_freq": 5, "test_freq": 20, "checkpoint_freq": 20, "block_size": 32, "batch_size": 2}
LONG = {"max_iters": 300, "log_freq": 1, "test_freq": 100, "checkpoint_freq": 100, "block_size": 128, "batch_size": 4}
CASES = {
    "tiny": Case(0.0, TINY, SHORT),
    "far": Case(0.2, SMALL, LONG),
    "plain": Case(0.2, SMALL, {**LONG, "test_freq": 10**6}),
    "login": Case(0.4, SMALL, LONG),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--uri")
    options.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--show", action="store_true")
    given = options.parse_args()
    wrong = 0
    print(f"{'case':8}{'ms a request':>14}{'requests':>10}{'first step, s':>15}{'exit, s':>9}   checkpoint, MB")
    with tempfile.TemporaryDirectory() as name, serving(given.uri, Path(name)) as (uri, port):
        for case in given.only:
            folder = Path(name) / case
            folder.mkdir()
            relay = Relay(port, delay_s=CASES[case].delay_s)
            ended_at = train(folder, CASES[case], relay.uri)
            wrong += report(case, folder, relay, ended_at, uri)
            if given.show:
                for line, count in Counter(re.sub(r"[0-9a-f]{32}|m-\w+", "*", line) for line in relay.requests).most_common():
                    print(f"    {count:3} {line}")
            relay.close()
    return bool(wrong)


@contextlib.contextmanager
def serving(uri: str | None, folder: Path) -> Iterator[tuple[str, int]]:
    """Address and port of the server."""
    if uri is not None:
        yield uri, int(uri.rstrip("/").rpartition(":")[2])
        return
    empty = folder / "empty.db"
    MlflowClient(f"sqlite:///{empty}").search_experiments()
    server = Server(empty, folder / "server")
    try:
        yield server.uri, server.port
    finally:
        server.signal(signal.SIGKILL)


def train(folder: Path, case: Case, uri: str) -> float:
    """Returns when the process ended, Unix time in s."""
    tree = {
        "model": case.model,
        "training": {**case.training, "test_iters": 2, "checkpoint_dir": str(folder / "checkpoints")},
        "dataset": {"parquet_dir": str(folder / "text"), "source": str(ROOT / "docs"), "val_fraction": 0.2},
        "low_precision": {"compute_dtype": "float32", "use_4bit": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "bdh_mlflow", "train", "--config", str(folder / "config.yaml")]
    with (folder / "log").open("wb") as log:
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    ended_at = time.time()
    assert done.returncode == 0, (folder / "log").read_text()
    return ended_at


def report(name: str, folder: Path, relay: Relay, ended_at: float, uri: str) -> int:
    """Print the case's line.   Returns how many things are wrong."""
    (run_dir,) = checkpoint.list_all(folder / "checkpoints")
    with journal.reading(run_dir) as reader:
        assert reader is not None
        told = [e for e in reader.read(0, reader.index.update()) if isinstance(e.record, Points) and "train/loss" in e.record.values]
        run_id, left = reader.delivered().run_id, reader.index.waiting(reader.delivered())
    assert run_id is not None
    first, last = told[0].at_ms / 1000 - relay.asked_at[0], ended_at - told[-1].at_ms / 1000
    saved = checkpoint.list_run(run_dir).checkpoints
    size = max(c.manifest.bytes for c in saved) / 1e6
    print(f"{name:8}{1000 * relay.delay_s:14.0f}{len(relay.requests):10}{first:15.2f}{last:9.2f}   {size:.1f}", flush=True)
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    there = sorted((m.step, m.value) for m in client.get_metric_history(run_id, "train/loss"))
    journalled = [(e.record.step, e.record.values["train/loss"]) for e in told if isinstance(e.record, Points)]
    faults = {
        f"{left} records left": left,
        "points differ": there != sorted(journalled),
        f"status {run.info.status}": run.info.status != "FINISHED",
        "latest checkpoint": run.data.tags.get("bdh.latest_checkpoint") != saved[-1].manifest.artifact_path,
    }
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "bdh_mlflow", "checkpoints", "verify", run_id]
    verified = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    faults[f"verify: {verified.stdout}{verified.stderr}"] = verified.returncode
    found = [fault for fault, is_so in faults.items() if is_so]
    for fault in found:
        print(f"    WRONG: {fault}")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
