"""What tracking costs training and whether it loses points: `python benchmarks/tracking.py [--steps 7000] [--targets sqlite server ...]`.

A toy training step of 5-10 ms (matmuls on one thread), in blocks of a hundred steps, about a second: blocks in which each step logs six
metrics alternate with blocks in which none does. In a block without tracking the processes of tracking (sender, server) are stopped, so
that all of their work falls into the blocks that caused it; a machine whose speed varies is slower in both kinds of block.
Targets: `sqlite` (the store is a file), `server` (`mlflow server` on 127.0.0.1), `slow` (the same behind 200 ms of delay), `stopped` and
`killed` (SIGSTOP or SIGKILL of the server in the middle; it continues, or is started again, when the training has ended, and `sync`
delivers). `nothing` logs to a null tracker: the resolution of the measurement. `floor` does, too, but beside it another process writes as
many points into an MLflow database, in one request a second: what no tracker on this machine could avoid.

overhead: mean step time of a tracked block less the mean of its two neighbours without tracking; the median over the blocks with its
standard error. p99/p99: 99th percentile of all tracked steps over that of all others, checkpoints included; its error is that of ten parts.
Both leave out the steps in which a hypervisor gave the processors to somebody else (its steal time advanced); stolen: the share of those,
tracked/untracked, and both figures with them. Every 1500 tracked steps save a checkpoint of 300 MB (not in `nothing` and `floor`); until it
is written, all steps are tracked. call: median time of the call of the tracker. blocks/copy: how long a checkpoint blocks the loop, against
copying the same bytes in memory at that moment (median). exit: from the last step until the tracker is closed. Needs a quiet machine.

Relay and server are on the machine of the training, so an upload is throttled in every target as it is there (see `tracking.mirror`).
"""

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import signal

import psutil
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric

from bdh_mlflow.checkpoint import BackgroundWriter, Provenance, RunDirectory, Throttle
from bdh_mlflow.text import Evaluation
from bdh_mlflow.tracking import sync
from bdh_mlflow.tracking.records import Segment
from bdh_mlflow.tracking.sender_process import SubprocessSender
from bdh_mlflow.tracking.tracker import REPLAYED, NullTracker, Tracker
from scripts.servers import Server

METRICS = ("train/loss", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "perf/step_ms", "progress/tokens_seen")
CHECKPOINT_BYTES = 300_000_000
CHECKPOINT_EVERY = 1500  # tracked steps
TARGETS = ("nothing", "floor", "sqlite", "server", "slow", "stopped", "killed")
BLOCK = 100  # steps
PARTS = 10
Work = tuple[torch.Tensor, torch.Tensor]
Step = tuple[float, bool]  # seconds, and whether some of them were stolen
Blocks = list[list[Step]]


class Figures(NamedTuple):
    """Of one training run, in seconds.   tracked: steps of each tracked block.   untracked: of those before each and after the last."""

    tracked: Blocks
    untracked: Blocks
    call_s: list[float]
    blocked: list[float]
    exit_s: float
    steps: int


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=7000, help="tracked steps, at least 2000")
    options.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    given = options.parse_args()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    torch.set_num_threads(1)
    print(
        f"{given.steps} tracked steps of {len(METRICS)} metrics, a checkpoint of {CHECKPOINT_BYTES / 1e6:.0f} MB every {CHECKPOINT_EVERY}"
    )
    heads = [("step ms", 8), ("overhead ms", 17), ("p99/p99", 14), ("stolen: steps, overhead, p99", 28)]
    heads += [("call us", 8), ("blocks/copy", 12), ("exit s", 7)]
    print(f"{'target':8} {' '.join(f'{head:>{width}}' for head, width in heads)} {'points':>14}")
    for target in given.targets:
        with tempfile.TemporaryDirectory() as folder:
            if target in ("nothing", "floor"):
                figures, found = without_tracking(given.steps, Path(folder), target), "-"
            else:
                with served(target, Path(folder)) as (uri, server):
                    figures, found = with_tracking(given.steps, Path(folder), uri, target, server)
        report(target, figures, found)


