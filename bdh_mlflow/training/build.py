"""From a configuration to the first step: fresh, resumed or warm-started; every part is built here and handed to the trainer.

The order is that of trust: what can be refused is refused first (configuration, folder, checkpoint, data, one whole batch), and only
then is an MLflow run begun. Afterwards the run is told how it ended, whatever happened.
"""

import itertools
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from bdh_mlflow.config import Config, Problem
from bdh_mlflow.data import order, prepare
from bdh_mlflow.data.order import Batch, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.model import bdh, precision
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.model.sampling import Sampler
from bdh_mlflow.text import Sample, decode
from bdh_mlflow.training import optim
from bdh_mlflow.training.trainer import Progress

RECOMPUTE_ABOVE_BYTES = 2 * 2**30  # activations up to this much are kept for the backward pass
PROMPTS, PROMPT_BYTES = 3, 48  # pieces of validation text that samples continue
SAMPLE_BYTES = 128
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50


def problems(config: Config) -> Iterable[Problem]:
    """What the configuration asks of number formats, optimizer and compilation that this machine or version cannot do."""
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
    """Training batches from a position on; the first one is read now, so that what is wrong with the data shows now."""
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
    config: Config, runs: Precision, device: torch.device, form: bdh.Form, why_form: str
) -> tuple[BDH, torch.optim.Optimizer, dict[str, str]]:
    """The network on its device, its optimizer, and what was decided about how it is computed, as tags."""
    shape = config.to_bdh_config()
    network = BDH(shape).to(device)
    itemsize = runs.dtype.itemsize
    kept = bdh.activation_bytes(shape, config.training.batch_size, config.training.block_size, itemsize)
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
            "bdh.precision": runs.prepare(network, bdh.PROJECTIONS, optimizer),
            "bdh.optimizer": optim.described(list(network.parameters()), bits),
            "bdh.layer_form": f"{form} ({why_form}; {how})",
            "bdh.compiled": f"{'yes' if compiled else 'no'} ({why})",
        },
    )


def build_sampler(
    network: BDH, validation: list[torch.Tensor], seed: int, device: torch.device
) -> Callable[[Callable[[], bool]], list[Sample]]:
    """Continues pieces of the validation text, always the same with the same random numbers, so that the samples of a run compare."""
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


def shown(batches: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
    """debug: the first window of the first batch, as text."""
    first = next(batches)
    progress.note(f"first window of {tuple(first.tokens.shape)}:\n{decode(first.tokens[0].tolist())}")
    yield from itertools.chain([first], batches)
