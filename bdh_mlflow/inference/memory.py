"""What a model remembers of a text that it has read, in a file: generation goes on from there, without the text and its cost.

A safetensors file of the recurrent state, a tensor (H, N, D) a layer in float32, with a header: the weights that have read (sha256), how
many tokens the text has, and its last one, which is read next. The state of other weights would mean nothing, and is refused.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdh_mlflow.errors import CheckpointError, InputError, SaveError
from bdh_mlflow.files import reason_of, shown
from bdh_mlflow.inference.export import digest
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.recurrent import RecurrentState

HEADER = "bdh_mlflow_state"


@dataclass
class Memory:
    """Of one text.   state: after all tokens but the last.   last: its last token, None before the first.   tokens: how many it has."""

    state: RecurrentState
    last: int | None = None
    tokens: int = 0

    @classmethod
    def fresh(cls, model: BDH) -> "Memory":
        """Of a text that nothing has been read of yet."""
        return cls(model.initial_state(1))

    def reading(self, ids: list[int]) -> list[int]:
        """The tokens to read next, for a text that goes on with `ids`."""
        return ids if self.last is None else [self.last, *ids]

    def written(self, tokens: Iterable[Tensor], read: int) -> Iterator[Tensor]:
        """The same tokens, kept in mind.   read: how many were read before the first of them, `last` among them."""
        self.tokens += read - (self.last is not None)
        for token in tokens:
            self.last = int(token)
            self.tokens += 1
            yield token


def write(path: Path, memory: Memory, model: BDH, of: str) -> None:
    """Write a memory of what `model` has read; an older file is replaced only by a complete one.   of: the model, for messages.

    Raises SaveError.
    """
    tensors = {f"layer_{depth}": layer[0].cpu().contiguous() for depth, layer in enumerate(memory.state.layers)}
    header = {"weights": _digest(model), "of": of, "last": memory.last, "tokens": memory.tokens}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={HEADER: json.dumps(header)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"{shown(path)}: the state is not written: {reason_of(error) if isinstance(error, OSError) else error}") from error


def read(path: Path, model: BDH) -> Memory:
    """What `write` wrote.   Raises CheckpointError for any other file, InputError for one of other weights."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            layers = [file.get_tensor(f"layer_{depth}").unsqueeze(0) for depth in range(model.config.n_layer)]
            held = {name: header[name] for name in ("weights", "of", "last", "tokens")}
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path)}: no such file") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = "it does not say what it is of" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{shown(path)}: damaged, or no state that generate --save-state wrote: {reason}") from None
    _check(path, held, model)
    expected = model.initial_state(1).layers
    if any(own.shape != layer.shape or not bool(layer.isfinite().all()) for own, layer in zip(expected, layers, strict=True)):
        raise CheckpointError(f"{shown(path)}: damaged: it has other sizes than this model, or values that are not finite")
    return Memory(RecurrentState(layer.to(own) for layer, own in zip(layers, expected, strict=True)), held["last"], held["tokens"])


def _check(path: Path, held: dict[str, Any], model: BDH) -> None:
    if held["weights"] != _digest(model):
        raise InputError(
            f"{shown(path)}: read by other weights ({held['of']}), so it means nothing to these; name that model, or read the text again"
        )
    last, tokens = held["last"], held["tokens"]
    if type(last) is not int or type(tokens) is not int or not (0 <= last < model.config.vocab_size and tokens > 0):
        raise CheckpointError(f"{shown(path)}: damaged: last token {last!r}, {tokens!r} tokens")


def _digest(model: BDH) -> str:
    return digest("", {name: weights.cpu() for name, weights in model.state_dict().items()})