def report(target: str, figures: Figures, found: str) -> None:
    median = statistics.median
    (over_ms, over_error), (p99, p99_error) = overhead_ms(figures), tail(figures)
    sides = [list(itertools.chain(*blocks)) for blocks in (figures.tracked, figures.untracked)]
    stolen = "/".join(f"{sum(stolen for _, stolen in side) / len(side):.1%}" for side in sides)
    print(
        f"{target:8} {1e3 * median(took for took, _ in sides[1]):8.2f} {over_ms:+8.3f} +- {over_error:5.3f} {p99:6.2f} +- {p99_error:4.2f} "
        f"{stolen:>13} {overhead_ms(figures, True)[0]:+8.3f} {tail(figures, True)[0]:5.2f} {1e6 * median(figures.call_s):8.0f} "
        f"{median(figures.blocked or [float('nan')]):12.2f} {figures.exit_s:7.1f} {found:>14}",
        flush=True,
    )


def counted(blocks: Blocks, stolen_too: bool) -> list[list[float]]:
    return [[took for took, stolen in block if stolen_too or not stolen] for block in blocks]


def overhead_ms(figures: Figures, stolen_too: bool = False) -> tuple[float, float]:
    """Median over the tracked blocks and its standard error; a block of which no step counts is left out."""
    tracked, untracked = counted(figures.tracked, stolen_too), counted(figures.untracked, stolen_too)
    trios = [trio for trio in zip(tracked, untracked, untracked[1:], strict=False) if all(trio)]
    over = [1e3 * (statistics.mean(a) - (statistics.mean(b) + statistics.mean(c)) / 2) for a, b, c in trios]
    return statistics.median(over), 1.2533 * statistics.stdev(over) / len(over) ** 0.5


def tail(figures: Figures, stolen_too: bool = False) -> tuple[float, float]:
    """Ratio of the 99th percentiles and its standard error."""
    tracked, untracked = counted(figures.tracked, stolen_too), counted(figures.untracked, stolen_too)

    def p99(blocks: list[list[float]]) -> float:
        times = sorted(itertools.chain(*blocks))
        return times[int(0.99 * (len(times) - 1))]

    parts = [p99(tracked[part::PARTS]) / p99(untracked[part::PARTS]) for part in range(PARTS)]
    return p99(tracked) / p99(untracked), statistics.stdev(parts) / PARTS**0.5


def with_tracking(steps: int, folder: Path, uri: str, target: str, server: Server | None) -> tuple[Figures, str]:
    directory = RunDirectory.new(folder / "checkpoints", {}, datetime.now())
    segment = Segment(
        number=1,
        training="t" * 32,
        continues=None,
        wrapper=None,
        experiment="bdh",
        run_name=None,
        user="me",
        tracking_uri=uri,
        mirror=True,
        keep=None,
        audit=list(REPLAYED),
        host="h",
        pid=0,
        device="cpu",
        versions={},
        started_at_ms=int(1e3 * time.time()),
        first_step=0,
    )
    notes: list[str] = []
    tracker = Tracker(lambda: directory.folder, uri, segment, notes.append, SubprocessSender)
    identity = tracker.wait(60)
    assert identity is not None, notes
    provenance = Provenance(identity.run_id, 1, None, False, "", "", {})

    def write(contents: dict[str, Any], evaluation: Evaluation | None, throttle: Throttle) -> None:
        directory.make()
        tracker.sync()
        tracker.checkpoint(directory.save(contents, provenance, evaluation, throttle).path, evaluation)

    figures = train(steps, tracker, BackgroundWriter(write), target, server)
    directory.close()
    if server is not None and target in ("stopped", "killed"):
        if target == "stopped":
            server.signal(signal.SIGCONT)
        else:
            server.start()
        done = sync.sync(directory.path, uri, lambda line: None)
        assert done.left == 0, done
    client = MlflowClient(server.uri if server else uri)
    there = Counter((key, m.step) for key in METRICS for m in client.get_metric_history(identity.run_id, key))
    assert set(there) <= {(key, step) for key in METRICS for step in range(figures.steps)}
    once, all_of_them = sum(times == 1 for times in there.values()), len(METRICS) * figures.steps
    return figures, f"{once}/{all_of_them}" + (f" +{sum(there.values()) - once} again" if sum(there.values()) != once else "")


