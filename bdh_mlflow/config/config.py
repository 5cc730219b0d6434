"""What a run is: every setting with its value, settled before anything is built.

YAML and `section.key=value` overrides go in, one `Config` comes out, and every problem is reported at once with its path, what was found,
what is accepted and the nearest known name. Knows neither torch nor mlflow: what this machine can do is checked by callers who pass their
own `checks` to `Config.from_yaml`, and `resolve` settles what is left to it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bdh_mlflow import __version__
from bdh_mlflow.config.messages import Problem, entry_problems, explain, refused, yaml_scalar
from bdh_mlflow.config.places import absolute
from bdh_mlflow.config.reading import read_yaml, with_overrides
from bdh_mlflow.config.settings import (
    SECTIONS,
    DataLoaderConfig,
    DatasetConfig,
    Fp8Config,
    LowPrecisionConfig,
    ModelConfig,
    Role,
    SchedulerConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainingConfig,
    place_of,
    role_of,
)
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.files import nearest
from bdh_mlflow.redact import masked
from bdh_mlflow.text import BYTE_VALUES, is_storable, printable, storable


class Difference(NamedTuple):
    """A setting that two configurations disagree on."""

    key: str
    before: Any
    after: Any


class Incompatibility(NamedTuple):
    """A value of one setting and values of another that exclude each other; `other` is reported, with the remedy."""

    key: str
    value: Any
    other: str
    values: tuple[Any, ...]
    remedy: str


INCOMPATIBLE = tuple(
    Incompatibility(*row)
    for row in (
        ("low_precision.use_fp8", True, "low_precision.use_4bit", (True,), "each decides what the weights are; set one of them to false"),
        ("low_precision.use_fp8", True, "low_precision.compute_dtype", ("float16",), "FP8 has scales of its own; set it to bfloat16"),
        ("low_precision.use_fp8", True, "training.layer_form", ("blocked",), "FP8 runs in the reference form; set it to auto"),
        ("low_precision.use_fp8", True, "training.compile", (True,), "delayed scaling is not traced by torch.compile; set it to auto"),
        (
            "training.carry_state",
            True,
            "low_precision.compute_dtype",
            ("float16",),
            "what a state sums up outgrows its range; set it to bfloat16",
        ),
        ("training.recompute", False, "training.layer_form", ("blocked",), "this form always recomputes; set one of them to auto"),
        ("fp8.emulate", True, "low_precision.use_fp8", (False,), "there is nothing to emulate; set it to true, or fp8.emulate to false"),
        ("training.strategy", "fsdp", "low_precision.use_4bit", (True,), "quantised copies do not know shares; set it to false"),
        (
            "training.strategy",
            "fsdp",
            "low_precision.optimizer_bits",
            (8, 4),
            "their libraries do not know shares; set it to 32",
        ),
        ("training.strategy", "fsdp", "low_precision.use_4bit_optimizer", (True,), "its states do not know shares; set it to false"),
        (
            "training.strategy",
            "fsdp",
            "low_precision.compute_dtype",
            ("float16",),
            "loss scaling needs whole gradients; set it to bfloat16",
        ),
        ("training.strategy", "fsdp", "low_precision.use_fp8", (True,), "its scales follow the passes of one process; set it to false"),
        ("low_precision.use_4bit_optimizer", True, "low_precision.optimizer_bits", (32, 8), "set one of them; null leaves it to the other"),
        ("training.optimizer", "muon", "low_precision.optimizer_bits", (8, 4), "torch's Muon has states of 32 bits; set it to 32"),
        ("training.optimizer", "muon", "low_precision.use_4bit_optimizer", (True,), "torch's Muon has states of 32 bits; set it to false"),
        ("training.strategy", "fsdp", "training.optimizer", ("muon",), "it needs whole matrices; set it to adamw"),
    )
)
"""Every other combination of number formats, layer form, compilation and strategy works."""

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number in each compute_dtype."""

