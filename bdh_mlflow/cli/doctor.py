"""Findings of `bdh-mlflow doctor`: tracking store, artifacts, undelivered journals, and what this machine can run. Leaves nothing
behind.

Imports torch and mlflow, so the command imports this module when it runs.
"""

import importlib.util
import os
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mlflow.entities import Experiment

from bdh_mlflow import checkpoint, host
from bdh_mlflow.config import Config
from bdh_mlflow.distributed import Report, World
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.files import first_line
from bdh_mlflow.model import native, precision
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import database, journal, store, sync, system_metrics
from bdh_mlflow.tracking.artifacts import try_artifacts
from bdh_mlflow.tracking.store import local_path
from bdh_mlflow.training.agreement import code_digest
from bdh_mlflow.training.problems import problems

STORE_S = 20.0  # an artifact store behind a network answers four requests
EXCHANGES = 20
SUMMED_BYTES = 2**24
GROUP_HEADER = ("rank", "host", "device", "threads", "torch", "code", "exchange", "sum of 16 MiB")


@dataclass(frozen=True)
class Finding:
    """The result of one check.   good: nothing is wrong.   do: what to type or change, empty if nothing."""

    what: str
    found: str
    good: bool = True
    do: str = ""


def examine(config: Config) -> list[Finding]:
    """All checks for a training run with `config`."""
    return [*_store(config), *_journals(config), *_machine(config)]


@dataclass(frozen=True)
class Rank:
    """What one process of a group sees.   exchange_ms: median time of an exchange with all others.   sum_mb_per_s: of numbers added up
    over all processes.
    """

    host: str
    device: str
    threads: int
    torch: str
    code: str
    exchange_ms: float
    sum_mb_per_s: float

    def trains_with(self, other: "Rank") -> bool:
        """Whether nothing differs that would be refused."""
        return (self.torch, self.code) == (other.torch, other.code)


