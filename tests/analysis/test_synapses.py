"""Synapses over a text."""

import pytest
import torch

from bdh_mlflow.analysis import synapses
from bdh_mlflow.analysis.layers import activations, state_at
from bdh_mlflow.errors import InputError
from bdh_mlflow.model.fade import Fading
from tests.analysis import made


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("latin1")


def test_the_strongest_are_those_of_the_state() -> None:
    model, ids = made.model(heads=2, multiplier=4), torch.randint(0, 256, (60,)).tolist()
    found = synapses.analyze(model, ids, 1, 1, decode, {})
    layers = list(activations(model, torch.tensor([ids])))
    matrix = (state_at(layers[1], 1, model, 60)[0] @ model.encoder_v[1]).detach()
    matrix.fill_diagonal_(0)
    source, target = divmod(int(matrix.argmax()), model.neurons)
    assert found.tables[0].rows[0][:2] == [f"{source} -> {target}", f"{float(matrix[source, target]):.3f}"]
    assert len(found.data["values"]) == synapses.SHOWN
    assert found.data["moments"][-1] == 60


def test_a_layer_that_remembers_nothing_is_told() -> None:
    model = made.model(heads=2, multiplier=4)
    model.fade = Fading(2, 1e6)
    with torch.no_grad():
        model.encoder_v.zero_()
    found = synapses.analyze(model, torch.randint(0, 256, (60,)).tolist(), 1, 1, decode, {})
    assert found.says == "no synapse of layer 1, head 1 is above zero after 60 tokens"
    assert found.figure is None


def test_short_texts_and_unknown_places_are_refused() -> None:
    model = made.model()
    with pytest.raises(InputError, match="a text of 5 tokens is too short"):
        synapses.analyze(model, [1] * 5, 0, 0, decode, {})
    with pytest.raises(InputError, match="--layer 2: this model has layers 0 to 1"):
        synapses.analyze(model, [1] * 50, 2, 0, decode, {})
    with pytest.raises(InputError, match="--head -1: this model has heads 0 to 0"):
        synapses.analyze(model, [1] * 50, 0, -1, decode, {})