Check = Callable[["Config"], Iterable[Problem]]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Config:
    """A run: every setting with its value; `auto` and null are settled by `resolve`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    dataloader: DataLoaderConfig = dataclasses.field(default_factory=DataLoaderConfig)
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    low_precision: LowPrecisionConfig = dataclasses.field(default_factory=LowPrecisionConfig)
    fp8: Fp8Config = dataclasses.field(default_factory=Fp8Config)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), checks: Sequence[Check] = ()) -> "Config":
        """Read a YAML file, apply `section.key=value` overrides, validate, and fill in every default.

        checks: further rules, for what this file alone cannot tell (the hardware, say). Raises ConfigError with every problem found.
        """
        tree = read_yaml(Path(path))
        return cls.from_dict(tree, overrides, checks, origin=str(path), base=Path.cwd())

    @classmethod
    def from_dict(
        cls,
        tree: Mapping[str, Any],
        overrides: Sequence[str] = (),
        checks: Sequence[Check] = (),
        origin: str = "config",
        base: Path | None = None,
    ) -> "Config":
        """The same from a nested mapping.   origin: heads the error message.   base: folder of relative places; None leaves them so."""
        config, problems = _read(tree, overrides, checks, base)
        if problems:
            raise refused(origin, problems)
        return config

    def replaced(self, values: Mapping[str, Any]) -> "Config":
        """The same with other values, given under dotted keys: `{"training.max_iters": 5}`.   Raises ConfigError with every problem."""
        tree = self.to_dict()
        for dotted, value in values.items():
            name, _, key = dotted.partition(".")
            section = tree.setdefault(name, {})
            mapping, dot, entry = key.partition(".")
            if dot and isinstance(section.get(mapping), dict):
                section[mapping] = {**section[mapping], entry: value}
            else:
                section[key] = value
        return Config.from_dict(tree, origin="settings")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of training text that one optimizer update sees."""
        training = self.training
        return training.batch_size * training.block_size * training.gradient_accumulation_steps

    @property
    def neurons(self) -> int:
        """Neurons N of one head."""
        return self.model.mlp_internal_dim_multiplier * self.model.n_embd // self.model.n_head

    @property
    def parameters(self) -> int:
        """Trained numbers: encoder, encoder_v and decoder of H * N * D each, embedding and lm_head of V * D each."""
        model = self.model
        return (3 * model.n_head * self.neurons + 2 * self.vocab_size) * model.n_embd

    @property
    def vocab_size(self) -> int:
        """Token ids of the network.   Raises ConfigError as long as a tokenizer that was not read decides it."""
        if self.model.vocab_size is not None:
            return self.model.vocab_size
        if self.tokenizer.type == "byte":
            return BYTE_VALUES
        raise ConfigError("model.vocab_size: null follows the tokenizer, which was not read yet; write the number of its tokens instead")

    @property
    def activation_bytes(self) -> int:
        """Memory for the activations that a backward pass without recomputation keeps, in bytes.

        Counted on the reference form: eight (B, H, T, N) tensors a layer (neurons, rotated neurons, both gates, their product and masks)
        in compute_dtype.
        """
        training, heads = self.training, self.model.n_head
        each = training.batch_size * heads * training.block_size * self.neurons * ITEMSIZE[self.low_precision.compute_dtype]
        return 8 * self.model.n_layer * each

    @classmethod
    def from_saved(cls, tree: Mapping[str, Any], file: str | os.PathLike[str], written_by: str) -> "Config":
        """The configuration that a checkpoint or an exported file holds.   written_by: version of this package that wrote it.

        A setting that leaves the training as it was gets its default where its value is no longer accepted. Raises ConfigError; where
        another version wrote the file, the message says so.
        """
        config, problems = _read(tree, (), (), None)
        config = _placed(config, Path.cwd(), problems, expand=False)
        problems = [problem for problem in problems if not _is_free(problem.key)]  # an earlier version took other names and places
        if not problems:
            return config
        error = refused(f"{file} (its configuration)", problems)
        if written_by == __version__:
            raise error
        raise ConfigError(f"{error}\nbdh-mlflow {written_by} wrote it, this is {__version__}: install that version or a newer one")

    def to_bdh_config(self) -> "BDHConfig":
        """The network's own configuration, in the published form."""
        return BDHConfig(**{**dataclasses.asdict(self.model), "vocab_size": self.vocab_size})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, section by section."""
        tree = {section.name: dataclasses.asdict(getattr(self, section.name)) for section in dataclasses.fields(self)}
        return {name: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} for name, values in tree.items()}

    def flat(self) -> dict[str, Any]:
        """Every setting under its dotted key, tags one by one."""
        return dict(_leaves(self.to_dict()))

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def portable(self) -> dict[str, dict[str, Any]]:
        """Nested plain values of all settings but places: the same wherever the files lie."""
        return {
            section: {key: value for key, value in values.items() if place_of(section, key) is None}
            for section, values in self.to_dict().items()
        }

    def digest(self) -> str:
        """First 16 hex digits of the sha256 of `portable`."""
        return hashlib.sha256(json.dumps(self.portable(), sort_keys=True).encode()).hexdigest()[:16]

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
    attention_decay: float = 0.0  # not among the published ones, where attention does not fade


def changes_trajectory(difference: Difference, config: Config) -> bool:
    """Whether a resumed run with this difference would no longer follow the run it continues.

    A plateau schedule depends on the evaluations, so there their cadence and size matter too.
    """
    if config.scheduler.type == "plateau" and difference.key in ("training.test_freq", "training.test_iters"):
        return True
    return role_of(difference.key) is not Role.FREE


def incompatible(config: Config) -> Iterable[Problem]:
    """Pairs of settings of INCOMPATIBLE that this configuration combines."""
    settings = config.flat()
    for pair in INCOMPATIBLE:
        if settings[pair.key] == pair.value and settings[pair.other] in pair.values:
            found = yaml_scalar(settings[pair.other])
            yield Problem(pair.other, f"{found} cannot be combined with {pair.key} {yaml_scalar(pair.value)}: {pair.remedy}")


def _read(tree: Mapping[str, Any], overrides: Sequence[str], checks: Sequence[Check], base: Path | None) -> tuple[Config, list[Problem]]:
    """The valid part of a tree, and what is wrong with the rest."""
    problems: list[Problem] = []
    config = _validated(with_overrides(tree, overrides, problems), problems)
    if base is not None:
        config = _placed(config, base, problems)
    faulty = {p.key for p in problems}
    for check in (_consistency, *checks):
        problems += [p for p in check(config) if p.key not in faulty]
    return config, problems


def _is_free(key: str) -> bool:
    """Whether a setting, if it is one, leaves the training as it was."""
    try:
        return role_of(key) is Role.FREE
    except KeyError:
        return False


def problem_of(key: str, value: Any) -> Problem | None:
    """What is wrong with a value of one setting, whatever the others are.   key: dotted."""
    problems: list[Problem] = []
    section, _, name = key.partition(".")
    _validated(with_overrides({section: {name: value}}, (), problems), problems)
    return problems[0] if problems else None


def _validated(tree: Mapping[str, dict[str, Any]], problems: list[Problem]) -> Config:
    """A configuration from the valid part of the tree; each invalid setting becomes a problem and keeps its default."""
    sections = {}
    for name, section in SECTIONS.items():
        values = dict(tree.get(name, {}))
        adapter = TypeAdapter(section)
        for key in [k for k in values if not isinstance(k, str) or not is_storable(k)]:
            problems.append(Problem(f"{name}.{printable(key)}", f"unknown key{nearest(printable(key), section.__pydantic_fields__)}"))
            del values[key]
        for key, entries in list(values.items()):  # pydantic takes no key that is not UTF-8
            wrong = [k for k in entries if not is_storable(str(k))] if isinstance(entries, Mapping) else []
            problems += [Problem(f"{name}.{key}.{storable(str(k))}", "the key holds bytes that are not UTF-8, or NUL") for k in wrong]
            if wrong:
                del values[key]
        try:
            sections[name] = adapter.validate_python(values)
        except ValidationError as error:
            reasons = {str(e["loc"][0]): str(e.get("ctx", {}).get("error", "")) for e in reversed(error.errors())}
            for key in [key for key in values if key in reasons]:
                value = values.pop(key)
                entries = entry_problems(name, key, value) if isinstance(value, Mapping) else []
                problems += entries or [Problem(f"{name}.{key}", explain(name, key, value, reasons[key]))]
            sections[name] = adapter.validate_python(values)
    return Config(**sections)


def in_full(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under dotted keys, as a user typed them, with every place in full.   Raises ConfigError for one that cannot be."""
    full = dict(values)
    for key, value in values.items():
        section, _, name = key.partition(".")
        kind = place_of(section, name) if section in SECTIONS and name in SECTIONS[section].__pydantic_fields__ else None
        if kind is not None and isinstance(value, str):
            try:
                full[key] = absolute(value, Path.cwd(), kind)
            except ValueError as error:
                raise ConfigError(f"{key}: {masked(str(error))}") from None
    return full


