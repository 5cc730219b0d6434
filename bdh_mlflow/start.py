"""From a configuration to the first step: fresh, resumed or warm-started; every part is built here and handed to the trainer.

The order is that of trust: what can be refused is refused first (configuration, folder, checkpoint, data, one whole batch), and only
then is an MLflow run begun. Afterwards the run is told how it ended, whatever happened.
"""

import contextlib
import dataclasses
import itertools
import os
import platform
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from bdh_mlflow import __version__, checkpoint, data, host, journal, model, optim, precision, resume, tokenizer, tracking
from bdh_mlflow.checkpoint import BackgroundWriter, Manifest, Provenance, RunDirectory
from bdh_mlflow.config import Config, ModelConfig, changes_trajectory
from bdh_mlflow.data import Batch, ParquetText, TrainingBatches
from bdh_mlflow.errors import ConfigError, ResumeError, SaveError, TrackingError
from bdh_mlflow.model import BDH
from bdh_mlflow.precision import Precision
from bdh_mlflow.tokenizer import Sample
from bdh_mlflow.tracking import RunIdentity, Tracker
from bdh_mlflow.trainer import Ending, Parts, Progress, StopRequest, Trainer, peak_gib

RECOMPUTE_ABOVE_BYTES = 2 * 2**30  # activations up to this much are kept for the backward pass
PROMPTS, PROMPT_BYTES = 3, 48  # pieces of validation text that samples continue
SAMPLE_BYTES = 128
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50
SHAPES = frozenset(f"model.{f.name}" for f in dataclasses.fields(ModelConfig)) - {"model.dropout", "model.n_layer"} | {
    "low_precision.optimizer_bits",
    "low_precision.use_4bit_optimizer",
}
"""Settings that weights and optimizer states depend on; even a fork cannot change them."""
ORDER = frozenset({"training.seed", "training.block_size", "dataset.max_cached_files", "dataset.text_column", "dataset.val_fraction"})
"""Settings that a position in the data depends on."""


@dataclass(frozen=True)
class Outcome:
    """What a training left behind.

    identity: None if the store has not answered yet.   run_dir: None if no checkpoint was saved.   undelivered: records that wait for the
    store, in the journal of the folder `journal`.
    """

    ending: Ending
    identity: RunIdentity | None
    run_dir: Path | None
    peak_gib: float
    undelivered: int
    journal: Path | None
    experiment: str


