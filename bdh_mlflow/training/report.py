"""What is logged about a run as a whole: the segment, tags, params and datasets at its start, system metrics, and how it ended."""

import contextlib
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bdh_mlflow import checkpoint, host, redact
from bdh_mlflow.checkpoint import Provenance, RunDirectory
from bdh_mlflow.files import shown
from bdh_mlflow.tracking import system_metrics as system
from bdh_mlflow.tracking import tracker
from bdh_mlflow.tracking.beginning import began_s, next_segment, program_tags, user_name
from bdh_mlflow.tracking.records import JOB, RunIdentity, Segment
from bdh_mlflow.tracking.status import StoreStatus, overruled
from bdh_mlflow.tracking.tracker import DatasetFacts, Tracker
from bdh_mlflow.training import nodes, processes
from bdh_mlflow.training.build import Built, is_sharded
from bdh_mlflow.training.parts import Ending
from bdh_mlflow.training.passes import reduction
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.vocabulary import Tokenizer


def segment_of(built: Built, status: StoreStatus, earlier: list[Segment]) -> Segment:
    """What the sender must know of this process to find or make its run, and what `segments.json` says of it.

    earlier: segments that the journal holds already.
    """
    config, origin = built.config, built.origin
    saved = origin.manifest.segment if origin.kind == "resumed" and origin.manifest else 0
    number, training = next_segment(status, earlier, saved)
    audit = list(tracker.REPLAYED)
    if origin.saved:  # a mean over other spans is another number
        for key, metric in (("log_freq", "train/loss"), ("test_iters", "val/loss")):
            if getattr(origin.saved.training, key) != getattr(config.training, key):
                audit.remove(metric)
    return Segment(
        number=number,
        training=training,
        continues=origin.continues,
        wrapper=os.environ.get("MLFLOW_RUN_ID"),
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name,
        user=user_name(),
        tracking_uri=redact.masked(status.tracking_uri),
        mirror=config.tracking.mirror_checkpoints,
        keep=config.training.keep_checkpoints,
        audit=audit,
        host=platform.node(),
        pid=os.getpid(),
        device=built.facts["bdh.device"],
        versions=host.versions(),
        started_at_ms=int(time.time() * 1000),
        first_step=origin.state["step"] if origin.state and origin.kind == "resumed" else 0,
        processes=built.world.size,
        hosts=list(dict.fromkeys(built.world.hosts)),
        threads=torch.get_num_threads(),
        reduction=reduction(config.training.gradient_accumulation_steps, built.world.size, is_sharded(config, built.world)),
        job=job.id if (job := processes.job()) else None,
    )


def numerical_differences(earlier: list[Segment], segment: Segment) -> Iterator[str]:
    """Why the numbers of this segment may differ from those that the one before it would have had, in their last bits."""
    if not earlier:
        return
    last = earlier[-1]
    if last.threads and last.threads != segment.threads:
        yield (
            f"note: {segment.threads} threads a process, the segment before had {last.threads}: matrix products may round otherwise "
            f"(OMP_NUM_THREADS={last.threads} keeps them as they were)"
        )
    if last.reduction and last.reduction != segment.reduction:
        yield f"note: gradients are summed in another order than in the segment before ({segment.reduction}; it was {last.reduction})"


def introduce(tracker: Tracker, built: Built, segment: Segment, provenance: Provenance, patch: str) -> None:
    """Record everything about the run that is known before its first step.   patch: uncommitted changes of the source, as far as known."""
    config, origin, text = built.config, built.origin, built.text
    tags = {
        **config.tracking.tags,
        **built.facts,
        "bdh.tokenizer": _tokenizer_in_words(text.tokenizer),
        "bdh.bytes_per_token": repr(text.bytes_per_token(built.validation)),
        **program_tags(provenance.git_commit, provenance.git_dirty),
        "bdh.host": ", ".join(segment.hosts),
        "bdh.processes": str(segment.processes),
        "bdh.threads": str(segment.threads),
        "bdh.reduction": segment.reduction,
    }
    if origin.found is not None and origin.saved is not None:
        relation = {"resumed": "bdh.resumed_from", "forked": "bdh.forked_from"}[origin.kind]
        tags[relation] = origin.found.address
        drift = [d for d in origin.saved.differences(config) if d.key != "training.resume_from_checkpoint"]
        tags |= {f"drift.{d.key}": f"{d.before} -> {d.after}" for d in drift}
    elif origin.found is not None:
        tags["bdh.warm_start"] = str(origin.found.path)
    elif origin.made is not None:
        tags[f"bdh.{origin.made.how}_from"] = ", ".join(found.address for found in origin.made.of)
    if segment.job:
        tags[JOB] = segment.job
    tracker.tags(tags)
    tracker.params(config.flat())
    tracker.text(config.to_yaml(), checkpoint.CONFIG_NAME)
    tracker.text(host.environment(), "environment.txt")
    tracker.text(text.describe(), "data/manifest.json")
    if patch:
        tracker.text(patch, "code/uncommitted.patch")
    profile = {"num_rows": text.rows, "files": len(text.files), "bytes": text.bytes, "val_fraction": text.val_fraction}
    names = {"training": text.root.name}
    if text.val_fraction:  # under a name of its own: a run lists a dataset of one name and digest once
        names["validation"] = f"{text.root.name} (validation)"
    for context, name in names.items():
        folder = str(text.root.absolute())
        tracker.dataset(DatasetFacts(name=name, digest=text.digest, folder=folder, profile=profile, context=context))