def _placed(config: Config, base: Path, problems: list[Problem], *, expand: bool = True) -> Config:
    """The same with every place in full; one that cannot be becomes a problem.   expand: they are as a user typed them."""
    sections = {}
    for name, section in SECTIONS.items():
        values = vars(getattr(config, name))
        places = {field.name: kind for field in dataclasses.fields(section) if (kind := place_of(name, field.name))}
        changed = {}
        for key, kind in places.items():
            try:
                changed[key] = values[key] and absolute(values[key], base, kind, expand=expand)
            except ValueError as error:
                problems.append(Problem(f"{name}.{key}", masked(str(error))))
        sections[name] = dataclasses.replace(getattr(config, name), **changed)
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
    for key, value in (("training.ema_decay", training.ema_decay), ("tracking.analyze_freq", config.tracking.analyze_freq)):
        if value and training.strategy == "fsdp":
            yield Problem(key, f"{value} cannot be combined with training.strategy fsdp: it needs whole weights; set it to 0")
    yield from _tokenizer_problems(config)
    yield from incompatible(config)
    if config.training.recompute is True and config.low_precision.use_fp8 and not config.fp8.emulate:
        yield Problem(
            "training.recompute",
            "true cannot be combined with low_precision.use_fp8 by Transformer Engine: recomputed products would leave its region; "
            "set it to auto, or fp8.emulate to true",
        )
    uri = config.tracking.tracking_uri
    if uri and masked(uri) != uri:
        yield Problem(
            "tracking.tracking_uri",
            "holds a password or token, which would be copied to the run; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


def _tokenizer_problems(config: Config) -> Iterable[Problem]:
    """What the section asks for that its type does not have."""
    tokenizer, size = config.tokenizer, config.model.vocab_size
    if tokenizer.type == "byte":
        for key in ("path", "name", "train_size", "separator", "digest"):
            if (value := getattr(tokenizer, key)) is not None:
                kinds = "huggingface, sentencepiece or tiktoken"
                yield Problem(f"tokenizer.{key}", f"{yaml_scalar(value)} is of a vocabulary, tokenizer.type is byte; set it to {kinds}")
        if size is not None and size < BYTE_VALUES:
            yield Problem("model.vocab_size", f"{size} does not hold every byte (tokenizer.type is byte); at least {BYTE_VALUES}, or null")
        return
    if tokenizer.path is None and tokenizer.name is None:
        yield Problem("tokenizer.path", f"null, and so is tokenizer.name: tokenizer.type {tokenizer.type} needs one of them")
    if tokenizer.path is not None and tokenizer.name is not None:
        yield Problem("tokenizer.name", f"{tokenizer.name} besides tokenizer.path {tokenizer.path}: set one of them to null")
    if tokenizer.name is not None and tokenizer.type == "sentencepiece":
        yield Problem("tokenizer.name", "SentencePiece models have no names; set tokenizer.path")
    if tokenizer.train_size is None:
        return
    if tokenizer.type != "huggingface" or tokenizer.path is None:
        yield Problem("tokenizer.train_size", "what is trained is a tokenizer.json: it needs tokenizer.type huggingface and tokenizer.path")
    if tokenizer.train_size <= BYTE_VALUES:
        yield Problem("tokenizer.train_size", f"{tokenizer.train_size} leaves no room besides the {BYTE_VALUES} bytes and a separator")
    if size is not None and size < tokenizer.train_size:
        yield Problem("model.vocab_size", f"{size} is less than tokenizer.train_size {tokenizer.train_size}; null follows the tokenizer")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
