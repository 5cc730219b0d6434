"""What a run is: every setting, its default, its meaning and its limits, settled before anything is built.

Sections are frozen dataclasses validated by pydantic; YAML and `section.key=value` overrides go in, one resolved `Config` comes out, and
every problem is reported at once with its path, what was found, what is accepted and the nearest known name. Knows neither torch nor
mlflow: what this machine can do is checked by callers who pass their own `checks` to `Config.from_yaml`.
"""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from bdh_mlflow.text import VOCAB_SIZE


def _not_bool(value: object) -> object:
    """YAML's `true` is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Count = Annotated[Int, Field(ge=1)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
NonNegative = Annotated[Float, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


class Refused(NamedTuple):
    """A value that somebody might well ask for, and why it is not among the accepted ones."""

    value: str
    reason: str


_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ModelConfig:
    """Shape of the network, in the published names."""

    n_layer: Count = 6
    """How often the one shared layer is applied."""
    n_embd: Count = 256
    """Width D of the residual stream."""
    dropout: Fraction = 0.1
    """Probability of silencing a neuron in training."""
    n_head: Count = 4
    """Heads H."""
    mlp_internal_dim_multiplier: Count = 128
    """Neurons over all heads, as a multiple of n_embd; N = multiplier * n_embd / n_head neurons a head."""
    vocab_size: Annotated[Int, Field(ge=VOCAB_SIZE)] = 256
    """Token ids; 256 holds every byte."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TrainingConfig:
    """The loop: batch, length, optimizer and what happens how often."""

    block_size: Count = 512
    """Tokens of context T in a training window."""
    batch_size: Count = 8
    """Windows in one forward and backward pass."""
    gradient_accumulation_steps: Count = 1
    """Passes added up into one optimizer update."""
    max_iters: Count = 3000
    """Optimizer updates in the whole run."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of AdamW."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 1337
    """Seed of weights, dropout and data order."""
    log_freq: Count = 100
    """Updates between two points of the training metrics."""
    test_freq: Count = 500
    """Updates between two evaluations on validation text."""
    test_iters: Count = 8
    """Validation batches in one evaluation, always the same ones."""
    checkpoint_freq: Count = 500
    """Updates between two checkpoints; the last update is always saved."""
    checkpoint_dir: Text = "checkpoints"
    """Folder of the run directories."""
    keep_checkpoints: Count | None = None
    """Newest checkpoints to keep besides the best one, here and in the mirror; null keeps all."""
    resume_from_checkpoint: str | None = None
    """What to continue: latest, a path, a run id, runs:/ID[/checkpoints/...], RUN:N (its step N) or an artifact URI; null: a new run."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile: auto compiles on CUDA only."""
    layer_form: Literal["auto", "blocked", "reference"] = "auto"
    """How layers are computed; blocked needs least memory, reference is as published; auto is blocked on a CPU, reference on CUDA."""
    debug: bool = False
    """Anomaly detection, the first batch decoded, nothing compiled; slow."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class SchedulerConfig:
    """Learning rate as a function of the step."""

    type: Literal["constant", "cosine", "linear", "exponential", "plateau"] = "constant"
    """Shape after warm-up."""
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
    """plateau: evaluations without improvement that are let pass before the rate is cut."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DataLoaderConfig:
    """How batches reach the loop; never which ones."""

    num_workers: Annotated[Int, Field(ge=0)] = 0
    """Worker processes; 0 reads in the training process, which is enough for bytes."""
    pin_memory: bool = True
    """Page-locked batches for faster copies to CUDA; without effect on a CPU."""
    prefetch_factor: Count = 2
    """Batches each worker prepares ahead."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DatasetConfig:
    """The text."""

    parquet_dir: Text = "data/python-stdlib"
    """Folder of parquet files, searched with its subfolders."""
    source: str | None = "python-stdlib"
    """What parquet_dir is built from when it is missing or empty: python-stdlib, or a file or folder; null = never."""
    text_column: Text = "text"
    """Column that holds the documents."""
    max_cached_files: Count = 5
    """Row groups interleaved, which is also the most that are open at once."""
    val_fraction: Fraction = 0.01
    """Share of documents kept out of training for validation; 0 switches evaluation off."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class LowPrecisionConfig:
    """Number formats."""

    use_fp8: bool = False
    """FP8 matmuls of the three projections by Transformer Engine, or emulated (fp8.emulate)."""
    use_4bit: bool = True
    """Train for 4-bit weights: encoder, encoder_v and decoder pass through 4-bit quantisation in every forward pass."""
    use_4bit_optimizer: bool = False
    """AdamW with 4-bit states; the same as optimizer_bits 4."""
    optimizer_bits: Literal[32, 8, 4] | None = None
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
    """Carry FP8 out in torch, on any device: slow, but it shows whether a run trains in FP8."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TrackingConfig:
    """What MLflow is told."""

    experiment: Text = "bdh"
    """Experiment of a new run; under `mlflow run` its --experiment-name decides."""
    run_name: str | None = None
    """Name of a new run; null lets MLflow choose."""
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    """Tags of the run."""
    tracking_uri: str | None = None
    """Tracking server or store; null = MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here."""
    mirror_checkpoints: bool = True
    """Copy every checkpoint to the run's artifacts."""
    log_system_metrics: bool = True
    """CPU, memory, disk and network use (GPU too where nvidia-ml-py is installed)."""


HARMLESS = frozenset(
    {
        "training.max_iters",
        "training.log_freq",
        "training.test_freq",
        "training.test_iters",
        "training.checkpoint_freq",
        "training.checkpoint_dir",
        "training.keep_checkpoints",
        "training.resume_from_checkpoint",
        "training.debug",
        "dataloader.num_workers",
        "dataloader.pin_memory",
        "dataloader.prefetch_factor",
        "dataset.parquet_dir",
        "dataset.source",
        "tracking.experiment",
        "tracking.run_name",
        "tracking.tracking_uri",
        "tracking.mirror_checkpoints",
        "tracking.log_system_metrics",
    }
)
"""Settings that a resumed run may change: they leave the trajectory as it was. Anything new is harmful until listed here."""


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "scheduler": SchedulerConfig,
    "dataloader": DataLoaderConfig,
    "dataset": DatasetConfig,
    "low_precision": LowPrecisionConfig,
    "fp8": Fp8Config,
    "tracking": TrackingConfig,
}
"""Sections of a configuration, in their order."""
