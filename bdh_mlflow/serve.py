"""A trained run as something that answers: prompt in, text out; and its loss on text it has not seen.

Takes the targets that resume takes. The model computes as it did in training: the same number formats, 4-bit weights included.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bdh_mlflow import checkpoint, model, precision, resume, tokenizer
from bdh_mlflow.config import Config, DatasetConfig, TrackingConfig
from bdh_mlflow.data import ParquetText
from bdh_mlflow.errors import CheckpointError, InputError
from bdh_mlflow.model import BDH
from bdh_mlflow.precision import Precision
from bdh_mlflow.trainer import evaluate

LONGEST_PROMPT = 65_536  # bytes; attention over the prompt takes memory quadratic in it


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, where it came from and how it computes."""

    model: BDH
    config: Config
    path: Path
    step: int
    runs: Precision
    notes: tuple[str, ...]


def load(target: str, checkpoint_dir: Path, tracking: TrackingConfig) -> Loaded:
    """The model of a run or checkpoint (grammar of `resume`).   Raises ResumeError or CheckpointError."""
    found = resume.find(target, checkpoint_dir, tracking)
    if found.checkpoint is None or found.state.get("format") != checkpoint.FORMAT:
        raise CheckpointError(f"{found.path}: bare weights without a configuration; train from it first (a warm start)")
    device = precision.pick_device()
    config = Config.from_dict(found.state["config"], origin=f"{found.path} (its configuration)")
    network = BDH(config.to_bdh_config())
    network.load_published(found.state["model_state_dict"])
    network.to(device).eval()
    runs = Precision(device, config.low_precision)
    runs.prepare(network, model.PROJECTIONS)
    return Loaded(network, config, found.path, found.checkpoint.manifest.step, runs, found.notes)


def write(
    loaded: Loaded, prompt: str, max_new_tokens: int, temperature: float = 0.8, top_k: int | None = 50, seed: int | None = None
) -> Iterator[str]:
    """Continue a prompt, piece by piece as it is made; a character of several bytes comes when it is whole."""
    ids = tokenizer.encode(prompt) or [tokenizer.SEPARATOR]
    if len(ids) > LONGEST_PROMPT:
        raise InputError(f"prompt of {len(ids):,} bytes; at most {LONGEST_PROMPT:,} are taken")
    device = loaded.runs.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    idx = torch.tensor([ids], device=device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in loaded.model.stream(idx, max_new_tokens, temperature, top_k, generator=generator):
        piece = int(token)
        yield decoder.decode(bytes([piece])) if 0 < piece < tokenizer.VOCAB_SIZE else tokenizer.decode([piece])
    yield decoder.decode(b"", final=True)


def validation_loss(loaded: Loaded, dataset: DatasetConfig, batches: int) -> float:
    """Loss in nats per token on validation text of `dataset`.   Raises DataError."""
    training = loaded.config.training
    windows = ParquetText(dataset).validation_batches(batches, training.batch_size, training.block_size)
    if not windows:
        raise InputError("dataset.val_fraction is 0: no text is kept for validation")
    loss = evaluate(loaded.model, windows, loaded.runs.autocast, loaded.runs.device)
    assert loss is not None, "nothing asks this evaluation to stop"
    return loss