def examine_group(world: World) -> list[Rank]:
    """What each process sees, and how fast it reaches the others.   Raises PeerError where one cannot be reached."""
    times = []
    for _ in range(EXCHANGES):
        started = time.perf_counter()
        world.exchange(Report())
        times.append(time.perf_counter() - started)
    numbers = torch.zeros(SUMMED_BYTES // 8, dtype=torch.float64)
    started = time.perf_counter()
    world.sum_exact(numbers)
    took_s = time.perf_counter() - started
    device = precision.pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return world.gather(
        Rank(
            world.hosts[world.rank],
            f"{device} {name}".strip(),
            torch.get_num_threads(),
            torch.__version__,
            code_digest(),
            1e3 * statistics.median(times),
            SUMMED_BYTES / 1e6 / took_s,
        )
    )


def group_table(ranks: list[Rank]) -> list[list[str]]:
    """A row for each rank; what must be the same on all and is not is marked."""
    rows = []
    for number, rank in enumerate(ranks):
        alike = [
            f"{own}{'' if own == first else '  <- differs'}"
            for own, first in ((rank.threads, ranks[0].threads), (rank.torch, ranks[0].torch), (rank.code, ranks[0].code))
        ]
        rows.append([str(number), rank.host, rank.device, *alike, f"{rank.exchange_ms:.2f} ms", f"{rank.sum_mb_per_s:,.0f} MB/s"])
    return rows


def _store(config: Config) -> Iterator[Finding]:
    uri = store.tracking_uri(config.tracking)
    if config.tracking.tracking_uri:
        why = "tracking.tracking_uri of the config"
    elif os.environ.get("MLFLOW_TRACKING_URI"):
        why = "MLFLOW_TRACKING_URI"
    else:
        why = "MLflow's default: a database in this folder"
    yield Finding("tracking URI", f"{masked(uri)} ({why})")
    if (file := database.database_file(uri)) is not None and not file.exists():
        yield Finding("tracking store", f"{file} will be made by the first run")  # opening it would make it
        return
    try:
        status = store.probe_store(config.tracking, None)
    except TrackingError as error:
        yield Finding("tracking store", str(error), False, "see the message")
        return
    if not status.reachable:
        start = "start the server; training works without it and `bdh-mlflow sync` delivers later"
        yield Finding("tracking store", f"no answer within {store.PROBE_S:.0f} s", False, start)
        return
    yield Finding("tracking store", _version(uri))
    client = store.client_of(uri)
    with store.reported("the tracking store cannot be read"):
        experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        yield Finding("artifact root", f"experiment {config.tracking.experiment} will be created by the first run")
    else:
        yield artifact_root(experiment, uri)


def _version(uri: str) -> str:
    own = host.version_of("mlflow") or "of unknown version"
    if not uri.startswith(("http://", "https://")):
        return f"answers; MLflow {own} in this process"
    theirs = store.server_version(uri)
    if theirs is None:
        return f"answers, but gives no version (ours is {own})"
    return f"answers; MLflow {theirs}" + ("" if theirs == own else f" (ours is {own}; the server's limits apply)")


def artifact_root(experiment: Experiment, uri: str) -> Finding:
    """Where an experiment stores artifacts, and whether the UI of the store at `uri` can show them."""
    root = experiment.artifact_location
    folder = local_path(root)
    if folder is None:
        through = root.startswith("mlflow-artifacts:")
        shown = "stored through the server, so the UI shows them" if through else "the UI shows them if its server can read there"
        if reason := _why_unusable(root, uri):
            return Finding("artifact root", f"{masked(root)}: {reason}", False, "make it usable; checkpoints stay here until it is")
        return Finding("artifact root", f"{masked(root)}: a file was written, read and removed; {shown}")
    reason = checkpoint.why_unwritable(folder)
    if reason:
        return Finding("artifact root", f"{folder}: {reason}", False, "make it writable, or name another experiment")
    if uri.startswith(("http://", "https://")):
        return Finding(
            "artifact root",
            f"{folder} on the machine that trains: a server on another machine cannot show it",
            False,
            "start the server with --artifacts-destination and name a new experiment",
        )
    return Finding("artifact root", f"{folder}: the UI on this machine shows them; checkpoints are hard links where the file system allows")


def _why_unusable(root: str, uri: str) -> str | None:
    """Why files cannot be written, read and removed at an artifact root; None if they can."""
    found: list[str | None] = []

    def attempt() -> None:
        try:
            try_artifacts(root, uri)
            found.append(None)
        except Exception as error:  # each artifact store raises its own kinds
            found.append(first_line(error))

    trial = threading.Thread(target=attempt, name="artifacts", daemon=True)
    trial.start()
    trial.join(STORE_S)
    return found[0] if found else f"no answer within {STORE_S:.0f} s"


def _journals(config: Config) -> Iterator[Finding]:
    directory = Path(config.training.checkpoint_dir)
    reason = checkpoint.why_unwritable(directory)
    yield Finding("checkpoints", f"{directory.absolute()}: {reason or f'{len(checkpoint.list_all(directory))} runs'}", reason is None)
    undelivered = 0
    for folder in sync.folders_with_journal(directory):
        with journal.reading(folder) as reader:
            if reader is None:
                undelivered += 1
                yield Finding("journal", f"{folder}: cannot be read", False, "give this user read and write access to it")
                continue
            left, alive = reader.index.waiting(reader.delivered()), reader.is_training()
        if left:
            undelivered += 1
            found = f"{folder}: {left:,} records{', training now' if alive else ''}"
            yield Finding("journal", found, alive, "" if alive else f"bdh-mlflow sync {folder}")
    if not undelivered:
        yield Finding("journals", "everything is delivered")


def _machine(config: Config) -> Iterator[Finding]:
    device = precision.pick_device(config.training.device)
    yield Finding("device", f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found = list(problems(config))
    for problem in found:
        yield Finding("precision", str(problem), False, "change the setting")
    if not found:
        yield Finding("precision", f"the configured formats run here ({config.low_precision.compute_dtype})")
    library, how = native.library()
    without = f"install g++: without it a step on a CPU takes {native.WITHOUT} times as long"
    yield Finding("elementwise passes", f"C++ ({how})" if library else f"PyTorch ({how})", do="" if library else without)
    if config.tracking.log_system_metrics:
        missing = system_metrics.why_unavailable()
        yield Finding("system metrics", missing or "psutil is installed", missing is None, "pip install psutil" if missing else "")
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    yield Finding("4-bit weights", "bitsandbytes is installed" if bitsandbytes else "bitsandbytes is not installed")
