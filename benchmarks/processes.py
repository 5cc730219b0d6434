"""Several processes against one, all over gloo on this machine, one thread each: `python benchmarks/processes.py [--kills 20]`.

1. One, two and four processes train the same run: sha256 of every checkpoint, and all curves, must be equal.
2. Four processes, then one, then two, each resuming what the one before left: equal to the uninterrupted training.
3. torchrun with restarts, random ranks killed (SIGKILL) at random moments: one MLflow run, one value per step, the same last checkpoint.
4. SIGTERM to each rank in turn: all stop within an update with one checkpoint and exit code 143.
5. The tracking server dies in the middle of a training by four processes and comes back: nothing lost, one run.
6. What adding up costs: bytes an update through the loopback interface against 4 bytes a parameter, and the share of a step.

Exit code 1 if anything differs. The seconds of 6 are of two cores that do everything, and say nothing about a network.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import torch
import torch.distributed as dist
from mlflow import MlflowClient

from bdh_mlflow import checkpoint, host
from bdh_mlflow.config import Config
from bdh_mlflow.distributed import Report
from bdh_mlflow.tracking import tracker
from bdh_mlflow.training import processes
from scripts.servers import Server

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
ROUNDS = 20
CURVES = (*tracker.REPLAYED, "val/bpb", "progress/tokens_seen", "progress/epoch", "bdh/active_x_l0", "bdh/dead_x_l0")
SETTINGS = {
    "model.dropout": 0.1,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 4,
    "training.log_freq": 1,
    "training.test_iters": 5,
    "tracking.log_system_metrics": False,
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts", "1000")
JOB_S = 300.0


class Runs:
    """Trainings of the same settings, one after the other in the folder `work`, as paths are part of what a checkpoint holds.

    uri: of the store; None for a database beside the checkpoints. What a training has left is put away under its name.
    """

    def __init__(self, folder: Path, steps: int, uri: str | None = None) -> None:
        self.folder, self.steps, self.uri = folder, steps, uri
        self.work = folder / "work"
        self.failed = 0

    def start(self, size: int, *words: str, torchrun: bool = False, **changes: object) -> "subprocess.Popen[bytes]":
        """A training in a session of its own."""
        self.work.mkdir(exist_ok=True)
        every = {"max_iters": self.steps, "checkpoint_freq": self.steps // 4, "test_freq": self.steps // 4, **changes}
        settings = {**SETTINGS, **{f"training.{key}": value for key, value in every.items()}}
        settings |= {"dataset.parquet_dir": str(self.folder / "text"), "training.checkpoint_dir": str(self.work / "checkpoints")}
        launcher = [*TORCHRUN, "--nproc-per-node", str(size)] if torchrun else []
        command = [sys.executable, *launcher, "-m", "bdh_mlflow", "train", "--config", str(QUICKSTART), *words]
        command += [] if torchrun else ["--processes", str(size)]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": self._uri(self.work)}
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=self.work, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)

    def put_away(self, name: str) -> None:
        self.work.rename(self.folder / name)

    @property
    def log(self) -> Path:
        return self.work / "log"

    def _uri(self, folder: Path) -> str:
        return self.uri or f"sqlite:///{folder}/mlflow.db"

    def train(self, size: int, *words: str, **changes: object) -> float:
        """Train to the end.   Returns the seconds that it took."""
        started = time.perf_counter()
        code = self.start(size, *words, torchrun=False, **changes).wait(JOB_S)
        assert code == 0, self.log.read_text()[-3000:]
        return time.perf_counter() - started

    def curves(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """Points of the one run that a training has left."""
        return {key: self.points(name, key) for key in CURVES}

    def points(self, name: str, key: str) -> list[tuple[int, float]]:
        client = MlflowClient(self._uri(self.folder / name))
        found = client.get_experiment_by_name("bdh")
        assert found is not None
        (run,) = client.search_runs([found.experiment_id])
        return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))

    def digests(self, name: str) -> dict[str, str]:
        return {c.path.name: c.manifest.files[0].sha256 for c in self.checkpoints(name)}

    def checkpoints(self, name: str) -> tuple[checkpoint.Saved, ...]:
        folders = checkpoint.list_all(self.folder / name / "checkpoints")
        return checkpoint.list_run(folders[0]).checkpoints if folders else ()

    def compare(self, what: str, one: object, other: object) -> None:
        equal = one == other
        self.failed += not equal
        print(f"   {what}: {'equal' if equal else 'DIFFERENT'}", flush=True)


def equal_files(runs: Runs) -> None:
    print("1. the same run by 1, 2 and 4 processes")
    for size in (1, 2, 4):
        took_s = runs.train(size)
        runs.put_away(f"of {size}")
        print(f"   {size} processes, {runs.steps} steps, {took_s:.0f} s with start and end")
        for name, digest in runs.digests(f"of {size}").items():
            print(f"      {name}  {digest}")
    for size in (2, 4):
        runs.compare(f"checkpoints of {size} and 1", runs.digests(f"of {size}"), runs.digests("of 1"))
        runs.compare(f"curves of {size} and 1", runs.curves(f"of {size}"), runs.curves("of 1"))


def other_sizes(runs: Runs) -> None:
    print("2. 4 processes, then 1, then 2")
    third = runs.steps // 3
    for number, (size, last) in enumerate(((4, third), (1, 2 * third), (2, runs.steps))):
        decay = {"decay_steps": runs.steps}
        words = [word for key, value in decay.items() for word in ("--set", f"scheduler.{key}={value}")]
        runs.train(size, *words, *(("--resume", "latest") if number else ()), max_iters=last)
    runs.put_away("resized")
    name = f"checkpoint_{runs.steps}.pt"
    runs.compare("last checkpoint (sha256)", runs.digests("resized")[name], runs.digests("of 1")[name])
    runs.compare("train/loss", runs.curves("resized")["train/loss"], runs.curves("of 1")["train/loss"])


def kills(runs: Runs, count: int, size: int, draw: random.Random) -> None:
    print(f"3. torchrun with {size} processes, {count} kills of a random rank")
    job, killed = runs.start(size, torchrun=True), [0] * size
    agent = psutil.Process(job.pid)
    while sum(killed) < count and job.poll() is None:
        wait_for_step(runs.log, job)
        time.sleep(draw.uniform(0.0, 1.0))
        rank = draw.randrange(size)
        for process in ranks(agent, rank):
            process.kill()
            killed[rank] += 1
    code = job.wait(JOB_S)
    runs.put_away("killed")
    print(f"   kills of each rank: {killed}; exit code {code}")
    last = f"checkpoint_{runs.steps}.pt"
    runs.compare("last checkpoint (sha256)", runs.digests("killed").get(last), runs.digests("of 1")[last])
    runs.compare("curves, one value per step, one run", runs.curves("killed"), runs.curves("of 1"))


def wait_for_step(log: Path, job: "subprocess.Popen[bytes]") -> None:
    """Until the processes that run now have logged a point, or the job has ended."""
    seen, until = log.stat().st_size, time.monotonic() + JOB_S
    while job.poll() is None and time.monotonic() < until:
        with log.open("rb") as file:
            file.seek(seen)
            if b"\nstep " in file.read():
                return
        time.sleep(0.02)


def ranks(agent: psutil.Process, rank: int) -> Iterator[psutil.Process]:
    """Processes with this rank below a launcher or rank 0."""
    with contextlib.suppress(psutil.Error):
        for process in agent.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                own = words[words.index(processes.FOLLOWER) + 2] if processes.FOLLOWER in words else process.environ().get("RANK")
                if own == str(rank) and "sender" not in " ".join(words):
                    yield process


def signals(runs: Runs, size: int) -> None:
    print(f"4. SIGTERM to each of {size} ranks")
    for rank in range(size):
        job = runs.start(size, max_iters=100_000, checkpoint_freq=100_000, test_freq=100_000)
        wait_for_step(runs.log, job)
        for process in ranks(psutil.Process(job.pid), rank) if rank else (job,):
            process.terminate()
        code = job.wait(JOB_S)
        runs.put_away(f"signal {rank}")
        runs.compare(f"rank {rank}: exit code and number of checkpoints", (code, len(runs.checkpoints(f"signal {rank}"))), (143, 1))


def outage(runs: Runs, size: int) -> None:
    print(f"5. the tracking server dies in the middle of a training by {size} processes")
    home = runs.folder / "server"
    home.mkdir()
    empty = home / "empty.db"
    MlflowClient(f"sqlite:///{empty}").search_experiments()
    server = Server(empty, home)
    there = Runs(runs.folder, runs.steps, server.uri)
    job = there.start(size)
    wait_for_step(there.log, job)
    server.signal(signal.SIGKILL)
    code = job.wait(JOB_S)
    print(f"   the server is gone; the training ended with exit code {code}")
    server.start()
    (folder,) = checkpoint.list_all(there.work / "checkpoints")
    synced = subprocess.run([sys.executable, "-m", "bdh_mlflow", "sync", str(folder)], check=False, capture_output=True, text=True)
    there.put_away("outage")
    runs.compare("exit codes of training and sync", (code, synced.returncode), (0, 0))
    runs.compare("curves, one run", there.curves("outage"), runs.curves("of 1"))
    server.signal(signal.SIGKILL)


def cost(runs: Runs, size: int) -> None:
    """What an update of the quickstart's and of the default network exchanges, in forked processes of one thread."""
    steps_ms = dict(runs.points(f"of {size}", "perf/step_ms"))
    step_ms = statistics.median(steps_ms.values())
    for name in ("quickstart", "config"):
        config = Config.from_yaml(CONFIGS / f"{name}.yaml")
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(1, size):
                if not (child := os.fork()):
                    measure(Path(folder), rank, size, config)
                    host.leave(0)
                children.append(child)
            exchange_ms, tree_ms, sent = measure(Path(folder), 0, size, config)
            for child in children:
                os.waitpid(child, 0)
            dist.destroy_process_group()
        print(f"   {size} processes, {config.parameters / 1e6:.2f} M parameters: exchange {exchange_ms:.2f} ms, tree {tree_ms:.1f} ms,")
        print(f"      sending {sent / 1e6:.2f} MB a process an update, {sent / 4 / config.parameters:.3f} * 4 bytes a parameter")
        if name == "quickstart":
            print(f"      {100 * (2 * exchange_ms + tree_ms) / step_ms:.0f} % of this training's step of {step_ms:.0f} ms")


