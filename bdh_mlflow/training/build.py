"""The parts of a training run, built from a configuration: data, network, optimizer, sampler, and the trainer over them.

Everything that can be refused is refused here, before a run begins: the configuration, the data with its first batch, the weights.
"""

import itertools
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bdh_mlflow.config import Config
from bdh_mlflow.data import order, validation
from bdh_mlflow.data.order import Batch, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.distributed import ALONE, World
from bdh_mlflow.errors import ResumeError
from bdh_mlflow.model import bdh, native, precision
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.model.sampling import Sampler
from bdh_mlflow.text import Sample
from bdh_mlflow.training import optim, strategy
from bdh_mlflow.training.agreement import refuse_differences
from bdh_mlflow.training.average import WeightAverage
from bdh_mlflow.training.carry import Carry
from bdh_mlflow.training.clipping import Clipping
from bdh_mlflow.training.corpus import open_together
from bdh_mlflow.training.origin import Origin, Settled, load_warm, position_of
from bdh_mlflow.training.parts import Parts, Progress, Saver, Stream, Tracker
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.trainer import Trainer
from bdh_mlflow.vocabulary import Tokenizer

PROMPTS, PROMPT_TOKENS = 3, 48  # pieces of validation text that samples continue
SAMPLE_TOKENS = 128  # written for each
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50


Begin = Callable[[BDH], None]


@dataclass(frozen=True, kw_only=True)
class Built:
    """Everything that a run needs before it begins.

    config: resolved.   reads_on: whether batches begin where the checkpoint's ended.   facts: tags that say how the network and its
    optimizer are computed.
    """

    config: Config
    origin: Origin
    device: torch.device
    runs: Precision
    text: ParquetText
    batches: Iterator[Batch]
    reads_on: bool
    validation: list[torch.Tensor]
    network: BDH
    optimizer: torch.optim.Optimizer
    facts: dict[str, str]
    world: World


def build(settled: Settled, progress: Progress, world: World) -> Built:
    """Everything up to the first batch, on each rank.   Raises InputError for whatever configuration, machine or data do not allow."""
    config, origin = settled.config, settled.origin
    device = precision.pick_device(config.training.device)
    refuse_differences(config, world)
    runs = Precision.from_config(config, device)
    text = open_together(config, settled.tokenizer, progress, world)
    position = position_of(origin, config, text, progress)
    batches = build_batches(config, text, position, device, world)
    training = config.training
    windows = validation.drawn(text, training.test_iters, training.batch_size, training.block_size)

    def begin(network: BDH) -> None:
        if origin.kind == "warm":
            load_warm(network, origin)
        elif origin.made is not None:
            network.load_state_dict(origin.made.weights)

    torch.manual_seed(training.seed)
    network, optimizer, facts = build_network(config, settled.why, runs, device, world, begin)
    return Built(
        config=config,
        origin=origin,
        device=device,
        runs=runs,
        text=text,
        batches=showing_first(batches, text.tokenizer, progress) if training.debug else batches,
        reads_on=position is not None,
        validation=windows,
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
        clip=Clipping(held.clip, config.training.grad_clip, config.training.grad_clip_z),
        schedule=optim.LearningRate(config.training.learning_rate, config.scheduler),
        scaler=built.runs.scaler(),
        autocast=built.runs.autocast,
        formats=built.runs,
        device=built.device,
        batches=built.batches,
        validation=built.validation,
        samples=build_sampler(
            built.network, built.text.tokenizer, built.validation if world.rank == 0 else [], config.training.seed, built.device
        ),
        bytes_per_token=built.text.bytes_per_token(built.validation),
        observed=lambda: built.network.observed(world.sum_exact),
        analyze=_analyses(built, tracker, progress),
        peak_tokens_per_s=_peak_flops(built) / bdh.useful_flops(built.network.config, config.training.block_size),
        average=WeightAverage(built.network, config.training.ema_decay) if config.training.ema_decay else None,
        **_carrying(built),
        saver=saver,
        tracker=tracker,
        progress=progress,
        stop=stop,
        world=world,
    )
    trainer = Trainer(parts, config.training)
    if (state := built.origin.state) is not None:
        if built.reads_on and config.training.carry_state and "carried_state" not in state:
            raise ResumeError("the checkpoint holds no carried_state, without which its rows cannot read on")
        trainer.load_state_dict(state if built.reads_on else {**state, "carried_state": {}})
        for group in built.optimizer.param_groups:  # a fork may decay otherwise than the state it was loaded from
            group["weight_decay"] = config.training.weight_decay
            if "betas" in group:
                group["betas"] = tuple(config.training.betas)
    return trainer


