"""What `auto` and null stand for: settled here and nowhere else, before anything is built; the result is what is saved, logged and tagged.

Rules look at the settings, at the machine and at the run that is resumed; each gives a value and its reason. Bits depend on the layer form
and on compilation, so a resumed run keeps both; they do not depend on whether activations are recomputed, so that follows the memory of
the machine at hand. Knows nothing of torch: `model.precision.machine` measures.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bdh_mlflow.config.config import Config
from bdh_mlflow.config.places import is_bucket
from bdh_mlflow.config.settings import DatasetConfig

KEPT_SHARE = 0.5
"""Most of the free memory that kept activations may take; weights, gradients, optimizer states and temporary tensors need the rest."""
RESUMED = "as in the resumed run"


class Machine(NamedTuple):
    """Where training runs.   device: "cpu", "cuda" or "mps".   free_bytes: of the device's memory."""

    device: str
    free_bytes: int


class Resolved(NamedTuple):
    """A configuration without `auto` and null, as far as the machine is known.   why: dotted key -> reason, for each that was settled."""

    config: Config
    why: Mapping[str, str]


class _Choice(NamedTuple):
    value: Any
    why: str


def resolve(config: Config, machine: Machine | None = None, continued: Config | None = None) -> Resolved:
    """Give a value to every setting that was left to be decided.

    machine: None leaves `auto` what only a machine decides.   continued: the resolved configuration of the run that is resumed; its
    decay_steps stays, so that a longer run does not bend the schedule, and so do its layer form and compilation.
    """
    why: dict[str, str] = {}

    def settle(key: str, choice: _Choice | None) -> None:
        nonlocal config
        if choice is None:
            return
        section, _, name = key.partition(".")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: choice.value})})
        why[key] = choice.why

    settle("dataset.source", _source(config))
    settle("scheduler.decay_steps", _decay_steps(config, continued))
    settle("low_precision.optimizer_bits", _optimizer_bits(config))
    settle("low_precision.use_4bit_optimizer", _use_4bit_optimizer(config))
    settle("training.layer_form", _layer_form(config, machine, continued))
    settle("training.compile", _compile(config, machine, continued))
    settle("training.recompute", _recompute(config, machine))
    settle("training.strategy", _Choice("ddp", "auto") if config.training.strategy == "auto" else None)
    return Resolved(config, why)


def _source(config: Config) -> _Choice | None:
    """The default text is for the default folder: any other one that is missing is a mistake, or someone's own."""
    if config.dataset.source != "auto":
        return None
    if (
        not is_bucket(config.dataset.parquet_dir)
        and Path(config.dataset.parquet_dir).absolute() == Path(DatasetConfig().parquet_dir).absolute()
    ):
        return _Choice("python-stdlib", "auto for the default parquet_dir")
    return _Choice(None, "auto for a parquet_dir of one's own")


def _decay_steps(config: Config, continued: Config | None) -> _Choice | None:
    if config.scheduler.decay_steps is not None:
        return None
    if continued:
        return _Choice(continued.scheduler.decay_steps, RESUMED)
    return _Choice(max(config.training.max_iters, config.scheduler.warmup_steps + 1), "max_iters of the first segment")


def _optimizer_bits(config: Config) -> _Choice | None:
    formats = config.low_precision
    if formats.optimizer_bits is not None:
        return None
    return _Choice(4, "use_4bit_optimizer is true") if formats.use_4bit_optimizer else _Choice(32, "use_4bit_optimizer is false")


def _use_4bit_optimizer(config: Config) -> _Choice | None:
    """The other name of `optimizer_bits: 4`, which is settled before."""
    bits = config.low_precision.optimizer_bits
    return None if config.low_precision.use_4bit_optimizer == (bits == 4) else _Choice(bits == 4, f"optimizer_bits is {bits}")


def _layer_form(config: Config, machine: Machine | None, continued: Config | None) -> _Choice | None:
    if config.training.layer_form != "auto":
        return None
    if config.low_precision.use_fp8:
        return _Choice("reference", "auto with FP8, which only this form supports")
    if continued and continued.training.layer_form != "auto":
        return _Choice(continued.training.layer_form, RESUMED)
    if config.training.recompute is False:
        return _Choice("reference", "auto without recomputation, which only this form can do without")
    if machine is None:
        return None
    if machine.device == "cpu":
        return _Choice("blocked", "auto on cpu")
    return _Choice("reference", f"auto on {machine.device}, where blocked was never measured")


def _compile(config: Config, machine: Machine | None, continued: Config | None) -> _Choice | None:
    if config.training.debug:
        return _Choice(False, "debug")
    if config.training.compile != "auto":
        return None
    if config.low_precision.use_fp8:
        return _Choice(False, "auto with FP8, whose delayed scaling is not traced")
    if continued and continued.training.compile != "auto" and not continued.training.debug:
        return _Choice(continued.training.compile, RESUMED)
    return _Choice(machine.device == "cuda", f"auto on {machine.device}") if machine else None


def _recompute(config: Config, machine: Machine | None) -> _Choice | None:
    """After the layer form is settled."""
    if config.training.recompute != "auto":
        return None
    if config.training.layer_form == "blocked":
        return _Choice(True, "blocked always recomputes")
    if config.low_precision.use_fp8 and not config.fp8.emulate:
        return _Choice(False, "Transformer Engine's products cannot be recomputed: that would leave their region")
    if machine is None or config.training.layer_form == "auto":
        return None
    kept = config.activation_bytes
    reason = f"auto, {kept / 2**30:.1f} GiB if kept, {machine.free_bytes / 2**30:.1f} GiB free"
    return _Choice(kept > KEPT_SHARE * machine.free_bytes, reason)
