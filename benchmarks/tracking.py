"""What tracking costs and loses: `python benchmarks/tracking.py [--rounds 15] [--window 500] [--targets sqlite server ...]`.

A toy step of 5-10 ms (one thread of matmuls) with six metrics at each, in one process that tells the tracker and does not by turns: rounds
of three neighbouring windows (silent, told, silent), whose first part is left out of the figures, so that what the sender does falls into
the window that caused it.
Targets: `sqlite` (the store as a file), `server` (`mlflow server` on loopback), `slow` (the same behind 200 ms), `stopped` and `killed`
(SIGSTOP or SIGKILL of the server in the middle; it goes on, or is started again, after the training has ended, and `sync` delivers).
`floor` and `floor-server` tell nobody: beside the told windows a process that shares nothing with the loop hands MLflow as many points, in
one request a second. What that costs the loop, the machine costs: the two share caches, memory and what the host gives them.

overhead: of each round, the median told step less the mean of the medians of its two silent neighbours, which takes out what the machine
gains or loses over the round; the median over the rounds with its standard error. p99: in the same way the ratio of the 99th percentiles.
all steps: 99th percentile of all told over that of all silent steps. silent apart: how far the medians of the two silent windows of a round
lie from each other (median), which nothing told has caused. Every third told window hands a 300 MB checkpoint over and runs beside its
writing. call: median of the tracker's. blocks/copy: how long a checkpoint holds the loop, against copying the same bytes in this process at
that moment (median). exit: from the last step to the process being free. Run alone: the machine has to be quiet.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import signal

import torch
from mlflow import MlflowClient
from mlflow.entities import Metric

from bdh_mlflow import delivery
from bdh_mlflow.checkpoint import BackgroundWriter, Provenance, Rest, RunDirectory
from bdh_mlflow.tracking import REPLAYED, Tracker
from tests.servers import Server

METRICS = ("train/loss", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "perf/step_ms", "progress/tokens_seen")
CHECKPOINT_BYTES = 300_000_000
CHECKPOINT_EVERY = 3  # rounds, so 1500 steps
TARGETS = ("floor", "sqlite", "floor-server", "server", "slow", "stopped", "killed")
SETTLE_S = 1.2  # a window begins with what the one before it has caused
Work = tuple[torch.Tensor, torch.Tensor]


class Figures(NamedTuple):
    """Of one training.   rounds: steps of a silent window, a told one and a silent one, in seconds."""

    rounds: list[tuple[list[float], list[float], list[float]]]
    call_s: list[float]
    blocked: list[float]
    exit_s: float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15, help="at least 2")
    options.add_argument("--window", type=int, default=500, help="steps in a window")
    options.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    given = options.parse_args()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    steps = given.rounds * given.window
    checkpoints = f"{-(-given.rounds // CHECKPOINT_EVERY)} checkpoints of {CHECKPOINT_BYTES / 1e6:.0f} MB"
    print(f"{steps} told steps of {len(METRICS)} metrics in {given.rounds} rounds; {checkpoints}")
    heads = ("step ms", 8), ("overhead ms", 17), ("p99/p99", 14), ("all steps", 9), ("silent apart", 12)
    heads += ("call us", 8), ("blocks/copy", 12), ("exit s", 7)
    print(f"{'target':12} {' '.join(f'{head:>{width}}' for head, width in heads)} {'points':>14}")
    for target in given.targets:
        with tempfile.TemporaryDirectory() as folder, served(target, Path(folder)) as (uri, server):
            if target.startswith("floor"):
                figures, found = untold(given.rounds, given.window, uri), "-"
            else:
                figures, found = tracked(given.rounds, given.window, Path(folder), uri, target, server)
            report(target, figures, found)


def report(target: str, figures: Figures, found: str) -> None:
    median = statistics.median
    over_ms, tails, apart_ms = list[float](), list[float](), list[float]()
    for before, told, after in figures.rounds:
        over_ms.append(1e3 * (median(told) - (median(before) + median(after)) / 2))
        tails.append(2 * quantile(told, 0.99) / (quantile(before, 0.99) + quantile(after, 0.99)))
        apart_ms.append(1e3 * abs(median(after) - median(before)))
    silent = [s for before, _, after in figures.rounds for s in (*before, *after)]
    whole = quantile([s for _, told, _ in figures.rounds for s in told], 0.99) / quantile(silent, 0.99)
    print(
        f"{target:12} {1e3 * median(silent):8.2f} {median(over_ms):+8.3f} +- {error(over_ms):5.3f} "
        f"{median(tails):6.2f} +- {error(tails):4.2f} {whole:9.2f} {median(apart_ms):12.3f} {1e6 * median(figures.call_s):8.0f} "
        f"{median(figures.blocked or [float('nan')]):12.2f} {figures.exit_s:7.1f} {found:>14}",
        flush=True,
    )


def error(values: list[float]) -> float:
    """Standard error of their median, as for normally distributed ones."""
    return 1.2533 * statistics.stdev(values) / len(values) ** 0.5


def tracked(rounds: int, window: int, folder: Path, uri: str, target: str, server: Server | None) -> tuple[Figures, str]:
    directory = RunDirectory.new(folder / "checkpoints", "", datetime.now())
    segment = {"number": 1, "training": "t" * 32, "continues": None, "wrapper": None, "experiment": "bdh", "run_name": None, "user": "me"}
    segment |= {"tracking_uri": uri, "mirror": True, "keep": None, "audit": list(REPLAYED), "host": "h", "pid": 0, "device": "cpu"}
    segment |= {"versions": {}, "started_at_ms": int(1e3 * time.time()), "first_step": 0}
    notes: list[str] = []
    tracker = Tracker(lambda: directory.folder, uri, segment, notes.append)
    identity = tracker.wait(60)
    assert identity is not None, notes
    provenance = Provenance(identity.run_id, 1, None, False, "", "", {})

    def write(contents: dict[str, Any], val_loss: float | None, rest: Rest) -> None:
        directory.make()
        tracker.sync()
        tracker.checkpoint(directory.save(contents, provenance, val_loss, rest).path, contents["step"])

    figures = train(rounds, window, tracker, BackgroundWriter(write), target, server)
    directory.close()
    if server is not None and target in ("stopped", "killed"):
        if target == "stopped":
            server.signal(signal.SIGCONT)
        else:
            server.start()
        done = delivery.sync(directory.path, uri, lambda said: None)
        assert done.left == 0, done
    client = MlflowClient(server.uri if server else uri)
    there = Counter((key, m.step) for key in METRICS for m in client.get_metric_history(identity.run_id, key))
    assert set(there) <= {(key, step) for key in METRICS for step in range(rounds * window)}
    once, all_of_them = sum(times == 1 for times in there.values()), len(METRICS) * rounds * window
    return figures, f"{once}/{all_of_them}" + (f" +{sum(there.values()) - once} again" if sum(there.values()) != once else "")


class Nobody:
    """Told, and tells nobody."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def close(self, status: str, tags: Mapping[str, str], step: int | None) -> int:
        return 0


