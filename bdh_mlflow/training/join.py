"""Runs that begin with weights made of checkpoints: forks of one model merged, or one model grown. See `model.join` for the arithmetic."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psutil

from bdh_mlflow.config import Config, Role, role_of
from bdh_mlflow.config.messages import yaml_scalar
from bdh_mlflow.errors import ConfigError, InputError
from bdh_mlflow.model import join
from bdh_mlflow.model.rope import FREQUENCIES
from bdh_mlflow.tracking.resolved import ResolvedCheckpoint
from bdh_mlflow.training.origin import Made

COMMON_BASE_LIKENESS = 0.25
"""Least `join.likeness` of two forks of one model. See docs/paper.md for what forks and strangers have."""

ANEW = {"training.layer_form": "auto", "training.recompute": "auto", "training.compile": "auto", "training.resume_from_checkpoint": None}
"""Settings that a new run settles for its own machine."""


class Begun(NamedTuple):
    """A run to begin.   config: the first checkpoint's, as wide as the weights.   likeness: of the two that are least alike."""

    config: Config
    made: Made
    likeness: float | None = None


def merged(forks: Sequence[ResolvedCheckpoint], here: Config, *, strangers: bool = False) -> Begun:
    """Checkpoints with their neurons side by side.   here: where runs are kept and logged.   strangers: also without a common base.

    Raises InputError for models that do not fit together, with each difference.
    """
    configs = [_own(found) for found in forks]
    if len(forks) < 2:
        raise InputError("one checkpoint is named; merging takes two or more")
    wrong = [
        line for found, config in zip(forks[1:], configs[1:], strict=True) for line in _differences(forks[0], configs[0], found, config)
    ]
    if wrong:
        raise InputError("\n  ".join(["these models do not fit together", *wrong]))
    weights = [found.state["model_state_dict"] for found in forks]
    pairs = [(i, j) for j in range(len(forks)) for i in range(j)]
    likeness, (first, second) = min((join.likeness(weights[i], weights[j]), (i, j)) for i, j in pairs)
    if likeness < COMMON_BASE_LIKENESS and not strangers:
        raise InputError(
            f"{forks[first].path} and {forks[second].path}: not forks of one model, as far as their weights tell (cosine {likeness:.2f}, "
            f"below {COMMON_BASE_LIKENESS}). Merging strangers gives a model that knows nothing. Fork both from one checkpoint "
            "(train --resume BASE --fork), or say --strangers to merge them anyway"
        )
    made = Made(join.concatenated(weights), "merged", tuple(forks))
    return Begun(_wider(configs[0], here, len(forks)), made, likeness)


def grown(found: ResolvedCheckpoint, here: Config, multiplier: int, seed: int = 0) -> Begun:
    """A checkpoint with more neurons and the same function.   multiplier: the new model.mlp_internal_dim_multiplier.

    Raises InputError if that is no multiple of the old one, or not larger.
    """
    config = _own(found)
    now = config.model.mlp_internal_dim_multiplier
    if multiplier % now or multiplier == now:
        raise InputError(
            f"--multiplier {multiplier}: accepted: {2 * now}, {3 * now}, ..., as every neuron of {found.path} (multiplier {now}) is copied"
        )
    copies = multiplier // now
    needed, free = 3 * 4 * 3 * config.model.n_embd**2 * multiplier, psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"--multiplier {multiplier}: {needed / 2**30:,.0f} GiB are needed to make its weights, {free / 2**30:,.1f} GiB are free"
        )
    return Begun(_wider(config, here, copies), Made(join.grown(found.state["model_state_dict"], copies, seed), "grown", (found,)))


def check_kept(begun: Begun, config: Config) -> None:
    """Raises InputError where a configuration, by its overrides, asks for another network or other tokens than the weights are of."""

    def is_kept(key: str) -> bool:
        return key != "model.dropout" and key.startswith(("model.", "tokenizer.")) and role_of(key) is not Role.FREE

    changed = [d for d in begun.config.differences(config) if is_kept(d.key)]
    if changed:
        lines = [f"{d.key}={yaml_scalar(d.after)}: the weights are of {yaml_scalar(d.before)}" for d in changed]
        raise InputError("\n  ".join([f"--set cannot change what {begun.made.how} weights compute", *lines]))


def _own(found: ResolvedCheckpoint) -> Config:
    """The configuration of a checkpoint.   Raises InputError for weights without one, and for weights that are no numbers."""
    config = found.config()
    if broken := [name for name, weights in found.state["model_state_dict"].items() if not bool(weights.isfinite().all())]:
        raise InputError(f"{found.path}: {', '.join(broken)}: not all values are finite; choose a checkpoint from before it diverged")
    return config


def _differences(first: ResolvedCheckpoint, own: Config, other: ResolvedCheckpoint, config: Config) -> list[str]:
    """Why two models cannot be laid side by side: their shapes, tokens, number formats or frequencies."""

    def of(each: Config) -> Mapping[str, Any]:
        keys = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size", "attention_decay")
        formats = ("use_4bit", "use_fp8", "compute_dtype", "quantization_type")
        return {
            **{f"model.{key}": getattr(each.model, key) for key in keys},
            **{f"low_precision.{key}": getattr(each.low_precision, key) for key in formats},
            "tokenizer.digest": each.tokenizer.digest,
        }

    ours, theirs = of(own), of(config)
    lines = [f"{key}: {ours[key]} in {first.path}, {theirs[key]} in {other.path}" for key in ours if ours[key] != theirs[key]]
    if not lines and not _alike(first, other):
        lines.append(f"{FREQUENCIES}: other frequencies in {first.path} than in {other.path}")
    return lines


def _alike(one: ResolvedCheckpoint, other: ResolvedCheckpoint) -> bool:
    """Whether their neurons turn alike; checkpoints of earlier versions do not say how, and are as an untrained model."""
    ours, theirs = (found.state["model_state_dict"].get(FREQUENCIES) for found in (one, other))
    return (ours is None and theirs is None) or (ours is not None and theirs is not None and bool((ours == theirs).all()))


def _wider(config: Config, here: Config, copies: int) -> Config:
    """The configuration of a model with so many times the neurons, run where `here` says.   Raises ConfigError."""
    values = {"model.mlp_internal_dim_multiplier": config.model.mlp_internal_dim_multiplier * copies, **ANEW}
    values["training.checkpoint_dir"] = here.training.checkpoint_dir
    values |= {f"tracking.{key}": value for key, value in here.to_dict()["tracking"].items() if key != "run_name"}
    try:
        return config.replaced(values)
    except ConfigError as error:
        raise InputError(f"the wider model cannot be configured: {error}") from None