def _tokens_in_words(built: Built) -> str:
    tokenizer = built.text.tokenizer
    if tokenizer.digest is None:
        return ""
    return f"{tokenizer.size:,} tokens ({tokenizer.kind}), {built.text.bytes_per_token(built.validation):.2f} bytes each; "


def _tokenizer_in_words(tokenizer: Tokenizer) -> str:
    if tokenizer.digest is None:
        return "bytes"
    return f"{tokenizer.kind}, {tokenizer.size:,} tokens, separator {tokenizer.separator_text}, digest {tokenizer.digest}"


def headline(built: Built, identity: RunIdentity | None, status: StoreStatus, segment: int) -> str:
    """What is about to be trained, in a few lines."""
    config, origin, text, facts = built.config, built.origin, built.text, built.facts
    uri = redact.masked(status.tracking_uri)
    lines = [
        f"BDH with {config.parameters / 1e6:.2f} M parameters, {config.tokens_per_step:,} tokens a step; {facts['bdh.precision']}; "
        f"{facts['bdh.optimizer']}",
        f"data: {shown(text.root)}, {len(text.files)} files, {text.rows:,} documents; {_tokens_in_words(built)}"
        f"layers: {facts['bdh.layer_form']}, "
        f"elementwise passes: {facts['bdh.passes']}",
        f"MLflow run {identity.name} ({identity.run_id}) in experiment {identity.experiment}"
        if identity
        else f"MLflow: {uri} {'has not named the run yet' if status.reachable else 'does not answer'}; training goes on, "
        f"everything is journalled and delivered when it does",
    ]
    if (world := built.world).size > 1:
        where = ", ".join(dict.fromkeys(world.hosts))
        own = len(world.passes(config.training.gradient_accumulation_steps))
        share = f"{own} {'passes' if own > 1 else 'pass'} of an update"
        lines.append(f"{world.size} processes on {where}, each computing {share} with {torch.get_num_threads()} threads")
    if missed := overruled(config.tracking):
        lines.append(f"note: {missed}")
    if origin.found is not None:
        how = {
            "resumed": f"segment {segment}",
            "forked": "a new run from its state",
            "warm": "warm start: its weights, a new optimizer",
        }
        lines.append(f"{origin.kind} from {shown(origin.found.path)} ({how[origin.kind]})")
    if origin.made is not None:
        lines.append(f"{origin.made.how} from {', '.join(shown(found.path) for found in origin.made.of)}")
    return "\n".join(lines)


@contextlib.contextmanager
def system_metrics(built: Built, tracker: Tracker, first: Segment, status: StoreStatus, note: Callable[[str], None]) -> Iterator[None]:
    """Sample the machines while the body runs, if configured; samples are numbered from the beginning of the first segment."""
    if not built.config.tracking.log_system_metrics:
        yield
        return
    if missing := system.why_unavailable():
        note(f"no system metrics: {missing}")
        yield
        return
    samples = nodes.sampled(built.world, tracker.metrics, began_s(first, status))
    try:
        yield
    finally:
        samples.close()


@dataclass
class FinalReport:
    """What is logged at the end of a run.   refused: the store did not take the run.   step: gives the completed updates."""

    ending: Ending | None = None
    undelivered: int = 0
    refused: bool = False
    step: Callable[[], int] | None = None


@contextlib.contextmanager
def report_ending(tracker: Tracker, stop: StopRequest, run_dir: RunDirectory) -> Iterator[FinalReport]:
    """However the body ends, the run's status says how. A run directory with nothing saved and nothing left to deliver is removed."""
    report = FinalReport()
    status, tags = "FAILED", {}
    try:
        yield report
        assert report.ending is not None
        status = "FINISHED" if report.ending.reason == "finished" else "KILLED"
        tags = {"bdh.stop_reason": report.ending.reason, "bdh.stop_step": str(report.ending.step)}
    except BaseException as error:
        killed = stop.received or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        reason = killed.name if killed and status == "KILLED" else type(error).__name__
        tags = {"bdh.stop_reason": reason, "bdh.stop_message": str(error)[:500] or reason}
        raise
    finally:
        report.undelivered = tracker.close(status, tags, report.step() if report.step else None)
        if not report.undelivered or report.refused:
            run_dir.discard()
