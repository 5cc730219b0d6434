"""FP8 for the three projections by delayed scaling: carried out by Transformer Engine on CUDA, or emulated in torch anywhere.

Delayed scaling (arXiv:2209.05433; Transformer Engine's DelayedScaling recipe): every operand has a scale of its own, computed from the
largest absolute values of the steps before, so that quantising needs no look at the tensor itself. One training forward pass is a region:
what it and its backward pass see is written into the newest row of the history, and the scales follow before the next region. BDH applies
one set of weights in every layer, so a projection is entered several times in a region, and a row holds the largest of all entries.
Evaluation uses the scales and leaves no trace in them.

Every projection is seen as G products (M, K) @ (K, O), each with scales of its own: `encoder` and `decoder` as one, `encoder_v` as one a
head. Parameters stay where they are and as they are: nothing here enters the model's state dict. Knows neither model nor configuration
file.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bdh_mlflow.config import Fp8Config

ROLES = ("input", "weight", "gradient")
COLUMNS = {"scaling_fwd": ("input", "weight", "output"), "scaling_bwd": ("gradient", "input gradient")}
"""Operands of one product in Transformer Engine's own tensors; of those, ROLES are in use."""
CAPABILITY = (8, 9)  # Ada; the oldest that Transformer Engine runs FP8 on
ALIGNMENT = 16  # elements; what FP8 matrix products on CUDA need of every side
GROUPED = "encoder_v"
MISSING = (ImportError, OSError, RuntimeError, AssertionError)
"""What an import of Transformer Engine raises where a part of it is missing: the meta package alone raises RuntimeError, a missing CUDA
library OSError."""
INSTALL = "pip install --no-build-isolation 'bdh-mlflow[fp8]'"


