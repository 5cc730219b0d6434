"""The parts of a training run, built from a configuration: data, network, optimizer, sampler, and the trainer over them.

Everything that can be refused is refused here, before a run begins: the configuration, the data with its first batch, the weights.
"""

import itertools
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bdh_mlflow.config import Config, DatasetConfig
from bdh_mlflow.data import order, prepare
from bdh_mlflow.data.folder import REFUSED, held, kind_of, list_files, nearest_folder
from bdh_mlflow.data.order import Batch, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.data.remote import RemotePath, place_of
from bdh_mlflow.data.sources import PYTHON_STDLIB, listed
from bdh_mlflow.distributed import ALONE, Report, World
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import shown
from bdh_mlflow.model import bdh, native, precision
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.model.sampling import Sampler
from bdh_mlflow.text import Sample, decode, printable
from bdh_mlflow.training import optim, strategy
from bdh_mlflow.training.agreement import refuse_differences
from bdh_mlflow.training.origin import Origin, Settled, load_warm, position_of
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.trainer import Parts, Progress, Saver, Tracker, Trainer

PROMPTS, PROMPT_BYTES = 3, 48  # pieces of validation text that samples continue
SAMPLE_BYTES = 128  # written for each
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50


Begin = Callable[[BDH], None]


@dataclass(frozen=True, kw_only=True)
class Built:
    """Everything that a run needs before it begins.

    config: resolved.   facts: tags that say how the network and its optimizer are computed.
    """

    config: Config
    origin: Origin
    device: torch.device
    runs: Precision
    text: ParquetText
    batches: Iterator[Batch]
    validation: list[torch.Tensor]
    network: BDH
    optimizer: torch.optim.Optimizer
    facts: dict[str, str]
    world: World


def build(settled: Settled, progress: Progress, world: World) -> Built:
    """Everything up to the first batch, on each rank.   Raises InputError for whatever configuration, machine or data do not allow."""
    config, origin, device = settled.config, settled.origin, precision.pick_device()
    refuse_differences(config, world)
    runs = Precision.from_config(config, device)
    text = open_together(config, progress, world)
    batches = build_batches(config, text, position_of(origin, config, text, progress), device, world)
    training = config.training
    validation = text.validation_batches(training.test_iters, training.batch_size, training.block_size)

    def begin(network: BDH) -> None:
        if origin.kind == "warm":
            load_warm(network, origin)

    torch.manual_seed(training.seed)
    network, optimizer, facts = build_network(config, settled.why, runs, device, world, begin)
    return Built(
        config=config,
        origin=origin,
        device=device,
        runs=runs,
        text=text,
        batches=showing_first(batches, progress) if training.debug else batches,
        validation=validation,
        network=network,
        optimizer=optimizer,
        facts=facts,
        world=world,
    )


def _peak_flops(built: Built) -> float:
    """The fastest matrix product in the dtype of the matmuls, FLOP/s, of all processes together.

    Measured when everything else has been made ready: while a sender is importing MLflow on one of two cores it comes out too low.
    """
    built.world.gather(None)
    return sum(built.world.gather(precision.gemm_peak(built.runs.dtype, built.device)))


def build_trainer(built: Built, saver: Saver, tracker: Tracker, progress: Progress, stop: StopRequest) -> Trainer:
    """The loop over the parts, at the state of the checkpoint where there is one."""
    config, world = built.config, built.world
    held = (strategy.Sharded if is_sharded(config, world) else strategy.Replicated)(built.network, built.optimizer, world)
    parts = Parts(
        model=built.network,
        optimizer=built.optimizer,
        strategy=held,
        schedule=optim.LearningRate(config.training.learning_rate, config.scheduler),
        scaler=built.runs.scaler(),
        autocast=built.runs.autocast,
        formats=built.runs,
        device=built.device,
        batches=built.batches,
        validation=built.validation,
        samples=build_sampler(built.network, built.validation if world.rank == 0 else [], config.training.seed, built.device),
        observed=lambda: built.network.observed(world.sum_exact),
        peak_tokens_per_s=_peak_flops(built) / bdh.useful_flops(built.network.config, config.training.block_size),
        saver=saver,
        tracker=tracker,
        progress=progress,
        stop=stop,
        world=world,
    )
    trainer = Trainer(parts, config.training)
    if built.origin.state is not None:
        trainer.load_state_dict(built.origin.state)
        for group in built.optimizer.param_groups:  # a fork may decay otherwise than the state it was loaded from
            group["weight_decay"] = config.training.weight_decay
    return trainer


def open_together(config: Config, progress: Progress, world: World) -> ParquetText:
    """The data on each rank; where it is built from its source, by one process at a time.   Raises DataError where it is not the same."""
    text = None
    for turn in (world.rank == 0, world.local_rank == 0, True):
        with world.failing():
            if turn and text is None:
                text = open_text(config, progress)
        world.exchange(Report())
    assert text is not None
    for rank, digest in enumerate(world.gather(text.digest)):
        if digest != text.digest:
            raise DataError(
                f"dataset.parquet_dir: {shown(text.root)} holds other text for {world.name(rank)} (digest {digest[:12]}) than for "
                f"{world.name(world.rank)} ({text.digest[:12]}); every process must read the same files"
            )
    return text


def open_text(config: Config, progress: Progress) -> ParquetText:
    """The data, built from its source first if the folder is missing or empty.   config: resolved. Raises DataError."""
    if config.dataset.source is not None:
        _fill(config.dataset, config.dataset.source, progress)
    text = ParquetText(config.dataset, progress.note)
    if note := text.note():
        progress.note(note)
    return text


