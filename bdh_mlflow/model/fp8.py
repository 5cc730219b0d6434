"""FP8 for the three projections by delayed scaling: computed by Transformer Engine on CUDA, or emulated in torch on any device.

Delayed scaling (arXiv:2209.05433; Transformer Engine's DelayedScaling recipe): every operand has its own scale, computed from its largest
absolute values (amax) in the steps before, so that quantising does not have to scan the tensor first. One training forward pass is a
region: amaxes of it and its backward pass are written into the newest row of the history, and the scales are updated before the next
region. BDH applies one set of weights in every layer, so a projection is used several times in a region, and a row holds the largest amax
of all uses. Evaluation uses the scales and does not change them.

A projection is computed as G products (M, K) @ (K, O), each with its own scales: `encoder` and `decoder` as one, `encoder_v` as one per
head. Parameters are not replaced or moved, and nothing here enters the model's state dict. Knows neither model nor configuration file.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bdh_mlflow.config import Fp8Config
from bdh_mlflow.files import first_line

ROLES = ("input", "weight", "gradient")
COLUMNS = {"scaling_fwd": ("input", "weight", "output"), "scaling_bwd": ("gradient", "input gradient")}
"""Order of a product's operands in Transformer Engine's own tensors; of those, ROLES are used."""
CAPABILITY = (8, 9)  # Ada: the lowest on which Transformer Engine runs FP8 (its is_fp8_available)
ALIGNMENT = 16  # elements; FP8 matrix products of cuBLASLt need every side to be a multiple
GROUPED = "encoder_v"
MISSING = (ImportError, OSError, RuntimeError, AssertionError)
"""Errors of importing Transformer Engine where a part of it is missing: the meta package alone raises RuntimeError, a missing CUDA library
OSError."""
INSTALL = "pip install --no-build-isolation 'bdh-mlflow[fp8]'"


class Fp8(Protocol):
    """An implementation of FP8 products."""

    def region(self) -> contextlib.AbstractContextManager[None]:
        """Wraps a forward pass."""
        ...

    def product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight for a projection, differentiable."""
        ...

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Scales and amax histories: everything the next step depends on."""
        ...

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `state`."""

    def savepoint(self) -> Callable[[], None]:
        """Between updates: the function returned brings back the state of now, whatever regions came after."""
        ...


