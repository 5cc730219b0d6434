"""The parts of a training, built from a resolved configuration: text, batches, network, optimizer, samples."""

import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from bdh_mlflow.config import Config, Problem
from bdh_mlflow.data import order, prepare
from bdh_mlflow.data.order import Batch, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.model import bdh, precision
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.text import Sample, decode
from bdh_mlflow.training import optim
from bdh_mlflow.training.trainer import Progress

PROMPTS, PROMPT_BYTES = 3, 48  # pieces of validation text that samples continue
SAMPLE_BYTES = 128  # written for each
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50


def problems(config: Config) -> Iterable[Problem]:
    """Configured number formats, optimizer and compilation that this machine or these versions cannot do."""
    yield from optim.problems(config)
    yield from precision.problems(config)


def open_text(config: Config, progress: Progress) -> ParquetText:
    """The data, built from its source first if the folder is missing or empty."""
    folder, source = Path(config.dataset.parquet_dir), config.dataset.source
    if source is not None and not (folder.is_dir() and any(folder.iterdir())):
        progress.note(f"{folder} is empty: preparing it from {source}")
        done = prepare.prepare(source, folder, config.dataset.text_column)
        progress.note(f"prepared {done.documents:,} documents, {done.bytes / 1e6:.1f} MB of text")
    return ParquetText(config.dataset)


def build_batches(config: Config, text: ParquetText, position: order.Position | None, device: torch.device) -> Iterator[Batch]:
    """Training batches from a position on; the first one is read now, so that unreadable data fails here."""
    batches = TrainingBatches(
        text,
        lanes=config.dataset.max_cached_files,
        batch_size=config.training.batch_size,
        block_size=config.training.block_size,
        seed=config.training.seed,
        position=position,
    )
    loaded = order.training_loader(batches, config.dataloader, device.type == "cuda")
    return itertools.chain([next(loaded)], loaded)


def build_network(
    config: Config, why: Mapping[str, str], runs: Precision, device: torch.device
) -> tuple[BDH, torch.optim.Optimizer, dict[str, str]]:
    """The network on its device, its optimizer, and how both are computed, as tags.   config, why: resolved."""
    training, bits = config.training, config.low_precision.optimizer_bits
    assert bits is not None, "the configuration is resolved before it gets here"
    assert training.layer_form != "auto"
    assert isinstance(training.compile, bool)
    assert isinstance(training.recompute, bool)
    network = BDH(config.to_bdh_config()).to(device)
    network.recompute = training.recompute
    network.use(training.layer_form, training.compile)
    optimizer = optim.build_optimizer(network.parameters(), training, bits)
    form_why, compile_why = (why.get(f"training.{key}", "as configured") for key in ("layer_form", "compile"))
    facts = {
        "bdh.device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "bdh.precision": runs.prepare(network, bdh.PROJECTIONS, optimizer),
        "bdh.optimizer": optim.described(list(network.parameters()), bits),
        "bdh.layer_form": f"{training.layer_form} ({form_why}; {_activations(config, why)})",
        "bdh.compiled": f"{'yes' if training.compile else 'no'} ({compile_why})",
    }
    return network, optimizer, facts


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
        for tokens in network.stream(prompts, SAMPLE_BYTES, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, generator=generator):
            if stopped():
                break
            written.append(tokens)
        network.train(training)
        if stopped():
            return []
        texts = torch.cat(written, dim=1).tolist()
        return [Sample(decode(p), decode(text)) for p, text in zip(prompts.tolist(), texts, strict=True)]

    return samples


def shown(batches: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
    """debug: the first window of the first batch, as text."""
    first = next(batches)
    progress.note(f"first window of {tuple(first.tokens.shape)}:\n{decode(first.tokens[0].tolist())}")
    yield from itertools.chain([first], batches)