def untold(rounds: int, window: int, uri: str) -> Figures:
    """The loop beside a process that sends as many points as a told window has."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    beside = context.Process(target=send, args=(uri, ready), daemon=True)
    beside.start()
    assert ready.wait(60)
    assert beside.pid is not None
    try:
        return train(
            rounds, window, Nobody(), None, "floor", None, lambda told: os.kill(beside.pid, signal.SIGCONT if told else signal.SIGSTOP)
        )
    finally:
        beside.kill()


def send(uri: str, ready: Any) -> None:
    os.nice(5)  # as the sender does
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("floor")).info.run_id
    for second in range(1_000_000):
        began = time.perf_counter()
        now_ms = int(1e3 * time.time())
        client.log_batch(run_id, [Metric(key, 1.0, now_ms, 100 * second + i) for i in range(100) for key in METRICS])
        ready.set()
        time.sleep(max(0.0, 1 - (time.perf_counter() - began)))


def train(
    rounds: int,
    window: int,
    tracker: Tracker | Nobody,
    writer: BackgroundWriter | None,
    target: str,
    server: Server | None,
    begins: Callable[[bool], None] = lambda told: None,
) -> Figures:
    """The loop. The time for which the checkpoint blocks it is a figure of its own, the steps beside its writing are in the windows.

    begins: called with whether a window is told, before it.
    """
    work, state = toy(), {"step": 1, "tokens_seen": 0, "loss": 1.0, "model_state_dict": weights()}
    windows: list[list[float]] = []
    call_s, blocked, step = list[float](), list[float](), 0
    for number in range(3 * rounds):
        told, times, began = number % 3 == 1, list[float](), time.perf_counter()
        begins(told)
        for _ in range(window):
            started = time.perf_counter()
            loss = compute(work)
            if told:
                before = time.perf_counter()
                tracker.metrics(dict.fromkeys(METRICS, loss + step), step)
                call_s.append(time.perf_counter() - before)
                step += 1
            if writer is not None and told and number // 3 % CHECKPOINT_EVERY == 0 and step % window == window // 3:
                pause = time.perf_counter()
                copy_s = copying(state)
                state["step"] = step
                before = time.perf_counter()
                writer.save(state, None)
                blocked.append((time.perf_counter() - before) / copy_s)
                started += before - pause
            ended = time.perf_counter()
            if ended - began > SETTLE_S:
                times.append(ended - started)
        windows.append(times)
        if server is not None and number == 3 * (rounds // 2) - 1 and target in ("stopped", "killed"):
            server.signal(signal.SIGSTOP if target == "stopped" else signal.SIGKILL)
    if writer is not None:
        writer.finish()
    before = time.perf_counter()
    tracker.close("FINISHED", {}, step)
    exit_s = time.perf_counter() - before
    return Figures(list(zip(windows[::3], windows[1::3], windows[2::3], strict=True)), call_s, blocked, exit_s)


@contextlib.contextmanager
def served(target: str, folder: Path) -> Iterator[tuple[str, Server | None]]:
    store = folder / "empty.db"
    client = MlflowClient(f"sqlite:///{store}")
    if target in ("sqlite", "floor"):
        client.create_experiment("bdh", artifact_location=f"file://{folder}/artifacts")
        yield f"sqlite:///{store}", None
        return
    client.search_experiments()
    server = Server(store, folder / "server")
    command = [sys.executable, str(Path(__file__).parent / "relay.py"), str(server.port), "0.2"]
    relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    port = int(relay.stdout.readline())
    try:
        yield (f"http://127.0.0.1:{port}" if target == "slow" else server.uri), server
    finally:
        relay.kill()
        with contextlib.suppress(ProcessLookupError):
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGKILL)


def toy() -> Work:
    return torch.randn(360, 512), torch.randn(512, 512)


def compute(work: Work) -> float:
    a, b = work
    for _ in range(6):
        a = torch.tanh(a @ b * 0.04)
    return float(a[0, 0])


def weights() -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.randn(CHECKPOINT_BYTES // 4 // 12) for i in range(12)}


def copying(state: dict[str, Any]) -> float:
    """Copying the same bytes in memory: median of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        copy = [t.clone() for t in state["model_state_dict"].values()]
        times.append(time.perf_counter() - started)
        del copy
    return statistics.median(times)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


if __name__ == "__main__":
    main()