class Fp8(Protocol):
    """Who carries out FP8 products."""

    def region(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass."""
        ...

    def product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight for a projection, differentiable."""
        ...

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Scales and histories: all that the next step depends on."""
        ...

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `state`."""

    def savepoint(self) -> Callable[[], None]:
        """Between updates: the function returned brings back the state of now, whatever regions came after."""
        ...


class Emulated:
    """The recipe in torch: operands rounded to float8 values, products summed in float32.

    Slow, and the same on any device. What differs from the hardware is the order of sums, and nothing is faster or smaller for it.
    """

    def __init__(self, recipe: Fp8Config) -> None:
        self._recipe = recipe
        self._formats = {
            "input": torch.float8_e4m3fn,
            "weight": torch.float8_e4m3fn,
            "gradient": torch.float8_e5m2 if recipe.format == "hybrid" else torch.float8_e4m3fn,
        }
        self._operands: dict[str, _Operand] = {}
        self._recording = False

    def __str__(self) -> str:
        return f"FP8 ({_words(self._recipe)}, emulated)"

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Around a forward pass; where gradients are wanted, it is one of training, and the scales follow what the last one saw."""
        for operand in self._operands.values():
            operand.settle(self._recipe)
        self._recording = torch.is_grad_enabled()
        yield

    def product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight with both rounded to FP8, in x's autocast dtype; the gradient is rounded on its way back."""
        dtype = _compute_dtype(x)
        shaped = shape(name, x.to(dtype), weight)
        operands = tuple(self._operand(f"{name}.{role}", role, shaped.left) for role in ROLES)
        out: Tensor = _Rounded.apply(shaped.left, shaped.right, operands, self._recording)  # type: ignore[no-untyped-call]
        return shaped.restore(out.to(dtype))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By operand: scale (G,) and history (amax_history_len, G), newest first."""
        for operand in self._operands.values():
            operand.settle(self._recipe)
        return {name: {"scale": o.scale, "history": o.history} for name, o in self._operands.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `state`."""
        length = self._recipe.amax_history_len
        self._operands = {
            name: _Operand(own["scale"].clone(), _of_length(own["history"], length), self._formats[name.rpartition(".")[2]])
            for name, own in state.items()
        }

    def savepoint(self) -> Callable[[], None]:
        """Copies nothing: regions write in place into the newest row only, zero between updates; settling makes new tensors."""
        for operand in self._operands.values():
            operand.settle(self._recipe)
        before = [(name, operand, operand.scale, operand.history) for name, operand in self._operands.items()]

        def restore() -> None:
            self._operands = {name: operand for name, operand, _, _ in before}
            for _, operand, scale, history in before:
                history[0] = 0
                operand.scale, operand.history, operand.seen = scale, history, False

        return restore

    def _operand(self, name: str, role: str, like: Tensor) -> "_Operand":
        found = self._operands.get(name)
        if found is None:
            scale = torch.ones(like.shape[0], device=like.device)
            history = torch.zeros(self._recipe.amax_history_len, like.shape[0], device=like.device)
            found = self._operands[name] = _Operand(scale, history, self._formats[role])
        elif found.scale.device != like.device:  # loaded from a checkpoint, which lies on the CPU
            found.scale, found.history = found.scale.to(like.device), found.history.to(like.device)
        return found


@dataclasses.dataclass
class _Operand:
    """scale: (G,).   history: (amax_history_len, G), newest first.   seen: whether the newest row waits to be taken into the scale."""

    scale: Tensor
    history: Tensor
    format: torch.dtype
    seen: bool = False

    def record(self, t: Tensor) -> None:
        """Largest absolute values of t (G, ..., ...) into the newest row; what is not finite tells nothing of a scale."""
        largest = t.detach().abs().amax(dim=(1, 2)).float()
        torch.maximum(self.history[0], largest.where(largest.isfinite(), 0), out=self.history[0])
        self.seen = True

    def settle(self, recipe: Fp8Config) -> None:
        """Take the newest row into the scale and open the next one; Transformer Engine's update of amax and scale (common/recipe)."""
        if not self.seen:
            return
        amax = self.history[0] if recipe.amax_compute_algo == "most_recent" else self.history.amax(dim=0)
        largest = torch.finfo(self.format).max
        fresh = torch.where(amax > 0, largest / amax, self.scale)
        self.scale = torch.where(fresh.isinf(), torch.finfo(torch.float32).max, fresh)
        self.history = self.history.roll(1, dims=0)
        self.history[0] = 0
        self.seen = False

    def rounded(self, t: Tensor, record: bool) -> Tensor:
        """t (G, ..., ...) times its scale, as float8; what is too large saturates, as in the hardware's casts."""
        if record:
            self.record(t)
        limit = torch.finfo(self.format).max
        return (t.float() * self.scale[:, None, None]).clamp(-limit, limit).to(self.format)


class _Rounded(torch.autograd.Function):
    """(G, M, K) @ (G, K, O) of rounded operands."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, operands: tuple[_Operand, _Operand, _Operand], record: bool) -> Tensor:
        (of_left, of_right, of_grad) = operands
        left8, right8 = of_left.rounded(left, record), of_right.rounded(right, record)
        ctx.save_for_backward(left8, right8, of_left.scale, of_right.scale)
        ctx.rest = of_grad, record, left.dtype, right.dtype
        return _product(left8, right8, of_left.scale, of_right.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left8, right8, left_scale, right_scale = ctx.saved_tensors
        of_grad, record, left_dtype, right_dtype = ctx.rest
        grad8 = of_grad.rounded(grad, record)
        d_left = _product(grad8, right8.mT, of_grad.scale, right_scale)
        d_right = _product(left8.mT, grad8, left_scale, of_grad.scale)
        return d_left.to(left_dtype), d_right.to(right_dtype), None, None


def _product(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return (left.float() @ right.float()) / (left_scale * right_scale)[:, None, None]


class Shaped(NamedTuple):
    """A projection as G products.   left: (G, M, K).   right: (G, K, O).   restore: of a result (G, M, O), the shape of x @ weight."""

    left: Tensor
    right: Tensor
    restore: Callable[[Tensor], Tensor]


def shape(name: str, x: Tensor, weight: Tensor) -> Shaped:
    """x @ weight for `encoder` (B, 1, T, D) @ (H, D, N), `encoder_v` (B, H, T, D) @ (H, D, N), `decoder` (B, 1, T, H * N) @ (H * N, D)."""
    batch, heads, tokens, inner = x.shape
    if name == GROUPED:
        left = x.transpose(0, 1).reshape(heads, batch * tokens, inner)
        return Shaped(left, weight, lambda out: out.view(heads, batch, tokens, -1).transpose(0, 1))
    left = x.reshape(1, batch * tokens, inner)
    if weight.dim() == 2:
        return Shaped(left, weight.unsqueeze(0), lambda out: out.view(batch, 1, tokens, -1))
    right = weight.transpose(0, 1).reshape(1, inner, -1)
    return Shaped(left, right, lambda out: out.view(batch, tokens, weight.shape[0], -1).transpose(1, 2))


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _words(recipe: Fp8Config) -> str:
    return f"{recipe.format}, delayed scaling by amax {recipe.amax_compute_algo} of {recipe.amax_history_len}"


class Engine:
    """The recipe by Transformer Engine.   Raises one of MISSING where it cannot be imported; see `unavailable`.

    Its modules are lent the model's own parameters for each product, transposed as they want them, so gradients arrive where they belong.
    Amaxes are not reduced over processes: the library forbids that where a module is entered twice in a region.
    """

    def __init__(self, recipe: Fp8Config) -> None:
        self._words = _words(recipe)
        self._te = importlib.import_module("transformer_engine.pytorch")
        recipes = importlib.import_module("transformer_engine.common.recipe")
        self._recipe = recipes.DelayedScaling(
            fp8_format={"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}[recipe.format],
            amax_history_len=recipe.amax_history_len,
            amax_compute_algo=recipe.amax_compute_algo,
            reduce_amax=False,
        )
        self._modules: dict[str, Any] = {}
        self._saved: dict[str, dict[str, Tensor]] = {}

    def __str__(self) -> str:
        return f"FP8 ({self._words}, Transformer Engine)"

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """The library's autocast: at its end, in training, scales follow what was seen. What evaluation has seen is forgotten."""
        with self._te.autocast(enabled=True, recipe=self._recipe):
            yield
        if not torch.is_grad_enabled():
            for module in self._modules.values():
                if "scaling_fwd" in module.fp8_meta:
                    module.fp8_meta["scaling_fwd"].amax_history[0].zero_()

    def product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight by a Linear, or by a GroupedLinear where each head has weights of its own."""
        shaped = shape(name, x, weight)
        groups, rows, inner = shaped.left.shape
        module = self._module(name, groups, inner, shaped.right.shape[2])
        left = shaped.left.reshape(groups * rows, inner)
        if name == GROUPED:
            lent = {f"weight{group}": shaped.right[group].mT.contiguous() for group in range(groups)}
            out = torch.func.functional_call(module, lent, (left, torch.full((groups,), rows)))
        else:
            out = torch.func.functional_call(module, {"weight": shaped.right[0].mT.contiguous()}, (left,))
        return shaped.restore(out.view(groups, rows, -1))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """As `Emulated` gives it, so that either goes on where the other was. The library's own extra state is a pickle: none of ours."""
        state = dict(self._saved)
        for name, module in self._modules.items():
            tensors = module.get_fp8_meta_tensors() or {}
            for key, (scale, history) in tensors.items():
                columns, newest_first = COLUMNS[key], torch.cat((history[:1], history[1:].flip(0)))
                for place, role in enumerate(columns):
                    if role in ROLES:
                        own = slice(place, None, len(columns))
                        state[f"{name}.{role}"] = {"scale": scale[own].clone(), "history": newest_first[:, own].clone()}
        return state

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `state`; a module takes its part when it is made."""
        self._saved = {name: {key: t.clone() for key, t in own.items()} for name, own in state.items()}
        self._modules.clear()

    def savepoint(self) -> Callable[[], None]:
        """By copy: the library updates its tensors in place."""
        state = self.state_dict()
        return lambda: self.load_state_dict(state)

    def _module(self, name: str, groups: int, inner: int, outer: int) -> Any:
        if name not in self._modules:
            options = {"bias": False, "params_dtype": torch.float32}
            grouped = name == GROUPED
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices):  # it draws weights that nobody uses; the training's randomness goes on as if it had not
                made = self._te.GroupedLinear(groups, inner, outer, **options) if grouped else self._te.Linear(inner, outer, **options)
            own = {role: self._saved.pop(f"{name}.{role}") for role in ROLES if f"{name}.{role}" in self._saved}
            if len(own) == len(ROLES):
                made.fp8_meta["num_gemms"] = groups
                made.fp8_meta["recipe"] = self._recipe
                made.init_fp8_meta_tensors(self._recipe)
                made.reset_fp8_meta_tensors({key: self._tensors(key, own, groups) for key in COLUMNS})
            self._modules[name] = made
        return self._modules[name]

    def _tensors(self, key: str, own: dict[str, dict[str, Tensor]], groups: int) -> list[Tensor]:
        """Scale and history in the library's order: columns of one product beside each other, after row 0 the oldest first."""
        columns, length = COLUMNS[key], self._recipe.amax_history_len
        scale, history = torch.ones(groups, len(columns)), torch.zeros(length, groups, len(columns))
        for place, role in enumerate(columns):
            if role in own:
                newest_first = _of_length(own[role]["history"], length)
                scale[:, place] = own[role]["scale"]
                history[:, :, place] = torch.cat((newest_first[:1], newest_first[1:].flip(0)))
        return [scale.flatten(), history.flatten(1)]


def unavailable(device: torch.device) -> str | None:
    """Why Transformer Engine cannot carry FP8 out on this device, as the rest of a sentence; None if it can."""
    needed = "needs CUDA capability 8.9 or newer"
    if device.type != "cuda":
        return f"{needed}; this machine has no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"{needed}; {device} has CUDA capability {found[0]}.{found[1]} ({torch.cuda.get_device_name(device)})"
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
    except MISSING as error:
        return f"needs Transformer Engine, which cannot be imported ({(str(error).splitlines() or [type(error).__name__])[0]}): {INSTALL}"
    able, reason = engine.is_fp8_available(return_reason=True)
    return None if able else f"is refused by Transformer Engine: {reason}"


def _of_length(history: Tensor, length: int) -> Tensor:
    """The newest rows, which are the first, or zeros after them: a fork may remember longer or shorter."""
    rows = history.new_zeros(length, history.shape[1])
    kept = min(length, len(history))
    rows[:kept] = history[:kept]
    return rows
