"""What a run is: every setting, its default, its meaning and its limits, settled before anything is built.

Sections are frozen dataclasses validated by pydantic; YAML and `section.key=value` overrides go in, one resolved `Config` comes out, and
every problem is reported at once with its path, what was found, what is accepted and the nearest known name. Knows neither torch nor
mlflow: what this machine can do is checked by callers who pass their own `checks` to `Config.from_yaml`.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bdh_mlflow import tokenizer
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.journal import masked


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
    vocab_size: Annotated[Int, Field(ge=tokenizer.VOCAB_SIZE)] = 256
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


class Problem(NamedTuple):
    """One thing wrong with a configuration: the dotted key (empty for the whole file) and a sentence."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class Difference(NamedTuple):
    """A setting that two configurations disagree on."""

    key: str
    before: Any
    after: Any


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


class Clash(NamedTuple):
    """Two settings that cannot both be carried out: the second is reported with what to do."""

    key: str
    value: Any
    other: str
    values: tuple[Any, ...]
    remedy: str


CLASHES = (
    Clash("low_precision.use_fp8", True, "low_precision.use_4bit", (True,), "each decides what the weights are; set one of them to false"),
    Clash("low_precision.use_fp8", True, "low_precision.compute_dtype", ("float16",), "FP8 has scales of its own; set it to bfloat16"),
    Clash("low_precision.use_fp8", True, "training.layer_form", ("blocked",), "FP8 runs in the reference form; set it to auto"),
    Clash("low_precision.use_fp8", True, "training.compile", (True,), "delayed scaling is not traced by torch.compile; set it to auto"),
    Clash("fp8.emulate", True, "low_precision.use_fp8", (False,), "there is nothing to emulate; set it to true, or fp8.emulate to false"),
    Clash(
        "low_precision.use_4bit_optimizer", True, "low_precision.optimizer_bits", (32, 8), "set one of them; null leaves it to the other"
    ),
)
"""Every other combination of number formats, layer form and compilation works."""

