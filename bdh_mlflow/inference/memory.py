"""What a model remembers of a text that it has read, in a file: generation goes on from there, without the text and its cost.

A safetensors file of the recurrent state, a tensor (H, N, D) a layer in float32, with a header: the weights that have read (sha256), how
many tokens the text has, and its last one, which is read next. The state of other weights would mean nothing, and is refused.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bdh_mlflow.errors import InputError
from bdh_mlflow.files import shown
from bdh_mlflow.inference.export import DIGEST, digest, read_whole, save_whole
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
    header = json.dumps({"weights": _digest(model), "of": of, "last": memory.last, "tokens": memory.tokens})
    save_whole(path, tensors, {HEADER: header, DIGEST: digest(header, tensors)})


def read(path: Path, model: BDH) -> Memory:
    """What `write` wrote.   Raises CheckpointError for any other file, InputError for one of other weights."""
    other = "no state that generate --save-state wrote"
    metadata, layers = read_whole(path, HEADER, other, other)
    held = json.loads(metadata[HEADER])  # written by `write`, as its digest says
    if held["weights"] != _digest(model):
        raise InputError(
            f"{shown(path)}: saved with other weights ({held['of']}); name that checkpoint, or run the prompt again without --state"
        )
    like = model.decoder
    state = RecurrentState(layers[f"layer_{depth}"].unsqueeze(0).to(like) for depth in range(model.config.n_layer))
    return Memory(state, held["last"], held["tokens"])


def _digest(model: BDH) -> str:
    """Of what computes the state: the weights, and how attention fades."""
    return digest(str(model.config.attention_decay), {name: weights.cpu() for name, weights in model.state_dict().items()})
