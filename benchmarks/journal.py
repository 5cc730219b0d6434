"""What attaching to a long journal costs: `python benchmarks/journal.py [--records 1000000] [--checkout ../before]`.

Makes a journal of that many records in five segments: points of six metrics, and at every thousandth step an evaluation, samples and a
checkpoint. The file `journal.json` beside it says that all but the last thousand records were delivered. Then one process for each line of
the table does what a sender does with the journal before its first request; `all of it` is one process for the three. seconds: from opening
the journal, without imports. peak MiB: largest resident set of that process, above that of one that only imports the same modules.

--checkout: a clone of another commit, whose code is measured (up to a152983 the modules are flat).
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = "bdh_mlflow"  # imported by name: it is that of --checkout
SEGMENTS = 5
WAITING = 1000  # records at the end that were not delivered
EVERY = 1000  # steps from checkpoint to checkpoint
METRICS = ("train/loss", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "perf/step_ms", "progress/tokens_seen")
STARTED_MS = 1_790_000_000_000
NOTHING, ALL = "nothing", "all of it"
Work = dict[str, Callable[[], object]]


def main() -> None:
    """Measure, or be one of the measured processes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--records", type=int, default=10**6)
    options.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    options.add_argument("--measure", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.measure:
        measure(given.measure, given.checkout, given.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_journal(folder, given.records)
        print(f"{given.records:,} records, {size / 2**20:.0f} MiB")
        print(f"{'':<14} {'seconds':>8} {'peak MiB':>9}  result")
        _, empty_kib, _ = in_a_process(NOTHING, given.checkout, folder)
        for what in ("segments", "undelivered", "last segment", ALL):
            seconds, peak_kib, result = in_a_process(what, given.checkout, folder)
            print(f"{what:<14} {seconds:8.2f} {(peak_kib - empty_kib) / 1024:9.1f}  {result}", flush=True)


def in_a_process(what: str, checkout: Path, folder: Path) -> tuple[float, int, str]:
    """Seconds, peak resident set in KiB and the result of one measurement."""
    command = [sys.executable, __file__, "--measure", what, "--checkout", str(checkout.absolute()), "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.absolute()), "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak_kib, result = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak_kib, result


def measure(what: str, checkout: Path, folder: Path) -> None:
    """Do it and print what it took."""
    sys.path.insert(0, str(checkout))
    begin = flat_modules if (checkout / "bdh_mlflow" / "journal.py").is_file() else current_modules
    opened = begin()
    started, results = time.perf_counter(), []
    if what != NOTHING:
        work = opened(folder)
        results = [str(work[name]()) for name in (work if what == ALL else [what])]
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ", ".join(results)]))


def current_modules() -> Callable[[Path], Work]:
    """This commit: one index."""
    journal = importlib.import_module(f"{PACKAGE}.tracking.journal")

    def opened(folder: Path) -> Work:
        reader = journal.JournalReader(folder)
        state, index = reader.delivered(), reader.index
        return {
            "segments": lambda: f"{len(index.spans())} segments",
            "undelivered": lambda: f"{index.waiting(state)} records",
            "last segment": lambda: f"number {index.last_segment(state.points).number}",
        }

    return opened


def flat_modules() -> Callable[[Path], Work]:
    """Up to commit a152983: each question reads the file again."""
    delivery, journal, remote = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("delivery", "journal", "remote"))

    def opened(folder: Path) -> Work:
        ledger = journal.Ledger(folder)
        state = ledger.delivered()

        def last_segment() -> Any:
            return [r.fields for r in ledger.read(0, state.points) if r.kind == "segment"][-1]["number"]

        return {
            "segments": lambda: f"{len(list(remote.segments_of(ledger.read(0))))} segments",
            "undelivered": lambda: f"{delivery.waiting(ledger, state)} records",
            "last segment": lambda: f"number {last_segment()}",
        }

    return opened


def make_journal(folder: Path, count: int) -> int:
    """Write the two files.   Returns the bytes of the journal."""
    delivered = 0
    with (folder / "journal.jsonl").open("wb") as file:
        for number, record in enumerate(records(count)):
            if number == count - WAITING:
                delivered = file.tell()
            file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        size = file.tell()
    state = {"run_id": "0" * 32, "tracking_uri": "http://127.0.0.1:5000", "points": delivered, "files": delivered}
    state |= {"segment": SEGMENTS, "ended": SEGMENTS - 1, "lost": 0, "set_aside": []}
    (folder / "journal.json").write_text(json.dumps(state))
    return size


def records(count: int) -> Iterator[dict[str, Any]]:
    """Records in the form of commit a152983, which later commits read, too."""
    made, step = 0, 0
    for number in range(1, SEGMENTS + 1):
        lines = segment(number, step)
        while made < count * number // SEGMENTS:
            record = next(lines)
            step = record.get("step", step)
            made += 1
            yield record
    assert made == count


def segment(number: int, step: int) -> Iterator[dict[str, Any]]:
    """One process, which is killed when the caller takes no more."""
    at_ms = STARTED_MS + 500 * step
    versions = dict.fromkeys(("bdh-mlflow", "python", "torch", "mlflow", "bitsandbytes", "torchao", "pyarrow", "numpy"), "1.2.3")
    own = {"number": number, "training": "0" * 32, "continues": None, "wrapper": None, "experiment": "bdh", "run_name": None}
    own |= {"user": "me", "tracking_uri": "http://127.0.0.1:5000", "mirror": True, "keep": 3, "audit": ["train/loss", "val/loss"]}
    own |= {"host": "host", "pid": 1, "device": "cpu", "versions": versions, "started_at_ms": at_ms, "first_step": step}
    yield {"kind": "segment", "at_ms": at_ms, **own}
    yield {"kind": "tags", "at_ms": at_ms, "tags": {"bdh.device": "cpu", "bdh.precision": "bfloat16 matmuls; float32 weights; cpu"}}
    yield {"kind": "params", "at_ms": at_ms, "params": {f"training.setting_{i}": "value" for i in range(55)}}
    while True:
        step, at_ms = step + 1, at_ms + 500
        yield {"kind": "points", "at_ms": at_ms, "values": {key: i + 1 / step for i, key in enumerate(METRICS)}, "step": step}
        if step % EVERY == 0:
            losses = {"val/loss": 3.0 + 1 / step, "val/bpb": 4.3 + 1 / step}
            text = "def written(by, the, model):\n" * 17
            rows = [{"step": step, "prompt": "def ", "written": text}]
            yield {"kind": "points", "at_ms": at_ms, "values": losses, "step": step}
            yield {"kind": "text", "at_ms": at_ms, "artifact": f"samples/step_{step}.txt", "text": text, "rows": rows}
            evaluation = {"step": step, "at_ms": at_ms, "values": losses}
            yield {"kind": "checkpoint", "at_ms": at_ms, "path": f"/runs/run_x/checkpoint_{step}.pt", "evaluation": evaluation}


if __name__ == "__main__":
    main()