Check = Callable[["Config"], Iterable[Problem]]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Config:
    """A run, resolved: every setting has its value."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    dataloader: DataLoaderConfig = dataclasses.field(default_factory=DataLoaderConfig)
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    low_precision: LowPrecisionConfig = dataclasses.field(default_factory=LowPrecisionConfig)
    fp8: Fp8Config = dataclasses.field(default_factory=Fp8Config)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), checks: Sequence[Check] = ()) -> "Config":
        """Read a YAML file, apply `section.key=value` overrides, validate, and fill in every default.

        checks: further rules, for what this file alone cannot tell (the hardware, say). Raises ConfigError with every problem found.
        """
        tree = _read(Path(path))
        return cls.from_dict(tree, overrides, checks, origin=str(path))

    @classmethod
    def from_dict(
        cls, tree: Mapping[str, Any], overrides: Sequence[str] = (), checks: Sequence[Check] = (), origin: str = "config"
    ) -> "Config":
        """The same from a nested mapping; `origin` heads the error message."""
        problems: list[Problem] = []
        merged = _with_overrides(tree, overrides, problems)
        config = _validated(merged, problems)
        faulty = {p.key for p in problems}
        for check in (_consistency, *checks):
            problems += [p for p in check(config) if p.key not in faulty]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ConfigError("\n  ".join([f"{origin}: {count}", *map(str, problems)]))
        return config

    def resolved(self, continued: "Config | None" = None) -> "Config":
        """Settings that another one decides are given their value, so that the saved file says everything.

        continued: the configuration of the run that is resumed. Its decay_steps stays, so a longer run does not bend the schedule, and so
        does its layer_form, which `auto` leaves to the device otherwise.
        """
        training, scheduler, formats = self.training, self.scheduler, self.low_precision
        if continued and training.layer_form == "auto":
            training = dataclasses.replace(training, layer_form=continued.training.layer_form)
        if scheduler.decay_steps is None:
            own = max(training.max_iters, scheduler.warmup_steps + 1)
            scheduler = dataclasses.replace(scheduler, decay_steps=continued.scheduler.decay_steps if continued else own)
        bits = formats.optimizer_bits or (4 if formats.use_4bit_optimizer else 32)
        formats = dataclasses.replace(formats, optimizer_bits=bits, use_4bit_optimizer=bits == 4)
        return dataclasses.replace(self, training=training, scheduler=scheduler, low_precision=formats)

    def to_bdh_config(self) -> "BDHConfig":
        """The network's own configuration, in the published form."""
        return BDHConfig(**dataclasses.asdict(self.model))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, section by section."""
        return {section.name: dataclasses.asdict(getattr(self, section.name)) for section in dataclasses.fields(self)}

    def flat(self) -> dict[str, Any]:
        """Every setting under its dotted key, tags one by one."""
        return dict(_leaves(self.to_dict()))

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def digest(self) -> str:
        """First 16 hex digits of the sha256 of all settings."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, later: "Config") -> list[Difference]:
        """Settings whose value in `later` is another one, in the order of the sections."""
        before, after = self.flat(), later.flat()
        keys = [*before, *(key for key in after if key not in before)]
        return [Difference(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


@dataclasses.dataclass
class BDHConfig:
    """The published configuration of the network (pathwaycom/bdh, bdh.py)."""

    n_layer: int = 6
    n_embd: int = 256
    dropout: float = 0.1
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256


SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}


def changes_trajectory(difference: Difference, config: Config) -> bool:
    """Whether a resumed run with this difference would no longer follow the run it continues.

    A plateau schedule listens to the evaluations, so there their cadence and size matter too.
    """
    if config.scheduler.type == "plateau" and difference.key in ("training.test_freq", "training.test_iters"):
        return True
    return difference.key not in HARMLESS and not difference.key.startswith("tracking.tags.")


def documentation() -> list[tuple[str, str, str, str]]:
    """Every setting as (dotted key, default, accepted values, meaning): the README's table."""
    rows = []
    for name, section in SECTIONS.items():
        for key, field in section.__pydantic_fields__.items():
            default = dataclasses.asdict(section())[key]
            rows.append((f"{name}.{key}", _yaml_scalar(default), _accepted(section, key), field.description or ""))
    return rows


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# A date is text here: `run_name: 2025-11-08`.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()}){hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML file: {error}") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections ({', '.join(SECTIONS)}), found {_found(tree)}")
    return tree


def _with_overrides(tree: Mapping[str, Any], overrides: Sequence[str], problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """A copy of the tree with the overrides written into it; what has no place in it becomes a problem."""
    merged: dict[str, dict[str, Any]] = {}
    for name, section in tree.items():
        if name not in SECTIONS:
            problems.append(Problem(str(name), f"unknown section{_nearest(str(name), SECTIONS)}"))
        elif section is not None and not isinstance(section, Mapping):
            problems.append(Problem(name, f"expected settings below it, found {_found(section)}"))
        else:
            merged[name] = dict(section or {})
    for override in overrides:
        path, equals, text = override.partition("=")
        name, dot, key = path.strip().partition(".")
        if not equals or not dot or not key:
            problems.append(Problem(override, "expected section.key=value"))
        elif name not in SECTIONS:
            problems.append(Problem(path, f"unknown section{_nearest(name, SECTIONS)}"))
        else:
            try:
                value = yaml.load(text, _Loader)
            except yaml.YAMLError:
                value = text
            field = SECTIONS[name].__pydantic_fields__.get(key)
            if field is not None and value is not None and _accepted(SECTIONS[name], key).startswith("text"):
                value = text  # 2024_01 and 007 are not numbers where text is meant
            section = merged.setdefault(name, {})
            mapping, dot, entry = key.partition(".")
            if dot and isinstance(section.get(mapping, {}), Mapping):
                section[mapping] = {**section.get(mapping, {}), entry: text}
            else:
                section[key] = value
    return merged


def _validated(tree: Mapping[str, dict[str, Any]], problems: list[Problem]) -> Config:
    """A configuration from the sound part of the tree; each unsound setting becomes a problem and keeps its default."""
    sections = {}
    for name, section in SECTIONS.items():
        values = dict(tree.get(name, {}))
        adapter = TypeAdapter(section)
        for key in [k for k in values if not isinstance(k, str)]:
            problems.append(Problem(f"{name}.{key}", f"unknown key{_nearest(str(key), section.__pydantic_fields__)}"))
            del values[key]
        try:
            sections[name] = adapter.validate_python(values)
        except ValidationError as error:
            for key in dict.fromkeys(str(e["loc"][0]) for e in error.errors()):
                problems.append(Problem(f"{name}.{key}", _explain(section, key, values[key])))
                del values[key]
            sections[name] = adapter.validate_python(values)
    return Config(**sections)


def _consistency(config: Config) -> Iterable[Problem]:
    """Rules between settings."""
    model, training, scheduler = config.model, config.training, config.scheduler
    d, h, m = model.n_embd, model.n_head, model.mlp_internal_dim_multiplier
    if (m * d) % (2 * h):
        fits = [k for k in range(1, 4 * m) if (k * d) % (2 * h) == 0]
        below, above = max((k for k in fits if k < m), default=None), min((k for k in fits if k > m), default=None)
        near = ", ".join(str(k) for k in (below, above) if k is not None) or "none; change n_embd or n_head"
        yield Problem(
            "model.mlp_internal_dim_multiplier",
            f"{m} * n_embd {d} is not a multiple of 2 * n_head {h} (RoPE turns neurons in pairs; nearest multipliers: {near})",
        )
    if scheduler.min_lr > training.learning_rate:
        yield Problem("scheduler.min_lr", f"{scheduler.min_lr} is above training.learning_rate {training.learning_rate}")
    if scheduler.decay_steps is not None and scheduler.decay_steps <= scheduler.warmup_steps:
        yield Problem("scheduler.decay_steps", f"{scheduler.decay_steps} is not above scheduler.warmup_steps {scheduler.warmup_steps}")
    if scheduler.type == "plateau" and config.dataset.val_fraction == 0:
        yield Problem("scheduler.type", "plateau needs validation text; dataset.val_fraction is 0")
    settings = config.flat()
    for clash in CLASHES:
        if settings[clash.key] == clash.value and settings[clash.other] in clash.values:
            found = f"{_yaml_scalar(settings[clash.other])} with {clash.key} {_yaml_scalar(clash.value)}"
            yield Problem(clash.other, f"{found} cannot be had: {clash.remedy}")
    uri = config.tracking.tracking_uri
    if uri and masked(uri) != uri:
        yield Problem(
            "tracking.tracking_uri",
            "holds a password or token, which would be copied to the run; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


def _explain(section: Any, key: str, value: object) -> str:
    if key not in section.__pydantic_fields__:
        return f"unknown key{_nearest(key, section.__pydantic_fields__)}"
    kind = typing.get_type_hints(section, include_extras=True)[key]
    known = [r.reason for r in typing.get_args(kind) if isinstance(r, Refused) and r.value == value]
    return "; ".join([f"found {_found(value)}", *known, f"accepted: {_accepted(section, key)}"])


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"


def _found(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {json.dumps(value)}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return _yaml_scalar(value)


def _yaml_scalar(value: object) -> str:
    return "null" if value is None else json.dumps(value)


def _accepted(section: Any, key: str) -> str:
    """What a setting accepts, in words, from its declared type."""
    return _describe(typing.get_type_hints(section, include_extras=True)[key])


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_describe(a) for a in args)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is Annotated:
        limits = [words for bound in args[1:] for words in _limits(bound)]
        return " ".join([_describe(args[0]), *([" and ".join(limits)] if limits else [])])
    if origin is dict:
        return "mapping of text to text"
    return {int: "whole number", float: "number", str: "text", bool: "true | false", types.NoneType: "null"}[kind]


def _limits(bound: Any) -> Iterable[str]:
    for metadata in getattr(bound, "metadata", ()):
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if hasattr(metadata, attribute):
                yield f"{sign} {getattr(metadata, attribute)}"
        if getattr(metadata, "min_length", 0):
            yield "that is not empty"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