def measure(folder: Path, rank: int, size: int, config: Config) -> tuple[float, float, float]:
    """ms of an exchange and of adding up, and the bytes that a process sends for it, by the counter of the loopback interface."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    world = processes.meet(folder, rank, size, JOB_S)
    parameter = torch.nn.Parameter(torch.zeros(config.parameters))
    parameter.grad = torch.ones(config.parameters)
    exchanges, sums, sent = [], [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        world.exchange(Report())
        exchanged = time.perf_counter()
        before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        world.sum_gradients([parameter], torch.zeros(1))
        sums.append(time.perf_counter() - exchanged)
        world.exchange(Report())
        sent.append((psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before) / size)
        exchanges.append(exchanged - started)
    return 1e3 * statistics.median(exchanges), 1e3 * statistics.median(sums), statistics.median(sent)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--steps", type=int, default=240)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="processes-") as home:
        folder = Path(home)
        prepare = [sys.executable, "-m", "bdh_mlflow", "data", "prepare", "python-stdlib", str(folder / "text")]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
        runs = Runs(folder, given.steps)
        equal_files(runs)
        other_sizes(runs)
        kills(runs, given.kills, 4, random.Random(given.seed))
        signals(runs, 4)
        outage(runs, 4)
        print("6. what adding up costs, over the loopback interface")
        for size in (2, 4):
            cost(runs, size)
    print("everything equal" if not runs.failed else f"{runs.failed} differences")
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
