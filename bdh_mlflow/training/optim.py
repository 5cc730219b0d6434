"""The optimizer and its learning rate.

AdamW with states of 32, 8 or 4 bits, and a learning rate that is recomputed from the step each time rather than stored; only `plateau`,
which depends on the validation loss, has a small state to save. Whatever their bits, states are saved as plain tensors. Knows nothing of
the loop.
"""

import functools
import importlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bdh_mlflow import host
from bdh_mlflow.config import Config, Problem, SchedulerConfig, TrainingConfig, resolve
from bdh_mlflow.errors import CheckpointError
from bdh_mlflow.training.muon import Muon

PLATEAU_THRESHOLD = 1e-4  # relative fall of the loss that counts as improvement; torch's ReduceLROnPlateau
SMALLEST_QUANTISED = 4096  # elements; both libraries keep smaller tensors' states in fp32
BLOCK_4BIT = 128  # state values that share a scale in torchao's AdamW4bit, which keeps tensors that are no multiple of it in fp32
LIBRARIES = {8: "bitsandbytes", 4: "torchao"}
CODES, LEVELS, SIGNED = "codes", "levels", "signed"
torch.sqrt(torch.zeros(1))  # as `layer` does with cos and sin: the low-bit optimizers' first one would be made by all threads at once


def problems(config: Config) -> Iterable[Problem]:
    """What the configuration asks of the optimizer that this machine or model cannot do."""
    bits = resolve(config).config.low_precision.optimizer_bits
    if bits not in LIBRARIES:
        return
    key = "low_precision.use_4bit_optimizer" if config.low_precision.use_4bit_optimizer else "low_precision.optimizer_bits"
    if importlib.util.find_spec(LIBRARIES[bits]) is None:
        yield Problem(key, f"{bits}-bit AdamW needs {LIBRARIES[bits]}, which is not installed: pip install {LIBRARIES[bits]}")
    m = config.model
    vocabulary = m.vocab_size or 0  # of a tokenizer that is not read yet; this is asked again when it is
    sizes = m.mlp_internal_dim_multiplier * m.n_embd**2, vocabulary * m.n_embd
    if not any(_quantised(size, bits) for size in sizes):
        blocks = "" if bits == 8 else f", a multiple of {BLOCK_4BIT}"
        yield Problem(
            key,
            f"{bits}-bit states are kept for tensors of {SMALLEST_QUANTISED} elements or more{blocks}; those of this model have "
            f"{sizes[0]} and {sizes[1]}. Set optimizer_bits to 32 (and use_4bit_optimizer to false), or a larger model",
        )


def build_optimizer(
    parameters: Iterable[nn.Parameter], training: TrainingConfig, bits: int = 32, projections: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW over all parameters (every parameter of BDH is a matrix, so weight decay spares none), as the published training does.

    projections: what Muon updates, where it is configured.   bits: of AdamW's states.

    32 is torch's, fused; 8 bitsandbytes' AdamW8bit (arXiv:2110.02861); 4 torchao's AdamW4bit (arXiv:2309.01507).
    """
    given: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "betas": tuple(training.betas)}
    if training.optimizer == "muon":
        return Muon(parameters, projections, **given)
    if bits == 32:
        return torch.optim.AdamW(parameters, fused=True, **given)
    if bits == 8:
        with _quiet():
            kind = importlib.import_module("bitsandbytes.optim").AdamW8bit
        optimizer: torch.optim.Optimizer = kind(parameters, **given)
    else:
        optimizer = _adamw_4bit()(parameters, block_size=BLOCK_4BIT, **given)
    return optimizer


def described(parameters: Sequence[Tensor], bits: int, projections: Sequence[Tensor] = ()) -> str:
    """A sentence about what runs, counted.   projections: what Muon updates."""
    if projections:
        matrices, total = sum(p.numel() for p in projections), sum(p.numel() for p in parameters)
        each = (4 * matrices + 8 * (total - matrices)) / total
        return f"Muon for {len(projections)} of {len(parameters)} parameters (torch), AdamW for the others, {each:.2f} bytes a parameter"
    if bits == 32:
        return "AdamW with 32-bit states (torch, fused), 8.00 bytes a parameter"
    low = [p.numel() for p in parameters if _quantised(p.numel(), bits)]
    total = sum(p.numel() for p in parameters)
    # bitsandbytes: two codes, and an fp32 scale for each 256; torchao: two codes of half a byte, and an fp32 scale for each 128
    each = 2 + 8 / 256 if bits == 8 else 1 + 8 / BLOCK_4BIT
    mean = (each * sum(low) + 8 * (total - sum(low))) / total
    how = "" if bits == 8 or host.compiler() else ", not compiled (no C++ compiler): slower"
    return (
        f"AdamW with {bits}-bit states ({LIBRARIES[bits]}{how}) in {len(low)} of {len(parameters)} parameters, {mean:.2f} bytes a parameter"
    )


def state_bytes(state_dict: Mapping[str, Any]) -> int:
    """Bytes of the tensors that an optimizer keeps for its parameters, step counters and value tables left out."""
    total = 0
    for state in state_dict["state"].values():
        for name, value in _flattened(state):
            if name not in ("step", LEVELS, "qmap1", "qmap2"):
                total += value.numel() * value.element_size()
    return total


def _flattened(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flattened(value)
        elif isinstance(value, Tensor):
            yield name, value


def _quantised(size: int, bits: int) -> bool:
    return size >= SMALLEST_QUANTISED and (bits == 8 or size % BLOCK_4BIT == 0)


def _adamw_4bit() -> Any:
    """torchao's AdamW4bit, with a learning rate that is a number and states that are saved as plain tensors."""
    with _quiet():
        from torchao.optim import AdamW4bit
        from torchao.optim.subclass_4bit import OptimState4bit

    stance = nullcontext if host.compiler() else functools.partial(torch.compiler.set_stance, "force_eager")

    class AdamW4bitPlain(AdamW4bit):  # type: ignore[misc]
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group)
            self.param_groups[-1]["lr"] = float(self.param_groups[-1]["lr"])

        def step(self, closure: Any = None) -> Any:
            """One update; compiled where a compiler is there (each shape once), else operation by operation."""
            rates = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate)  # the compiled step takes it as a tensor
            try:
                with _quiet(), stance():
                    return super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate

        def state_dict(self) -> dict[str, Any]:
            """States as dicts of plain tensors: who opens a checkpoint needs no torchao."""

            def plain(value: Any) -> Any:
                if not isinstance(value, OptimState4bit):
                    return value
                return {CODES: value.codes, "scale": value.scale, LEVELS: value.qmap, SIGNED: value.signed, "shape": list(value.shape)}

            whole = super().state_dict()
            states = {number: {name: plain(value) for name, value in state.items()} for number, state in whole["state"].items()}
            return {**whole, "state": states}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Continue from what `state_dict` gave."""

            def packed(value: Any) -> Any:
                if not isinstance(value, Mapping):
                    return value
                tensors = (value[name].clone() for name in (CODES, "scale", LEVELS))
                return OptimState4bit(*tensors, value[SIGNED], tuple(value["shape"]), dtype=torch.float32)

            states = {number: {name: packed(value) for name, value in state.items()} for number, state in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": states})

    return AdamW4bitPlain


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries' notes about kernels that are not used here; errors stay."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's state dict with names of parameters instead of numbers, in the form of torch's `get_optimizer_state_dict`."""
    state, names = optimizer.state_dict(), _names(optimizer, model)
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {names[number]: each for number, each in state["state"].items()}, "param_groups": groups}