def _fill(dataset: DatasetConfig, source: str, progress: Progress) -> None:
    """Build the folder from its source, unless there is something in it.

    Raises DataError for a folder whose name looks misspelt: training on other text than meant is worse than a question.
    """
    folder = place_of(dataset.parquet_dir)
    name = shown(folder)
    if isinstance(folder, RemotePath):  # a bucket has no folders, so an empty one is none
        if list_files(folder, lambda name: False, progress.note).files:
            return
        what = "is empty"
    elif (found := kind_of(folder)) == "folder":
        if held(folder):
            return
        what = "is empty"
    elif found == "nothing":
        what = "does not exist"
        near = nearest_folder(folder, REFUSED)
        if near is not None and (folder.absolute(), source) != (Path(DatasetConfig().parquet_dir).absolute(), PYTHON_STDLIB):
            raise DataError(
                f"{name}: no such folder (dataset.parquet_dir); did you mean {shown(near)}? "
                f"To build {name} beside it, run: bdh-mlflow data prepare {shlex.join([printable(source), name])}"
            )
    else:
        return
    progress.note(f"{name} {what}: preparing it from {shown(source)} (dataset.source)")
    done = prepare.prepare(source, folder, dataset.text_column)
    progress.note(f"prepared {done.documents:,} documents, {done.bytes / 1e6:.1f} MB of text{listed(done.skipped)}")


def build_batches(
    config: Config, text: ParquetText, position: order.Position | None, device: torch.device, world: World
) -> Iterator[Batch]:
    """Training batches of this process from a position on; the first one is read now, so that unreadable data fails here."""
    training = config.training
    passes, lanes = training.gradient_accumulation_steps, config.dataset.max_cached_files
    plan = order.Order(lanes, training.batch_size, training.block_size, training.seed, passes, world.passes(passes))
    batches = TrainingBatches(text, plan, position)
    loaded = order.training_loader(batches, config.dataloader, device.type == "cuda")
    return itertools.chain([next(loaded)], loaded)


def build_network(
    config: Config, why: Mapping[str, str], runs: Precision, device: torch.device, world: World = ALONE, begin: Begin = lambda network: None
) -> tuple[BDH, torch.optim.Optimizer, dict[str, str]]:
    """The network on its device, its optimizer, and how both are computed, as tags.

    config, why: resolved.   begin: given the network with random weights, before it is divided among processes.
    """
    training, bits = config.training, config.low_precision.optimizer_bits
    assert bits is not None, "the configuration is resolved before it gets here"
    assert training.layer_form != "auto"
    assert isinstance(training.compile, bool)
    assert isinstance(training.recompute, bool)
    network = BDH(config.to_bdh_config()).to(device)
    begin(network)
    network.recompute = training.recompute
    network.use(training.layer_form, training.compile)
    if sharded := is_sharded(config, world):
        strategy.shard(network, world, device)
    optimizer = optim.build_optimizer(network.parameters(), training, bits)
    form_why, compile_why = (why.get(f"training.{key}", "as configured") for key in ("layer_form", "compile"))
    in_cpp, passes = native.serving(runs.dtype, device) if training.layer_form == "blocked" else (None, "PyTorch")
    if in_cpp and training.compile:
        compile_why = "blocked layers on a CPU have their elementwise passes in C++"
    facts = {
        "bdh.device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "bdh.precision": runs.prepare(network, bdh.PROJECTIONS, optimizer),
        "bdh.optimizer": optim.described(list(network.parameters()), bits),
        "bdh.layer_form": f"{training.layer_form} ({form_why}; {_activations(config, why)})",
        "bdh.passes": passes,
        "bdh.strategy": f"FSDP2, {world.size} shares" if sharded else "every process holds everything",
        "bdh.compiled": f"{'yes' if training.compile and not in_cpp else 'no'} ({compile_why})",
    }
    return network, optimizer, facts


def is_sharded(config: Config, world: World) -> bool:
    """Whether each process holds a share of the weights only; one process has nobody to share with."""
    return config.training.strategy == "fsdp" and world.size > 1


def _activations(config: Config, why: Mapping[str, str]) -> str:
    """What becomes of them between forward and backward pass."""
    if not config.training.recompute:
        return f"activations kept, {config.activation_bytes / 2**30:.1f} GiB"
    reason = why.get("training.recompute") if config.training.layer_form == "reference" else None
    return "activations recomputed in the backward pass" + (f": {reason}" if reason else "")


def build_sampler(
    network: BDH, validation: list[torch.Tensor], seed: int, device: torch.device
) -> Callable[[Callable[[], bool]], list[Sample]]:
    """Continues always the same pieces of the validation text with the same random numbers, so that the samples of a run are comparable."""
    if not validation:
        return lambda stopped: []
    prompts = torch.cat(validation)[:PROMPTS, 1 : PROMPT_BYTES + 1].long().to(device)  # windows lie in random order

    def samples(stopped: Callable[[], bool]) -> list[Sample]:
        generator = torch.Generator(device).manual_seed(seed)
        training = network.training
        network.eval()
        written = []
        for tokens in network.stream(prompts, SAMPLE_BYTES, Sampler(SAMPLE_TEMPERATURE, SAMPLE_TOP_K), generator=generator):
            if stopped():
                break
            written.append(tokens)
        network.train(training)
        if stopped():
            return []
        texts = torch.cat(written, dim=1).tolist()
        return [Sample(decode(p), decode(text)) for p, text in zip(prompts.tolist(), texts, strict=True)]

    return samples


def showing_first(batches: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
    """debug: the first window of the first batch, as text."""
    first = next(batches)
    progress.note(f"first window of {tuple(first.tokens.shape)}:\n{decode(first.tokens[0].tolist())}")
    yield from itertools.chain([first], batches)