@dataclass(frozen=True)
class Origin:
    """Where a training begins.

    fresh: random weights.   resumed: a checkpoint of ours, whose run goes on.   forked: a checkpoint of ours, in a new run that may differ
    from the old one.   warm: weights of another program.   saved: the checkpoint's configuration, for resumed and forked.
    """

    kind: Literal["fresh", "resumed", "forked", "warm"]
    found: resume.Found | None = None
    saved: Config | None = None

    @property
    def state(self) -> dict[str, Any] | None:
        """State to continue from; None where training starts at step 0."""
        return self.found.state if self.found and self.saved else None

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the checkpoint, if it had one or its journal has got one since."""
        if self.found is None or self.found.checkpoint is None:
            return None
        return self.found.run_id or resume.run_of(self.found.checkpoint)

    @property
    def manifest(self) -> Manifest | None:
        """What is known of the checkpoint."""
        return self.found.checkpoint.manifest if self.found and self.found.checkpoint else None


def train(config: Config, progress: Progress, stop: StopRequest, *, fork: bool = False) -> Outcome:
    """Train as configured, to the end or a signal.   Raises a BdhError for whatever else ends it.

    fork: begin a new run from the checkpoint named by resume_from_checkpoint; settings may then differ from its own.
    """
    device = precision.pick_device()
    checkpoint_dir = Path(config.training.checkpoint_dir)
    if reason := checkpoint.unwritable(checkpoint_dir):
        raise ConfigError(f"training.checkpoint_dir: {checkpoint_dir} cannot be created or written: {reason}")
    origin = _origin(config, checkpoint_dir, progress, fork)
    config = config.resolved(origin.saved if origin.kind == "resumed" else None)
    form, why = model.choose_form(config.training.layer_form, device, config.low_precision.use_fp8)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, layer_form=form))
    runs = Precision.asked(config, device)
    peak = precision.gemm_peak(runs.dtype, device)
    text = _text(config, progress)
    batches = _batches(config, text, _position(origin, config, text, progress), device)
    validation = text.validation_batches(config.training.test_iters, config.training.batch_size, config.training.block_size)

    torch.manual_seed(config.training.seed)
    network, optimizer, facts = _network(config, runs, device, form, why)
    if origin.kind == "warm":
        _load_warm(network, origin)

    door = tracking.knock(config.tracking, origin.run_id if origin.kind == "resumed" else None)
    stop.begun = True  # from here on there is a run to end properly
    commit, dirty, patch = host.source_state(Path(__file__).parent)
    run_dir = _run_directory(origin, checkpoint_dir, config)
    with contextlib.closing(run_dir):
        segment = _segment(config, origin, door, run_dir.folder, facts["bdh.device"])
        try:
            tracker = Tracker(lambda: run_dir.folder, door.tracking_uri, segment, progress.note)
        except BaseException:
            run_dir.discard()
            raise
        provenance = Provenance(None, segment["number"], commit, dirty, config.digest(), text.digest, _versions())
        with _told(tracker, stop, run_dir) as told:
            try:
                tracker.wait(tracking.ATTACH_S if door.reachable else 0)
            except TrackingError:
                told.refused = True
                raise
            _introduce(tracker, config, text, facts, provenance, patch, origin)
            progress.note(_headline(network, config, text, facts, tracker, door, origin, segment["number"]))
            writer = BackgroundWriter(
                _save_into(run_dir, tracker, provenance, config, segment["continues"] or segment["wrapper"], progress.note)
            )
            parts = Parts(
                model=network,
                optimizer=optimizer,
                schedule=optim.LearningRate(config.training.learning_rate, config.scheduler),
                scaler=runs.scaler(),
                autocast=runs.autocast,
                formats=runs,
                device=device,
                batches=_shown(batches, progress) if config.training.debug else batches,
                validation=validation,
                samples=_sampler(network, validation, config.training.seed, device),
                observed=network.observed,
                peak_tokens_per_s=peak / model.useful_flops(network.config, config.training.block_size),
                saver=writer,
                tracker=tracker,
                progress=progress,
                stop=stop,
            )
            trainer = Trainer(parts, config.training)
            told.step = lambda: trainer.step
            if origin.state is not None:
                trainer.load_state_dict(origin.state)
                for group in optimizer.param_groups:  # a fork may decay otherwise than the state it was loaded from
                    group["weight_decay"] = config.training.weight_decay
            with (
                _system_metrics(config, tracker, run_dir.folder, door, progress.note),
                _anomalies(config.training.debug),
                _finished(writer, progress),
            ):
                told.ending = trainer.run()
        assert told.ending is not None, "without an ending an error was raised"
        identity = tracker.identity
        made = run_dir.path if run_dir.made else None
        left = run_dir.folder if told.undelivered else None
    return Outcome(told.ending, identity, made, peak_gib(device), told.undelivered, left, config.tracking.experiment)


@dataclass
class _Told:
    """What the run was told at its end."""

    ending: Ending | None = None
    undelivered: int = 0
    refused: bool = False
    step: Callable[[], int] | None = None


@contextlib.contextmanager
def _told(tracker: Tracker, stop: StopRequest, run_dir: RunDirectory) -> Iterator[_Told]:
    """However the body ends, the run is told how. What then has nothing to tell any more leaves no trace."""
    told = _Told()
    status, tags = "FAILED", {}
    try:
        yield told
        assert told.ending is not None
        status = "FINISHED" if told.ending.reason == "finished" else "KILLED"
        tags = {"bdh.stop_reason": told.ending.reason, "bdh.stop_step": str(told.ending.step)}
    except BaseException as error:
        killed = stop.received or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        reason = killed.name if killed and status == "KILLED" else type(error).__name__
        tags = {"bdh.stop_reason": reason, "bdh.stop_message": str(error)[:500] or reason}
        raise
    finally:
        told.undelivered = tracker.close(status, tags, told.step() if told.step else None)
        if not told.undelivered or told.refused:
            run_dir.discard()


@contextlib.contextmanager
def _finished(writer: BackgroundWriter, progress: Progress) -> Iterator[None]:
    """Whatever ends the body, no write is cut off, and none fails unheard."""
    try:
        yield
    except BaseException:
        try:
            writer.finish()
        except SaveError as error:
            progress.note(str(error))
        raise
    writer.finish()


def _run_directory(origin: Origin, checkpoint_dir: Path, config: Config) -> RunDirectory:
    """The directory of the run that goes on, or a new one."""
    if origin.kind != "resumed" or origin.found is None or origin.manifest is None:
        return RunDirectory.new(checkpoint_dir, config.to_yaml(), datetime.now())
    folder = origin.found.path.absolute().parent
    if folder.name != origin.manifest.run_dir:  # a copy that lies elsewhere: its neighbours are none of this run's business
        folder = checkpoint_dir / origin.manifest.run_dir
    return RunDirectory(folder, config.to_yaml())


def _segment(config: Config, origin: Origin, door: tracking.Door, folder: Path, device: str) -> dict[str, Any]:
    """What the sender must know of this process to find or make its run, and what `segments.json` says of it."""
    earlier = [r.fields for r in journal.read(folder) if r.kind == "segment"]
    tags = door.run.data.tags if door.run else {}
    saved = origin.manifest.segment if origin.kind == "resumed" and origin.manifest else 0
    number = 1 + max(saved, int(tags.get("bdh.segment", 0)), earlier[-1]["number"] if earlier else 0)
    training = earlier[0]["training"] if earlier else tags.get("bdh.training", uuid.uuid4().hex)
    audit = list(tracking.REPLAYED)
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
        "tracking_uri": journal.masked(door.tracking_uri),
        "mirror": config.tracking.mirror_checkpoints,
        "keep": config.training.keep_checkpoints,
        "audit": audit,
        "host": platform.node(),
        "pid": os.getpid(),
        "device": device,
        "versions": _versions(),
        "started_at_ms": int(time.time() * 1000),
        "first_step": origin.state["step"] if origin.state and origin.kind == "resumed" else 0,
    }


def _save_into(
    run_dir: RunDirectory, tracker: Tracker, provenance: Provenance, config: Config, likely_run: str | None, note: Callable[[str], None]
) -> Callable[[dict[str, Any], float | None, checkpoint.Rest], None]:
    """How a state becomes a checkpoint: journal first, so that who resumes from it finds every point up to it."""

    def save(contents: dict[str, Any], val_loss: float | None, rest: checkpoint.Rest) -> None:
        started = time.perf_counter()
        run_dir.make()
        try:
            tracker.sync()
        except OSError as error:
            raise SaveError(f"{run_dir.path}: the journal cannot be written: {error}") from error
        run_id = tracker.identity.run_id if tracker.identity else likely_run
        whole = {**contents, "config": config.to_dict()}
        saved = run_dir.save(whole, dataclasses.replace(provenance, mlflow_run_id=run_id), val_loss, rest)
        tracker.metrics({"ckpt/save_s": time.perf_counter() - started}, saved.manifest.step)
        tracker.checkpoint(saved.path, saved.manifest.step)
        try:
            for old in checkpoint.superfluous(run_dir.path, config.training.keep_checkpoints, saved.manifest.step):
                checkpoint.remove(old)
        except OSError as error:  # pruning is a convenience
            note(f"{run_dir.path}: old checkpoints cannot be removed: {error}")

    return save


@contextlib.contextmanager
def _system_metrics(config: Config, tracker: Tracker, folder: Path, door: tracking.Door, note: Callable[[str], None]) -> Iterator[None]:
    if not config.tracking.log_system_metrics:
        yield
        return
    if missing := host.system_metrics_missing():
        note(f"no system metrics: {missing}")
        yield
        return
    first = next((r.fields["started_at_ms"] for r in journal.read(folder) if r.kind == "segment"), None)
    if door.run is not None:
        first = min(first or door.run.info.start_time, door.run.info.start_time)
    samples = host.SystemMetrics(tracker.metrics, (first or 1000 * time.time()) / 1000)
    try:
        yield
    finally:
        samples.close()


def _origin(config: Config, checkpoint_dir: Path, progress: Progress, fork: bool) -> Origin:
    """What training begins from, and proof that this configuration may."""
    target = config.training.resume_from_checkpoint
    if not target or target == "none":
        if fork:
            raise ResumeError("--fork needs a checkpoint to fork from: --resume TARGET")
        return Origin("fresh")
    found = resume.find(target, checkpoint_dir, config.tracking)
    for note in found.notes:
        progress.note(f"passed over {note}")
    if found.checkpoint is None:
        return Origin("warm", found)
    settings = found.state["config"]
    settings = {**settings, "training": {"layer_form": "reference", **settings["training"]}}  # the only form before there was the setting
    saved = Config.from_dict(settings, origin=f"{found.path} (its configuration)").resolved()
    changes = [d for d in saved.differences(config.resolved(None if fork else saved)) if changes_trajectory(d, saved)]
    if fork:
        changes = [d for d in changes if d.key in SHAPES]
    if changes:
        lines = [f"{d.key} was {d.before}, config says {d.after}" for d in changes]
        shapes = " Shapes are fixed for the life of a run." if any(d.key in SHAPES for d in changes) else ""
        ways = "start a new run" if shapes else "begin a new run from this checkpoint with --fork"
        raise ResumeError(
            "\n  ".join([f"cannot resume {found.path}: this configuration would leave the trajectory of the run.{shapes}", *lines])
            + f"\nRestore the values (its own configuration is {found.path.parent / checkpoint.CONFIG_NAME}) or {ways}"
        )
    return Origin("forked" if fork else "resumed", found, saved)


def _position(origin: Origin, config: Config, text: ParquetText, progress: Progress) -> data.Position | None:
    """Where in the data to go on: where the checkpoint was, unless a fork reads other data or in another order."""
    if origin.state is None or origin.saved is None or origin.manifest is None or origin.found is None:
        return None
    position: data.Position = origin.state["data_position"]
    same_data = origin.manifest.data_digest == text.digest
    if origin.kind == "resumed" and not same_data:
        raise ResumeError(
            f"cannot resume: the data in {text.root} is not what {origin.found.path} was trained on "
            f"(digest {text.digest[:12]}, was {origin.manifest.data_digest[:12]}). "
            f"Restore it, or begin a new run from the checkpoint with --fork"
        )
    if same_data and not any(d.key in ORDER for d in origin.saved.differences(config)):
        return position
    progress.note("fork: other data or another order of it, so it is read from its beginning")
    return None


def _text(config: Config, progress: Progress) -> ParquetText:
    """The data, built from its source first if the folder is missing or empty."""
    folder, source = Path(config.dataset.parquet_dir), config.dataset.source
    if source is not None and not (folder.is_dir() and any(folder.iterdir())):
        progress.note(f"{folder} is empty: preparing it from {source}")
        done = data.prepare(source, folder, config.dataset.text_column)
        progress.note(f"prepared {done.documents:,} documents, {done.bytes / 1e6:.1f} MB of text")
    return ParquetText(config.dataset)


def _batches(config: Config, text: ParquetText, position: data.Position | None, device: torch.device) -> Iterator[Batch]:
    """Training batches from a position on; the first one is read now, so that what is wrong with the data shows now."""
    order = TrainingBatches(
        text,
        lanes=config.dataset.max_cached_files,
        batch_size=config.training.batch_size,
        block_size=config.training.block_size,
        seed=config.training.seed,
        position=position,
    )
    batches = data.training_loader(order, config.dataloader, device.type == "cuda")
    return itertools.chain([next(batches)], batches)


def _network(
    config: Config, runs: Precision, device: torch.device, form: model.Form, why_form: str
) -> tuple[BDH, torch.optim.Optimizer, dict[str, str]]:
    """The network on its device, its optimizer, and what was decided about how it is computed, as tags."""
    shape = config.to_bdh_config()
    network = BDH(shape).to(device)
    itemsize = runs.dtype.itemsize
    kept = model.activation_bytes(shape, config.training.batch_size, config.training.block_size, itemsize)
    engine = config.low_precision.use_fp8 and not config.fp8.emulate  # recomputed products would leave its region
    network.recompute = kept > RECOMPUTE_ABOVE_BYTES and not engine
    compiled, why = precision.compiles(config, device)
    network.use(form, compiled)
    how = "neurons lit again in the backward pass"
    if form == "reference":
        how = f"activations {'recomputed' if network.recompute else 'kept'}, {kept / 2**30:.1f} GiB if kept"
    bits = config.low_precision.optimizer_bits
    assert bits is not None, "the configuration is resolved before it gets here"
    optimizer = optim.build_optimizer(network.parameters(), config.training, bits)
    return (
        network,
        optimizer,
        {
            "bdh.device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "bdh.precision": runs.prepare(network, model.PROJECTIONS, optimizer),
            "bdh.optimizer": optim.described(list(network.parameters()), bits),
            "bdh.layer_form": f"{form} ({why_form}; {how})",
            "bdh.compiled": f"{'yes' if compiled else 'no'} ({why})",
        },
    )


def _load_warm(network: BDH, origin: Origin) -> None:
    assert origin.found is not None
    weights = checkpoint.published_weights(origin.found.state)
    assert weights is not None, "checked when the target was resolved"
    own = network.state_dict()
    given = {key: value for key, value in weights.items() if key != "attn.freqs"}
    wrong = [f"{key}: the file has no such weight" for key in own if key not in given]
    wrong += [f"{key}: unknown weight" for key in given if key not in own]
    wrong += [
        f"{key}: shape {tuple(given[key].shape)}, config says {tuple(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    if wrong:
        raise ResumeError("\n  ".join([f"cannot start from {origin.found.path}: its weights do not fit the model section", *wrong]))
    network.load_published(given)


def _introduce(
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


def _headline(
    network: BDH,
    config: Config,
    text: ParquetText,
    facts: Mapping[str, str],
    tracker: Tracker,
    door: tracking.Door,
    origin: Origin,
    segment: int,
) -> str:
    parameters = sum(p.numel() for p in network.parameters())
    tokens = config.training.batch_size * config.training.block_size * config.training.gradient_accumulation_steps
    identity, uri = tracker.identity, journal.masked(door.tracking_uri)
    lines = [
        f"BDH with {parameters / 1e6:.2f} M parameters, {tokens:,} tokens a step; {facts['bdh.precision']}; {facts['bdh.optimizer']}",
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


def _sampler(network: BDH, validation: list[torch.Tensor], seed: int, device: torch.device) -> Callable[[Callable[[], bool]], list[Sample]]:
    """Continues pieces of the validation text, always the same with the same random numbers, so that the samples of a run compare."""
    if not validation:
        return lambda stopped: []
    prompts = torch.cat(validation)[:PROMPTS, 1 : PROMPT_BYTES + 1].long().to(device)  # windows lie in random order

    def samples(stopped: Callable[[], bool]) -> list[Sample]:
        generator = torch.Generator(device).manual_seed(seed)
        training = network.training
        network.eval()
        written = []
        for tokens in network.stream(prompts, SAMPLE_BYTES, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, generator=generator):
            if stopped():
                break
            written.append(tokens)
        network.train(training)
        if stopped():
            return []
        texts = torch.cat(written, dim=1).tolist()
        return [Sample(tokenizer.decode(p), tokenizer.decode(text)) for p, text in zip(prompts.tolist(), texts, strict=True)]

    return samples


def _shown(batches: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
    """debug: the first window of the first batch, as text."""
    first = next(batches)
    progress.note(f"first window of {tuple(first.tokens.shape)}:\n{tokenizer.decode(first.tokens[0].tolist())}")
    yield from itertools.chain([first], batches)


def _versions() -> dict[str, str]:
    names = ("torch", "mlflow", "bitsandbytes", "torchao", "pyarrow", "numpy")
    found = {"bdh-mlflow": __version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def _anomalies(wanted: bool) -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(True) if wanted else contextlib.nullcontext():
        yield