def load_named_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Continue from what `named_state` gave, or from a state dict with numbers, as checkpoints of format 1 have it.

    Raises CheckpointError for a state of other parameters.
    """
    names = _names(optimizer, model)
    numbers: dict[str | int, int] = {name: number for number, name in names.items()} | {number: number for number in names}
    try:
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        by_number = {numbers[name]: each for name, each in state["state"].items()}
    except KeyError as error:
        raise CheckpointError(f"the optimizer's state has a parameter {error}; the model has {', '.join(names.values())}") from None
    optimizer.load_state_dict({**state, "state": by_number, "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """Names of parameters by the numbers that the optimizer's state dict has for them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return dict(enumerate(names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]))


class LearningRate:
    """The learning rate of each update: linear warm-up to the peak, then the configured shape, never below min_lr."""

    def __init__(self, peak: float, scheduler: SchedulerConfig) -> None:
        self._peak = peak
        self._config = scheduler
        self._scale = 1.0
        self._best = math.inf
        self._bad_evaluations = 0

    def at(self, step: int) -> float:
        """Rate of the update that completes after `step` others (step counts from 0).

        warm-up of W updates: peak * (step + 1) / W.   After it, with k = step - W and K = decay_steps - W:
        cosine: min + (peak - min) * (1 + cos(pi k / K)) / 2;  linear: peak - (peak - min) * k / K;  both min_lr from decay_steps on.
        exponential: peak * gamma^k.   plateau: peak * factor^(cuts so far).   constant: peak.
        """
        c = self._config
        if step < c.warmup_steps:
            return self._peak * (step + 1) / c.warmup_steps
        k = step - c.warmup_steps
        if c.type == "constant":
            return self._peak
        if c.type == "exponential":
            return max(c.min_lr, self._peak * c.gamma**k)
        if c.type == "plateau":
            return max(c.min_lr, self._peak * self._scale)
        assert c.decay_steps is not None, "the configuration is resolved before it gets here"
        done = min(1.0, k / (c.decay_steps - c.warmup_steps))
        share = (1 + math.cos(math.pi * done)) / 2 if c.type == "cosine" else 1 - done
        return c.min_lr + (self._peak - c.min_lr) * share

    def observe(self, val_loss: float) -> None:
        """Take note of a validation loss; plateau cuts the rate after more than `patience` evaluations without improvement."""
        if val_loss < self._best * (1 - PLATEAU_THRESHOLD):
            self._best, self._bad_evaluations = val_loss, 0
            return
        self._bad_evaluations += 1
        if self._bad_evaluations > self._config.patience:
            self._scale *= self._config.factor
            self._bad_evaluations = 0

    def state_dict(self) -> dict[str, Any]:
        """What `at` cannot compute from the step."""
        return {"scale": self._scale, "best": self._best, "bad_evaluations": self._bad_evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._scale, self._best, self._bad_evaluations = state["scale"], state["best"], state["bad_evaluations"]
