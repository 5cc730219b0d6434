"""Export of a model to one safetensors file: plain float32 weights or packed 4-bit ones, and a header with all that is needed to run it.

A safetensors file opens without unpickling anything. Tensors have the published names; a projection packed in 4 bits is its codes under
that name and bitsandbytes' own quantisation state beside it (`encoder.absmax`, ...), as Hugging Face stores them. The header holds the
configuration, step and validation loss, the tokenizer's file where tokens are not bytes, and a sha256 of header and tensors. Knows neither
MLflow nor the training loop.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdh_mlflow import __version__, checkpoint
from bdh_mlflow.config import Config
from bdh_mlflow.errors import BdhError, CheckpointError, InputError, SaveError
from bdh_mlflow.files import reason_of, shown, target_of
from bdh_mlflow.model import fourbit
from bdh_mlflow.model.bdh import BDH, PROJECTIONS
from bdh_mlflow.model.rope import FREQUENCIES
from bdh_mlflow.tracking.resolved import ResolvedCheckpoint
from bdh_mlflow.vocabulary import BYTES, Tokenizer, of_content
from bdh_mlflow.vocabulary.find import find

SUFFIX = ".safetensors"
HEADER, DIGEST, TOKENIZER = "bdh_mlflow", "sha256", "tokenizer"
Format = Literal["4bit", "safetensors"]


@dataclass(frozen=True)
class ExportResult:
    """What `write` wrote.   bits: of a quantised weight on average, its scales included; None for a plain file."""

    path: Path
    bytes: int
    bits: float | None


@dataclass(frozen=True)
class ExportedModel:
    """What `read` read.   weights: by published name, float32.   rounded: projections have 4-bit values already."""

    config: Config
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    step: int
    val_loss: float | None
    rounded: bool


@dataclass(frozen=True)
class Source:
    """A checkpoint to export.   config, tokenizer: its own.   val_loss: nats per token, None if it was not evaluated."""

    weights: Mapping[str, Tensor]
    step: int
    config: Config
    tokenizer: Tokenizer
    val_loss: float | None

    @classmethod
    def of(cls, found: ResolvedCheckpoint, average: bool = False) -> "Source":
        """What a target stands for.   average: of the weights, instead of them.

        Raises InputError for weights without a configuration or an average, ConfigError without its tokenizer.
        """
        own = found.config()
        assert found.checkpoint is not None, "it has a configuration"
        manifest = found.checkpoint.manifest
        tokenizer = find(own.tokenizer, found.path.parent)
        return cls(weights_of(found, average), manifest.step, own, tokenizer, None if average else manifest.val_loss)


def weights_of(found: ResolvedCheckpoint, average: bool) -> dict[str, Tensor]:
    """The weights of a checkpoint, or their moving average.   Raises InputError where none was kept."""
    if not average:
        weights: dict[str, Tensor] = found.state["model_state_dict"]
        return weights
    if not (kept := found.state.get("ema_state_dict")):
        raise InputError(f"{found.path}: holds no average of the weights; training.ema_decay keeps one")
    return {**found.state["model_state_dict"], **kept}  # what is no parameter has no average


def write(path: Path, source: Source, kind: Format) -> ExportResult:
    """Export a checkpoint's contents; an older file is replaced only by a complete one.   Raises SaveError."""
    config = source.config
    tensors: dict[str, Tensor] = {}
    quantised = packed = 0
    for name, weight in source.weights.items():
        if kind == "4bit" and name in PROJECTIONS:
            formats = config.low_precision
            parts = fourbit.pack_4bit(weight.float(), formats.quantization_type, formats.use_double_quant)
            tensors |= {f"{name}.{part}" if part else name: t for part, t in parts.items()}
            quantised += weight.numel()
            packed += sum(t.numel() * t.element_size() for t in parts.values())
        else:
            tensors[name] = weight.float().contiguous()
    facts = {"format": kind, "version": __version__, "config": config.to_dict(), "step": source.step, "val_loss": source.val_loss}
    header = json.dumps(facts, sort_keys=True)
    metadata = {HEADER: header, DIGEST: digest(header, tensors)}
    if source.tokenizer.content is not None:  # its own digest is in the configuration
        metadata[TOKENIZER] = base64.b64encode(source.tokenizer.content).decode()
    save_whole(path, tensors, metadata)
    return ExportResult(path, path.stat().st_size, 8 * packed / quantised if quantised else None)