def _carrying(built: Built) -> dict[str, Any]:
    """The parts of a training whose rows read on."""
    training = built.config.training
    if not training.carry_state:
        return {}
    carry = Carry(built.network.initial_state, training.batch_size, training.gradient_accumulation_steps, built.world)
    windows = validation.stream(built.text, training.test_iters, training.batch_size, training.block_size)
    return {"carry": carry, "stream": Stream(windows, built.text.bytes_per_token(windows)) if windows else None}


def _analyses(built: Built, tracker: Tracker, progress: Progress) -> Callable[[int], None] | None:
    """What looks at the network on the way; None where nothing does, as on every rank but 0."""
    freq = built.config.tracking.analyze_freq
    if not freq or built.world.rank:
        return None
    from bdh_mlflow.training.analyses import Analyses  # matplotlib and networkx take a second to import

    return Analyses((built.network, built.text.tokenizer, built.validation), freq, tracker, progress)


def build_batches(
    config: Config, text: ParquetText, position: order.Position | None, device: torch.device, world: World
) -> Iterator[Batch]:
    """Training batches of this process from a position on; the first one is read now, so that unreadable data fails here."""
    training = config.training
    passes, lanes = training.gradient_accumulation_steps, config.dataset.max_cached_files
    plan = order.Order(
        lanes, training.batch_size, training.block_size, training.seed, passes, world.passes(passes), consecutive=training.carry_state
    )
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
    network.detach_state = training.detach_state
    network.use(training.layer_form, training.compile)
    if sharded := is_sharded(config, world):
        strategy.shard(network, world, device)
    projections = [network.get_parameter(name) for name in bdh.PROJECTIONS] if training.optimizer == "muon" else []
    optimizer = optim.build_optimizer(network.parameters(), training, bits, projections)
    form_why, compile_why = (why.get(f"training.{key}", "as configured") for key in ("layer_form", "compile"))
    in_cpp, passes = native.serving(runs.dtype, device) if training.layer_form == "blocked" else (None, "PyTorch")
    if in_cpp and training.compile:
        compile_why = "blocked layers on a CPU have their elementwise passes in C++"
    facts = {
        "bdh.device": _device_name(device),
        "bdh.precision": runs.prepare(network, bdh.PROJECTIONS, optimizer),
        "bdh.optimizer": optim.described(list(network.parameters()), bits, projections),
        "bdh.layer_form": f"{training.layer_form} ({form_why}; {_activations(config, why)})",
        "bdh.passes": passes,
        "bdh.carried_state": _carried_bytes(config) if training.carry_state else "none",
        "bdh.strategy": f"FSDP2, {world.size} shares" if sharded else "every process holds everything",
        "bdh.compiled": f"{'yes' if training.compile and not in_cpp else 'no'} ({compile_why})",
    }
    return network, optimizer, facts


def _carried_bytes(config: Config) -> str:
    training, model = config.training, config.model
    rows = training.batch_size * training.gradient_accumulation_steps
    size = 4 * rows * model.n_layer * model.n_head * config.neurons * model.n_embd
    return f"{rows} rows, {size / 2**20:,.0f} MiB in memory and in each checkpoint"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or "cpu" if device.type == "cpu" else f"{device.type}, {platform.processor() or platform.machine()}"


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
    network: BDH, tokenizer: Tokenizer, validation: list[torch.Tensor], seed: int, device: torch.device
) -> Callable[[Callable[[], bool]], list[Sample]]:
    """Continues always the same pieces of the validation text with the same random numbers, so that the samples of a run are comparable."""
    if not validation:
        return lambda stopped: []
    prompts = torch.cat(validation)[:PROMPTS, 1 : PROMPT_TOKENS + 1].long().to(device)  # windows lie in random order

    def samples(stopped: Callable[[], bool]) -> list[Sample]:
        generator = torch.Generator(device).manual_seed(seed)
        training = network.training
        network.eval()
        written = []
        for tokens in network.stream(prompts, SAMPLE_TOKENS, Sampler(SAMPLE_TEMPERATURE, SAMPLE_TOP_K), generator=generator):
            if stopped():
                break
            written.append(tokens)
        network.train(training)
        if stopped():
            return []
        texts = torch.cat(written, dim=1).tolist()
        return [Sample(tokenizer.decode(p), tokenizer.decode(text)) for p, text in zip(prompts.tolist(), texts, strict=True)]

    return samples


def showing_first(batches: Iterator[Batch], tokenizer: Tokenizer, progress: Progress) -> Iterator[Batch]:
    """debug: the first window of the first batch, as text."""
    first = next(batches)
    progress.note(f"first window of {tuple(first.tokens.shape)}:\n{tokenizer.decode(first.tokens[0].tolist())}")
    yield from itertools.chain([first], batches)
