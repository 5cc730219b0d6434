"""From a configuration to the first step: fresh, resumed or warm-started; every part is built here and handed to the trainer.

The order is that of trust: what can be refused is refused first (configuration, folder, checkpoint, data, one whole batch), and only
then is an MLflow run begun. Afterwards the run is told how it ended, whatever happened.
"""

import contextlib
import os
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bdh_mlflow import __version__, checkpoint, host, redact
from bdh_mlflow.checkpoint import Provenance
from bdh_mlflow.config import Config
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.tracking import journal, store, tracker
from bdh_mlflow.tracking.tracker import Tracker
from bdh_mlflow.training.origin import Origin


def segment_of(config: Config, origin: Origin, door: store.StoreStatus, folder: Path, device: str) -> dict[str, Any]:
    """What the sender must know of this process to find or make its run, and what `segments.json` says of it."""
    earlier = [r.fields for r in journal.read(folder) if r.kind == "segment"]
    tags = door.run.data.tags if door.run else {}
    saved = origin.manifest.segment if origin.kind == "resumed" and origin.manifest else 0
    number = 1 + max(saved, int(tags.get("bdh.segment", 0)), earlier[-1]["number"] if earlier else 0)
    training = earlier[0]["training"] if earlier else tags.get("bdh.training", uuid.uuid4().hex)
    audit = list(tracker.REPLAYED)
    if origin.saved:  # a mean over other spans is another number
        for key, metric in (("log_freq", "train/loss"), ("test_iters", "val/loss")):
            if getattr(origin.saved.training, key) != getattr(config.training, key):
                audit.remove(metric)
    return {
        "number": number,
        "training": training,
        "continues": origin.run_id if origin.kind == "resumed" else None,
        "wrapper": os.environ.get("MLFLOW_RUN_ID"),
        "experiment": config.tracking.experiment,
        "run_name": config.tracking.run_name,
        "user": os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown",
        "tracking_uri": redact.masked(door.tracking_uri),
        "mirror": config.tracking.mirror_checkpoints,
        "keep": config.training.keep_checkpoints,
        "audit": audit,
        "host": platform.node(),
        "pid": os.getpid(),
        "device": device,
        "versions": versions(),
        "started_at_ms": int(time.time() * 1000),
        "first_step": origin.state["step"] if origin.state and origin.kind == "resumed" else 0,
    }


def introduce(
    tracker: Tracker,
    config: Config,
    text: ParquetText,
    facts: Mapping[str, str],
    provenance: Provenance,
    patch: str,
    origin: Origin,
) -> None:
    """Everything about the run that is known before its first step."""
    tags = {
        **config.tracking.tags,
        **facts,
        "bdh.version": __version__,
        "bdh.host": platform.node(),
        "bdh.git_dirty": str(provenance.git_dirty).lower(),
        "bdh.command": " ".join(map(shlex.quote, sys.argv)),
        "bdh.stop_reason": "",
    }
    if provenance.git_commit:
        tags["mlflow.source.git.commit"] = provenance.git_commit
    if origin.manifest is not None and origin.saved is not None:
        relation = {"resumed": "bdh.resumed_from", "forked": "bdh.forked_from"}[origin.kind]
        tags[relation] = f"runs:/{origin.run_id}/{origin.manifest.artifact_path}"
        drift = [d for d in origin.saved.differences(config) if d.key != "training.resume_from_checkpoint"]
        tags |= {f"drift.{d.key}": f"{d.before} -> {d.after}" for d in drift}
    elif origin.found is not None:
        tags["bdh.warm_start"] = str(origin.found.path)
    tracker.tags(tags)
    tracker.params(config.flat())
    tracker.text(config.to_yaml(), checkpoint.CONFIG_NAME)
    tracker.text(host.environment(), "environment.txt")
    tracker.text(text.describe(), "data/manifest.json")
    if patch:
        tracker.text(patch, "code/uncommitted.patch")
    profile = {"num_rows": text.rows, "files": len(text.files), "bytes": text.bytes, "val_fraction": text.val_fraction}
    tracker.dataset(text.root.name, text.digest, str(text.root.absolute()), profile, "training")
    if text.val_fraction:  # under a name of its own: a run lists a dataset of one name and digest once
        tracker.dataset(f"{text.root.name} (validation)", text.digest, str(text.root.absolute()), profile, "validation")


def headline(
    config: Config,
    text: ParquetText,
    facts: Mapping[str, str],
    tracker: Tracker,
    door: store.StoreStatus,
    origin: Origin,
    segment: int,
) -> str:
    """What is about to be trained, in a few lines."""
    identity, uri = tracker.identity, redact.masked(door.tracking_uri)
    lines = [
        f"BDH with {config.parameters / 1e6:.2f} M parameters, {config.tokens_per_step:,} tokens a step; {facts['bdh.precision']}; "
        f"{facts['bdh.optimizer']}",
        f"data: {text.root}, {len(text.files)} files, {text.rows:,} documents; layers: {facts['bdh.layer_form']}",
        f"MLflow run {identity.name} ({identity.run_id}) in experiment {identity.experiment}"
        if identity
        else f"MLflow: {uri} {'has not named the run yet' if door.reachable else 'does not answer'}; training goes on, "
        f"everything is journalled and delivered when it does",
    ]
    if origin.found is not None:
        how = {
            "resumed": f"segment {segment}",
            "forked": "a new run from its state",
            "warm": "warm start: its weights, a new optimizer",
        }
        lines.append(f"{origin.kind} from {origin.found.path} ({how[origin.kind]})")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    names = ("torch", "mlflow", "bitsandbytes", "torchao", "pyarrow", "numpy")
    found = {"bdh-mlflow": __version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
