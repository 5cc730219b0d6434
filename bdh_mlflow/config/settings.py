"""Every setting: its type, default, limits and meaning, and whether a resumed run may change it.

Sections are frozen dataclasses that pydantic validates. The declared type of a field is the only place that says what is accepted, how an
override is read, what its `Role` is, and whether it names a place on disk. A new setting needs a field here, a line in each of
configs/*.yaml, and code that reads it.
"""

import dataclasses
import enum
import functools
import posixpath
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from bdh_mlflow.text import is_storable

TAG_KEY = re.compile(r"[/\w.\- :]{1,250}")
"""Names that MLflow takes for tags; besides, they must not change when they are read as paths (mlflow.utils.validation)."""
LONGEST_TAG, LONGEST_PARAM, LONGEST_EXPERIMENT, LONGEST_RUN_NAME = 8000, 6000, 500, 250  # characters that MLflow stores


def _decimal(value: object) -> object:
    """YAML's `true` is not the number 1, and a number in another base than ten is more likely a slip than meant."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    if isinstance(value, str) and (found := re.fullmatch(r"\s*[-+]?0(?:([xob])[0-9a-f_]*|[0-9_]+)\s*", value, re.IGNORECASE)):
        base = {"x": "base 16", "o": "base 8", "b": "base 2"}.get((found[1] or "").lower())
        reason = f"a number in {base}" if base else "a number with a leading zero, which some read in base 8"
        raise ValueError(f"{reason}; write it in base 10, without the zero")
    return value


class Accepted(NamedTuple):
    """What a text may be, in words, where its type does not say it."""

    words: str


class NotEmpty(NamedTuple):
    """Marks text that must hold something. (pydantic's own min_length refuses names of files that are not UTF-8.)"""


def _something(value: str) -> str:
    """Text that every file system and process takes."""
    if not value:
        raise ValueError
    if "\0" in value:
        raise ValueError("the character NUL has no place in it")
    return value


def _name(longest: int) -> AfterValidator:
    """Text that MLflow takes as a name."""

    def check(value: str) -> str:
        if not value.strip():
            raise ValueError("a blank name")
        if not is_storable(value):
            raise ValueError("it holds bytes that are not UTF-8, or NUL, which cannot be stored")
        if len(value) > longest:
            raise ValueError(f"{len(value):,} characters; MLflow stores {longest}")
        return value

    return AfterValidator(check)


def _tags(tags: dict[str, str]) -> dict[str, str]:
    for key, value in tags.items():
        tidy = posixpath.normpath(key) == key != "." and not key.startswith(("/", ".."))
        if not (tidy and TAG_KEY.fullmatch(key)):
            raise ValueError(f"`{key[:60]}` is no name that MLflow takes for a tag: letters, digits, blanks and _ - . : /, at most 250")
        if key.startswith("bdh."):
            raise ValueError(f"`{key}`: names that begin with bdh. are set by the program")
        if not is_storable(value):
            raise ValueError(f"the value of `{key}` holds bytes that are not UTF-8, or NUL, which cannot be stored")
        if len(value) > LONGEST_PARAM:  # every setting is logged as a parameter, too
            raise ValueError(f"the value of `{key}` has {len(value):,} characters; MLflow stores {LONGEST_PARAM:,}")
    return tags


DEVICES = re.compile(r"auto|cpu|cuda(:\d{1,3})?|mps")


def _device(value: str) -> str:
    if not DEVICES.fullmatch(value):
        raise ValueError
    return value


class Place(enum.Enum):
    """What kind of place a text names: made absolute once, when a configuration is read (see `places`)."""

    PATH = "a file or folder"
    SOURCE = "a file or folder, here or in a bucket, or a word that stands for text"
    DATA = "a folder, here or in a bucket"
    STORE = "the URI of a tracking store"


Int = Annotated[int, BeforeValidator(_decimal)]
Float = Annotated[float, BeforeValidator(_decimal)]
Count = Annotated[Int, Field(ge=1)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
NonNegative = Annotated[Float, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Betas = tuple[Fraction, Fraction]
Text = Annotated[str, NotEmpty(), AfterValidator(_something)]


def _schedule(value: object) -> object:
    """The other spellings of a schedule: any case, and none for a rate that stays."""
    if value is None:
        return "constant"
    word = value.strip().lower() if isinstance(value, str) else value
    return "constant" if word in ("none", "off") else word


class Role(enum.Enum):
    """What a setting decides, and so who may change it. A field whose type names no role is TRAJECTORY."""

    FREE = "leaves the training as it was: a resumed run may change it"
    TRAJECTORY = "changes the numbers from here on: only a fork may change it"
    ORDER = "decides which text comes when: a fork that changes it reads the data from the beginning"
    SHAPE = "decides the shapes of weights or optimizer states: not even a fork may change it"


class Refused(NamedTuple):
    """A value that users may well try, and why it is not among the accepted ones."""

    value: str
    reason: str


_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ModelConfig:
    """Shape of the network, in the published names."""

    n_layer: Count = 6
    """How often the one shared layer is applied."""
    n_embd: Annotated[Count, Role.SHAPE] = 256
    """Width D of the residual stream."""
    dropout: Fraction = 0.1
    """Probability of zeroing a neuron in training; the blocked form rounds it to a multiple of 2^-16."""
    n_head: Annotated[Count, Role.SHAPE] = 4
    """Heads H."""
    mlp_internal_dim_multiplier: Annotated[Count, Role.SHAPE] = 128
    """Neurons over all heads, as a multiple of n_embd; N = multiplier * n_embd / n_head neurons a head."""
    vocab_size: Annotated[Count | None, Role.SHAPE] = 256
    """Token ids; 256 holds every byte; null: as many as the tokenizer has."""
    attention_decay: NonNegative = 0.0
    """Attention fades with distance d as exp(-attention_decay 2^(-8h/H) d) in head h of 1 to H (slopes of ALiBi); 0: it does not."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TrainingConfig:
    """The loop: batch, length, optimizer and what happens how often."""

    block_size: Annotated[Count, Role.ORDER] = 512
    """Tokens of context T in a training window."""
    batch_size: Count = 8
    """Windows in one forward and backward pass."""
    gradient_accumulation_steps: Count = 1
    """Passes added up into one optimizer update."""
    max_iters: Annotated[Count, Role.FREE] = 3000
    """Optimizer updates in the whole run."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    optimizer: Annotated[Literal["adamw", "muon"], Role.SHAPE] = "adamw"
    """adamw: for all parameters; muon: torch's Muon, scaled to AdamW, for the three projections, and adamw for the others."""
    betas: Betas = (0.9, 0.999)
    """Decay of AdamW's averages of gradients and of their squares."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    grad_clip_z: NonNegative = 0.0
    """ZClip: clip norms more than so many standard deviations above those before, too; 0 is off, 2.5 the paper's (arXiv:2504.02507)."""
    ema_decay: Fraction = 0.0
    """Decay of a moving average of the weights, which is saved, and evaluated beside them; 0 keeps none."""
    detach_state: bool = False
    """Train without backpropagation through time: no gradient reaches the tokens before."""
    carry_state: Annotated[bool, Role.ORDER] = False
    """Each row of an update reads on where it ended, with the state of what it has read, which is saved (truncated backpropagation)."""
    seed: Annotated[Int, Field(ge=0, lt=2**63), Role.ORDER] = 1337
    """Seed of weights, dropout and data order."""
    log_freq: Annotated[Count, Role.FREE] = 100
    """Updates between two points of the training metrics."""
    test_freq: Annotated[Count, Role.FREE] = 500
    """Updates between two evaluations on validation text."""
    test_iters: Annotated[Count, Role.FREE] = 8
    """Validation batches in one evaluation, always the same ones."""
    checkpoint_freq: Annotated[Count, Role.FREE] = 500
    """Updates between two checkpoints; the last update is always saved."""
    checkpoint_dir: Annotated[Text, Role.FREE, Place.PATH] = "checkpoints"
    """Folder of the run directories."""
    keep_checkpoints: Annotated[Count | None, Role.FREE] = None
    """Newest checkpoints to keep besides the best one, here and in the mirror; null keeps all."""
    resume_from_checkpoint: Annotated[Text | None, Role.FREE] = None
    """What to continue: latest, a path, a run id, runs:/ID[/checkpoints/...], RUN:N (its step N) or an artifact URI; null: a new run."""
    device: Annotated[str, Accepted("auto | cpu | cuda | cuda:N | mps"), AfterValidator(_device), Role.FREE] = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto is CUDA where there is a GPU, else the CPU; generate and evaluate always choose so."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile: auto compiles on CUDA only; blocked layers on a CPU have their passes in C++ instead."""
    layer_form: Literal["auto", "blocked", "reference"] = "auto"
    """How layers are computed; blocked needs least memory, reference is as published; auto is blocked on a CPU, reference on CUDA."""
    recompute: Annotated[Literal["auto"] | bool, Role.FREE] = "auto"
    """Recompute activations in the backward pass instead of keeping them; auto: if over half of free memory; blocked always does."""
    strategy: Annotated[Literal["auto", "ddp", "fsdp"], Role.FREE] = "auto"
    """Of several processes: ddp, each holds everything, and numbers are those of one; fsdp shares weights and states out; auto is ddp."""
    debug: Annotated[bool, Role.FREE] = False
    """Anomaly detection, the first batch decoded, nothing compiled; slow."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class SchedulerConfig:
    """Learning rate as a function of the step."""

    type: Annotated[Literal["constant", "cosine", "linear", "exponential", "plateau"], BeforeValidator(_schedule)] = "constant"
    """Shape after warm-up; none and null are constant."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """Updates in which the rate rises linearly from 0 to its peak."""
    decay_steps: Count | None = None
    """Update at which cosine and linear reach min_lr; null = max_iters of the run's first segment."""
    min_lr: NonNegative = 0.0
    """Floor of every schedule."""
    gamma: Annotated[Float, Field(gt=0, le=1)] = 0.999
    """exponential: factor applied at each update after warm-up."""
    factor: Annotated[Float, Field(gt=0, lt=1)] = 0.5
    """plateau: factor applied when validation loss stops falling."""
    patience: Annotated[Int, Field(ge=0)] = 2
    """plateau: evaluations without improvement that are tolerated before the rate is cut."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DataLoaderConfig:
    """How batches reach the loop; never which ones."""

    num_workers: Annotated[Int, Field(ge=0), Role.FREE] = 0
    """Worker processes; 0 reads in the training process, which is enough for bytes."""
    pin_memory: Annotated[bool, Role.FREE] = True
    """Page-locked batches for faster copies to CUDA; without effect on a CPU."""
    prefetch_factor: Annotated[Count, Role.FREE] = 2
    """Batches each worker prepares ahead."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DatasetConfig:
    """The text."""

    parquet_dir: Annotated[Text, Role.FREE, Place.DATA] = "data/python-stdlib"
    """Folder of parquet files, searched with its subfolders; s3://BUCKET/PREFIX, gs://, abfs:// or another URI that pyarrow opens."""
    source: Annotated[Text | None, Role.FREE, Place.SOURCE] = "auto"
    """What a missing or empty parquet_dir is built from: python-stdlib, a file, a folder; null: nothing; auto: stdlib for the default."""
    text_column: Annotated[Text, Role.ORDER] = "text"
    """Column that holds the documents."""
    max_cached_files: Annotated[Count, Role.ORDER] = 5
    """Row groups interleaved, which is also the most that are open at once."""
    val_fraction: Annotated[Fraction, Role.ORDER] = 0.01
    """Share of documents kept out of training for validation; 0 switches evaluation off."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TokenizerConfig:
    """What a token is."""

    type: Annotated[Literal["byte", "huggingface", "sentencepiece", "tiktoken"], Role.ORDER] = "byte"
    """byte: each byte is a token; else whose file holds the vocabulary: tokenizers (tokenizer.json), SentencePiece (.model), tiktoken."""
    path: Annotated[Text | None, Role.FREE, Place.PATH] = None
    """That file, or a folder that holds it; a run keeps a copy beside its checkpoints."""
    name: Annotated[Text | None, Role.FREE] = None
    """Instead of path: a repository of Hugging Face or an encoding of tiktoken, in their caches on this machine; nothing is fetched."""
    train_size: Annotated[Count | None, Role.FREE] = None
    """Tokens of the byte-level BPE that a missing path is trained to, on the training text; null: a missing path is an error."""
    separator: Annotated[Text | None, Role.ORDER] = None
    """Token between two documents; null: the one by which the tokenizer ends a text; byte: byte 0."""
    lossy: Annotated[bool, Role.FREE] = False
    """Take text that the tokenizer does not give back exactly (normalised, unknown characters), which is refused otherwise."""
    digest: Annotated[Text | None, Role.ORDER] = None
    """sha256 of the file, first 32 hex digits; null: whatever the file is, and this is what it is from then on."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class LowPrecisionConfig:
    """Number formats."""

    use_fp8: bool = False
    """FP8 matmuls of the three projections by Transformer Engine, or emulated (fp8.emulate)."""
    use_4bit: bool = True
    """Quantization-aware training: each forward pass sees encoder, encoder_v and decoder in 4 bits, gradients pass straight through."""
    use_4bit_optimizer: Annotated[bool, Role.SHAPE] = False
    """AdamW with 4-bit states; the same as optimizer_bits 4."""
    optimizer_bits: Annotated[Literal[32, 8, 4] | None, Role.SHAPE] = None
    """Bits of AdamW's states: 32 by torch, 8 by bitsandbytes, 4 by torchao; null = 4 with use_4bit_optimizer, else 32."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit format of the weights."""
    use_double_quant: bool = True
    """Quantise the block scales of the 4-bit weights as well."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the matmuls; master weights and sums stay float32."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class Fp8Config:
    """Recipe of delayed scaling for FP8."""

    format: Annotated[Literal["hybrid", "e4m3"], Refused("e5m2", "its 2 bits of mantissa are too few for weights and activations")] = (
        "hybrid"
    )
    """hybrid: e4m3 forward, e5m2 backward; e4m3: both."""
    amax_history_len: Count = 1024
    """Steps of absolute maxima that a scale is computed from."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """How a scale is computed from that history."""
    emulate: bool = False
    """Emulate FP8 in torch, on any device: slow, but it shows whether a run trains in FP8."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TrackingConfig:
    """What is sent to MLflow, and where."""

    experiment: Annotated[str, _name(LONGEST_EXPERIMENT), Role.FREE] = "bdh"
    """Experiment of a new run; under `mlflow run` its --experiment-name decides."""
    run_name: Annotated[Annotated[str, _name(LONGEST_RUN_NAME)] | None, Role.FREE] = None
    """Name of a new run; null lets MLflow choose."""
    tags: Annotated[dict[str, str], AfterValidator(_tags), Role.FREE] = dataclasses.field(default_factory=dict)
    """Tags of the run."""
    tracking_uri: Annotated[Text | None, Role.FREE, Place.STORE] = None
    """Tracking server or store; null = MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here."""
    mirror_checkpoints: Annotated[bool, Role.FREE] = True
    """Copy every checkpoint to the run's artifacts."""
    log_system_metrics: Annotated[bool, Role.FREE] = True
    """CPU, memory, disk and network use (GPU too where nvidia-ml-py is installed)."""
    analyze_freq: Annotated[Int, Field(ge=0), Role.FREE] = 0
    """Steps between analyses of the network (`bdh-mlflow analyze`: activity, repetition, graph), made while training waits; 0 = none."""


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "scheduler": SchedulerConfig,
    "dataloader": DataLoaderConfig,
    "dataset": DatasetConfig,
    "tokenizer": TokenizerConfig,
    "low_precision": LowPrecisionConfig,
    "fp8": Fp8Config,
    "tracking": TrackingConfig,
}
"""Sections of a configuration, in their order."""


def declared(section: str, key: str) -> Any:
    """The declared type of a setting with all that is annotated to it.   Raises KeyError for an unknown one."""
    return _declared(section)[key]


def role_of(dotted_key: str) -> Role:
    """What a setting decides; tags one by one are of the role of them all.   Raises KeyError for an unknown one."""
    section, _, key = dotted_key.partition(".")
    marks = typing.get_args(declared(section, key.partition(".")[0]))
    return next((mark for mark in marks if isinstance(mark, Role)), Role.TRAJECTORY)


def place_of(section: str, key: str) -> Place | None:
    """What kind of place a setting names, if it names one."""
    return next((mark for mark in typing.get_args(declared(section, key)) if isinstance(mark, Place)), None)


def takes_text(section: str, key: str) -> bool:
    """Whether a setting is text of any kind, rather than one of a few words or a number; False for an unknown one."""
    return str in _alternatives(_declared(section).get(key))


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types that a union is made of, without what is annotated to them."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        yield from _alternatives(args[0])
    elif origin in (typing.Union, types.UnionType):
        for each in args:
            yield from _alternatives(each)
    else:
        yield kind


@functools.cache
def _declared(section: str) -> Mapping[str, Any]:
    return typing.get_type_hints(SECTIONS[section], include_extras=True)
