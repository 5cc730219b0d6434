"""What a network remembers of a text, so that it can read on."""

from collections.abc import Iterable

from torch import Tensor


class RecurrentState:
    """Of each layer, the sum of q[s] v[s]^T over the tokens that were read, as it is seen from the token that comes next.

    layers: L tensors (B, H, N, D). A forward pass puts new ones in their place and changes none, so a copy of the list is the state before.
    """

    def __init__(self, layers: Iterable[Tensor]) -> None:
        self.layers = list(layers)

    def expect(self, rows: int) -> None:
        """Raises ValueError for a text of another number of rows: one row's state would silently be everybody's."""
        if any(len(layer) != rows for layer in self.layers):
            raise ValueError(f"a state of {len(self.layers[0])} rows for a text of {rows}")

    def detached(self) -> "RecurrentState":
        """The same values as constants: no gradient reaches the text that was read."""
        return RecurrentState(layer.detach() for layer in self.layers)