def without_tracking(steps: int, folder: Path, target: str) -> Figures:
    if target == "nothing":
        return train(steps, NullTracker(), None, target, None)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writer = context.Process(target=write_points, args=(f"sqlite:///{folder}/mlflow.db", ready), daemon=True)
    writer.start()
    assert ready.wait(60)
    try:
        figures = train(steps, NullTracker(), None, target, None)
        assert writer.is_alive()
        return figures
    finally:
        writer.kill()
        writer.join()


def write_points(uri: str, ready: Any) -> None:
    os.nice(5)  # as the sender does
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("floor")).info.run_id
    for block in itertools.count():
        now_ms = int(1e3 * time.time())
        client.log_batch(run_id, [Metric(key, 1.0, now_ms, BLOCK * block + i) for i in range(BLOCK) for key in METRICS])
        ready.set()
        time.sleep(1)  # about once in each tracked block: it is stopped in the others


def train(steps: int, tracker: Tracker | NullTracker, writer: BackgroundWriter | None, target: str, server: Server | None) -> Figures:
    """The loop. The time for which a checkpoint blocks it is a figure of its own; the steps while one is written are among the tracked."""
    work, state = toy(), {"step": 1, "tokens_seen": 0, "loss": 1.0, "model_state_dict": weights()}
    tracked, untracked, call_s, blocked = Blocks(), Blocks(), list[float](), list[float]()
    step, server_pids = 0, set[int]()

    def untracked_block() -> None:
        times = list[Step]()
        signal_children(signal.SIGSTOP, server_pids)
        for _ in range(BLOCK):
            stolen, started = stolen_s(), time.perf_counter()
            compute(work)
            took = time.perf_counter() - started
            times.append((took, stolen_s() > stolen))
        signal_children(signal.SIGCONT, server_pids)
        untracked.append(times)

    while step < steps:
        if server is not None and target in ("stopped", "killed") and step >= steps // 2 and not server_pids:
            server_pids = set(server.pids())
            server.signal(signal.SIGSTOP if target == "stopped" else signal.SIGKILL)
        untracked_block()
        times = list[Step]()
        while len(times) < BLOCK or (writer is not None and writing() and step < steps):
            stolen, started = stolen_s(), time.perf_counter()
            loss = compute(work)
            before = time.perf_counter()
            tracker.metrics(dict.fromkeys(METRICS, loss + step), step)
            call_s.append(time.perf_counter() - before)
            step += 1
            took = time.perf_counter() - started
            times.append((took, stolen_s() > stolen))
            if writer is not None and step % CHECKPOINT_EVERY == CHECKPOINT_EVERY // 3:
                copy_s = copying(state)
                state["step"] = step
                before = time.perf_counter()
                writer.save(state, None)
                blocked.append((time.perf_counter() - before) / copy_s)
        tracked.append(times)
    untracked_block()
    if writer is not None:
        writer.finish()
    before = time.perf_counter()
    tracker.close("FINISHED", {}, step)
    exit_s = time.perf_counter() - before
    return Figures(tracked, untracked, call_s, blocked, exit_s, step)


def stolen_s() -> float:
    """Seconds so far in which a hypervisor gave this machine's processors to somebody else; zero where none reports it."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def writing() -> bool:
    return any(thread.name == "checkpoint" for thread in threading.enumerate())


def signal_children(number: signal.Signals, excepted: set[int]) -> None:
    """Send a signal to all child processes but the excepted (a server that is stopped or killed for the whole measurement)."""
    for process in psutil.Process().children(recursive=True):
        if process.pid not in excepted:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextlib.contextmanager
def served(target: str, folder: Path) -> Iterator[tuple[str, Server | None]]:
    store = folder / "empty.db"
    client = MlflowClient(f"sqlite:///{store}")
    if target == "sqlite":
        client.create_experiment("bdh", artifact_location=f"file://{folder}/artifacts")
        yield f"sqlite:///{store}", None
        return
    client.search_experiments()
    server = Server(store, folder / "server")
    command = [sys.executable, str(Path(__file__).parents[1] / "scripts" / "relay.py"), str(server.port), "0.2"]
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


if __name__ == "__main__":
    main()
