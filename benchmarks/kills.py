"""One run killed at random moments against an uninterrupted one: `python benchmarks/kills.py [--kills 20] [--steps 300]`.

Each kill is a SIGKILL of the whole process group of `bdh-mlflow train`, at a random moment between its start and the time it needs to
finish; the next process resumes with `latest`. At the end the two runs' metric histories and last checkpoints must be equal: one value
per key and step, the same to the bit. Exit code 1 if not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from bdh_mlflow import checkpoint
from bdh_mlflow.studies import verify
from bdh_mlflow.tracking import tracker

CURVES = (*tracker.REPLAYED, "val/bpb", "progress/tokens_seen", "progress/epoch")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default="configs/quickstart.yaml")
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--checkpoint-freq", type=int, default=15)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/mlflow.db"
        client = MlflowClient(store)
        for name in ("uninterrupted", "killed"):
            client.create_experiment(name, artifact_location=f"file://{folder}/artifacts/{name}")

        def start(name: str) -> subprocess.Popen[bytes]:
            settings = {
                "training.max_iters": given.steps,
                "training.log_freq": 5,
                "training.test_freq": 50,
                "training.checkpoint_freq": given.checkpoint_freq,
                "training.checkpoint_dir": f"{folder}/{name}",
                "tracking.tracking_uri": store,
                "tracking.experiment": name,
            }
            command = [sys.executable, "-m", "bdh_mlflow", "train", "--config", given.config]
            command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
            if name == "killed" and last_step(Path(folder) / name):
                command += ["--resume", "latest"]
            with Path(folder, f"{name}.log").open("ab") as log:
                return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

        started = time.monotonic()
        assert start("uninterrupted").wait() == 0
        duration_s = time.monotonic() - started
        print(f"uninterrupted: {given.steps} steps in {duration_s:.0f} s", flush=True)
        killed = 0
        while killed < given.kills:
            process = start("killed")
            try:
                process.wait(timeout=draw.uniform(4, 4 + 2.5 * duration_s / given.kills))
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                print(f"kill {killed}: newest checkpoint {last_step(Path(folder) / 'killed')}", flush=True)
        assert start("killed").wait() == 0, Path(folder, "killed.log").read_text()[-2000:]
        return report(client, Path(folder), given.steps, killed)


def last_step(folder: Path) -> int:
    directories = checkpoint.list_all(folder)
    newest = checkpoint.list_run(directories[-1]).checkpoints if directories else ()
    return newest[-1].manifest.step if newest else 0


def report(client: MlflowClient, folder: Path, steps: int, killed: int) -> int:
    uninterrupted, killed_run = only_run(client, "uninterrupted"), with_checkpoints(client, "killed")
    different = 0
    for key in CURVES:
        histories = [sorted((m.step, m.value) for m in client.get_metric_history(r.info.run_id, key)) for r in (uninterrupted, killed_run)]
        twice = sum(count - 1 for count in Counter(step for step, _ in histories[1]).values())
        equal = histories[0] == histories[1]
        different += not equal
        print(f"{key}: {len(histories[1])} points, {twice} twice, {'equal' if equal else 'DIFFERENT'}")
    replayed = [m.value for m in client.get_metric_history(killed_run.info.run_id, "resume/replay_max_abs_diff")]
    print(f"replayed steps: {len(replayed)}, largest difference {max(replayed, default=0.0)}")
    states = [checkpoint.load(checkpoint.list_all(folder / name)[-1] / checkpoint.file_name(steps)) for name in ("uninterrupted", "killed")]
    for what, key in verify.PARTS.items():
        difference = verify.bitwise_difference(states[0][key], states[1][key])
        different += bool(difference)
        print(f"{what}: {difference or 'equal'}")
    print(f"{killed} kills; {'everything equal' if not different else f'{different} differences'}; status {killed_run.info.status}")
    return 1 if different or any(replayed) else 0


def only_run(client: MlflowClient, name: str) -> Run:
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def with_checkpoints(client: MlflowClient, name: str) -> Run:
    """The run that was resumed; kills before a first checkpoint leave others behind that nothing could continue."""
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [r for r in runs if "bdh.run_dir" in r.data.tags]
    return run


if __name__ == "__main__":
    sys.exit(main())