def read_whole(path: Path, header: str, foreign: str, other: str, remedy: str = "") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of `save_whole` whose metadata hold `header` and the DIGEST of header and tensors.

    Raises CheckpointError for what is damaged, and for other files.   foreign, other: what a file without the header is, and one of another
    format, in words.   remedy: behind what is said of a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if header not in metadata:
                raise CheckpointError(f"{path}: {foreign}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or {other}: {error}") from None
    if digest(metadata[header], tensors) != metadata.get(DIGEST):
        raise CheckpointError(f"{path}: damaged: its contents are not what was written (sha256 differs){remedy}")
    return metadata, tensors


def save_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; an older one is replaced only by a complete one.   Raises SaveError."""
    partial = None
    try:
        target = target_of(path)
        partial = target.with_name(target.name + ".partial")
        save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise SaveError(f"{shown(path)}: not written: {reason_of(error)}") from error


def read(path: Path) -> ExportedModel:
    """The model in a file that `write` wrote.   Raises CheckpointError for any other file, and for a damaged one."""
    foreign = "not exported by bdh-mlflow (its header does not say how to run it); accepted: a file written by export"
    metadata, tensors = read_whole(path, HEADER, foreign, "not a safetensors file", ". Export it again")
    try:
        facts = json.loads(metadata[HEADER])
        config = Config.from_saved(facts["config"], path, facts["version"])
        tokenizer = _tokenizer(config, metadata, path)
    except (BdhError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not written by this version of bdh-mlflow ({__version__}), nor readable by it: {error}") from None
    with torch.device("meta"):
        own = {name: t.shape for name, t in BDH(config.to_bdh_config()).state_dict().items()}
    weights, missing = {}, []
    for name, size in own.items():
        parts = {key.removeprefix(name).removeprefix("."): t for key, t in tensors.items() if key == name or key.startswith(f"{name}.")}
        packed = facts["format"] == "4bit" and name in PROJECTIONS
        weight = fourbit.unpack_4bit(parts) if packed and parts else tensors.get(name)
        if weight is None and name == FREQUENCIES:  # files of earlier versions
            continue
        if weight is None or weight.numel() != size.numel() or (not packed and weight.shape != size):
            missing.append(f"{name}: {'missing' if weight is None else tuple(weight.shape)}, the configuration says {tuple(size)}")
        else:
            weights[name] = weight.reshape(size)
    if missing:
        raise CheckpointError("\n  ".join([f"{path}: of another architecture than its configuration", *missing]))
    return ExportedModel(config, tokenizer, weights, facts["step"], facts["val_loss"], facts["format"] == "4bit")


def _tokenizer(config: Config, metadata: Mapping[str, str], path: Path) -> Tokenizer:
    """The one in a file's header.   Raises KeyError, ValueError or ConfigError."""
    settings = config.tokenizer
    if settings.type == "byte":
        return BYTES
    tokenizer = of_content(settings.type, base64.b64decode(metadata[TOKENIZER]), settings.separator, f"{path} (its tokenizer)")
    if tokenizer.digest != settings.digest:
        raise ValueError("its tokenizer is damaged")
    return tokenizer


def default_path(saved: checkpoint.Checkpoint, kind: Format) -> Path:
    """Next to the checkpoint: `checkpoint_500.4bit.safetensors` or `checkpoint_500.safetensors`."""
    return saved.path.with_suffix(f".4bit{SUFFIX}" if kind == "4bit" else SUFFIX)


def runnable(exported: ExportedModel) -> Config:
    """The configuration to run a file with: 4-bit values are not quantised again, and FP8 is off, as its scales are not in the file."""
    formats = exported.config.low_precision
    formats = dataclasses.replace(formats, use_4bit=formats.use_4bit and not exported.rounded, use_fp8=False)
    fp8 = dataclasses.replace(exported.config.fp8, emulate=False)
    return dataclasses.replace(exported.config, low_precision=formats, fp8=fp8)


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the header and every tensor's name, dtype, shape and bytes."""
    sha256 = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        sha256.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha256.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