class Emulated:
    """The recipe in torch: operands rounded to float8 values, products summed in float32.

    The same on any device. It differs from the hardware only in the order of sums; it is slower than float32 and saves no memory.
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
        return f"FP8 ({_description(self._recipe)}, emulated)"

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Wraps a forward pass; scales are first updated from the last training pass. With gradients enabled, amaxes are recorded."""
        for operand in self._operands.values():
            operand.update_scale(self._recipe)
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
            operand.update_scale(self._recipe)
        return {name: {"scale": o.scale, "history": o.history} for name, o in self._operands.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `state`."""
        length = self._recipe.amax_history_len
        self._operands = {
            name: _Operand(own["scale"].clone(), _of_length(own["history"], length), self._formats[name.rpartition(".")[2]])
            for name, own in state.items()
        }

    def savepoint(self) -> Callable[[], None]:
        """Copies nothing: regions write in place into the newest row only, zero between updates; `update_scale` makes new tensors."""
        for operand in self._operands.values():
            operand.update_scale(self._recipe)
        before = [(name, operand, operand.scale, operand.history) for name, operand in self._operands.items()]

        def restore() -> None:
            self._operands = {name: operand for name, operand, _, _ in before}
            for _, operand, scale, history in before:
                history[0] = 0
                operand.scale, operand.history, operand.pending = scale, history, False

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
    """scale: (G,).   history: amaxes, (amax_history_len, G), newest first.   pending: the newest row is not in the scale yet."""

    scale: Tensor
    history: Tensor
    format: torch.dtype
    pending: bool = False

    def record(self, t: Tensor) -> None:
        """Take the amaxes of t (G, ..., ...) into the newest row; non-finite ones are ignored."""
        largest = t.detach().abs().amax(dim=(1, 2)).float()
        torch.maximum(self.history[0], largest.where(largest.isfinite(), 0), out=self.history[0])
        self.pending = True

    def update_scale(self, recipe: Fp8Config) -> None:
        """Compute the scale from the history and start a new row, if amaxes are pending. As Transformer Engine does (common/recipe)."""
        if not self.pending:
            return
        amax = self.history[0] if recipe.amax_compute_algo == "most_recent" else self.history.amax(dim=0)
        largest = torch.finfo(self.format).max
        fresh = torch.where(amax > 0, largest / amax, self.scale)
        self.scale = torch.where(fresh.isinf(), torch.finfo(torch.float32).max, fresh)
        self.history = self.history.roll(1, dims=0)
        self.history[0] = 0
        self.pending = False

    def rounded(self, t: Tensor, record: bool) -> Tensor:
        """t (G, ..., ...) times its scale, as float8; too large values saturate, as in the hardware's casts."""
        if record:
            self.record(t)
        limit = torch.finfo(self.format).max
        return (t.float() * self.scale[:, None, None]).clamp(-limit, limit).to(self.format)


class _Rounded(torch.autograd.Function):
    """(G, M, K) @ (G, K, O) of rounded operands; its gradients are products of rounded operands too."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, operands: tuple[_Operand, _Operand, _Operand], record: bool) -> Tensor:
        (of_left, of_right, of_grad) = operands
        left8, right8 = of_left.rounded(left, record), of_right.rounded(right, record)
        ctx.save_for_backward(left8, right8, of_left.scale, of_right.scale)
        ctx.operands = of_grad, record, left.dtype, right.dtype
        return _product(left8, right8, of_left.scale, of_right.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left8, right8, left_scale, right_scale = ctx.saved_tensors
        of_grad, record, left_dtype, right_dtype = ctx.operands
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


def _description(recipe: Fp8Config) -> str:
    return f"{recipe.format}, delayed scaling by amax {recipe.amax_compute_algo} of {recipe.amax_history_len}"


class Engine:
    """The recipe by Transformer Engine.   Raises one of MISSING where it cannot be imported; see `why_unavailable`.

    For each product the library's module is called with the model's own parameter, transposed, in place of its weight
    (`torch.func.functional_call`), so gradients reach the parameter. Amaxes are not reduced over processes: the library forbids that for a
    module used twice in a region.
    """

    def __init__(self, recipe: Fp8Config) -> None:
        self._description = _description(recipe)
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
        return f"FP8 ({self._description}, Transformer Engine)"

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """The library's autocast; at its end, in training, it updates the scales. Amaxes of an evaluation are discarded."""
        with self._te.autocast(enabled=True, recipe=self._recipe):
            yield
        if not torch.is_grad_enabled():
            for module in self._modules.values():
                if "scaling_fwd" in module.fp8_meta:
                    module.fp8_meta["scaling_fwd"].amax_history[0].zero_()

    def product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight by a Linear, or by a GroupedLinear where each head has its own weights."""
        shaped = shape(name, x, weight)
        groups, rows, inner = shaped.left.shape
        module = self._module(name, groups, inner, shaped.right.shape[2])
        left = shaped.left.reshape(groups * rows, inner)
        if name == GROUPED:
            weights = {f"weight{group}": shaped.right[group].mT.contiguous() for group in range(groups)}
            out = torch.func.functional_call(module, weights, (left, torch.full((groups,), rows)))
        else:
            out = torch.func.functional_call(module, {"weight": shaped.right[0].mT.contiguous()}, (left,))
        return shaped.restore(out.view(groups, rows, -1))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """As that of `Emulated`, so that either continues from the other. Plain tensors; the library's own extra state is a pickle."""
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
        """Continue from `state`; a module takes its part when it is created."""
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
            with torch.random.fork_rng(devices):  # its constructor draws weights that are not used; training must not see the draws
                module = self._te.GroupedLinear(groups, inner, outer, **options) if grouped else self._te.Linear(inner, outer, **options)
            own = {role: self._saved.pop(f"{name}.{role}") for role in ROLES if f"{name}.{role}" in self._saved}
            if len(own) == len(ROLES):
                module.fp8_meta["num_gemms"] = groups
                module.fp8_meta["recipe"] = self._recipe
                module.init_fp8_meta_tensors(self._recipe)
                module.reset_fp8_meta_tensors({key: self._tensors(key, own, groups) for key in COLUMNS})
            self._modules[name] = module
        return self._modules[name]

    def _tensors(self, key: str, own: dict[str, dict[str, Tensor]], groups: int) -> list[Tensor]:
        """Scale and history in the library's order: a product's columns side by side; rows after row 0 from oldest to newest."""
        columns, length = COLUMNS[key], self._recipe.amax_history_len
        scale, history = torch.ones(groups, len(columns)), torch.zeros(length, groups, len(columns))
        for place, role in enumerate(columns):
            if role in own:
                newest_first = _of_length(own[role]["history"], length)
                scale[:, place] = own[role]["scale"]
                history[:, :, place] = torch.cat((newest_first[:1], newest_first[1:].flip(0)))
        return [scale.flatten(), history.flatten(1)]


def why_unavailable(device: torch.device) -> str | None:
    """The reason why Transformer Engine cannot run FP8 on this device, completing "use_fp8 ..."; None if it can."""
    needed = "needs CUDA capability 8.9 or newer"
    if device.type != "cuda":
        return f"{needed}; this machine has no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"{needed}; {device} has CUDA capability {found[0]}.{found[1]} ({torch.cuda.get_device_name(device)})"
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
    except MISSING as error:
        return f"needs Transformer Engine, which cannot be imported ({first_line(error)}): {INSTALL}"
    able, reason = engine.is_fp8_available(return_reason=True)
    return None if able else f"is refused by Transformer Engine: {reason}"


def _of_length(history: Tensor, length: int) -> Tensor:
    """The newest `length` rows (the first ones), padded with zeros: a fork may have another amax_history_len."""
    rows = history.new_zeros(length, history.shape[1])
    kept = min(length, len(history))
    rows[:kept] = history[:kept]
    return rows
