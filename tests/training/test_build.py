"""The parts of a training run, as a configuration asks for them, and what is said of them."""

from typing import Any

import pytest
import torch

from bdh_mlflow.config import Config, Machine, resolve
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.training.build import build_network
from tests.conftest import tiny_config

DEVICE = torch.device("cpu")
KEPT = 8 * 2 * 2 * 2 * 8 * 32 * 4  # bytes of activations of the tiny network


def built(free_bytes: int, **training: Any) -> tuple[Config, Any, dict[str, str]]:
    config, why = resolve(tiny_config(training=training), Machine("cpu", free_bytes))
    network, _, facts = build_network(config, why, Precision.from_config(config, DEVICE), DEVICE)
    return config, network, facts


@pytest.mark.parametrize(
    ("training", "free_bytes", "form"),
    [
        ({}, 2**33, "blocked (auto on cpu; activations recomputed in the backward pass)"),
        ({"layer_form": "blocked"}, 2**33, "blocked (as configured; activations recomputed in the backward pass)"),
        ({"layer_form": "reference"}, 2**33, "reference (as configured; activations kept, 0.0 GiB)"),
        (
            {"layer_form": "reference"},
            KEPT,
            "reference (as configured; activations recomputed in the backward pass: auto, 0.0 GiB if kept, 0.0 GiB free)",
        ),
        (
            {"layer_form": "reference", "recompute": True},
            2**33,
            "reference (as configured; activations recomputed in the backward pass)",
        ),
    ],
)
def test_network_is_computed_as_resolved_and_the_tag_says_why(training: dict[str, Any], free_bytes: int, form: str) -> None:
    config, network, facts = built(free_bytes, **training)
    assert config.activation_bytes == KEPT
    assert (network.form, network.recompute) == (config.training.layer_form, config.training.recompute)
    assert (facts["bdh.layer_form"], facts["bdh.compiled"]) == (form, "no (auto on cpu)")


def test_number_of_parameters_is_that_of_the_network() -> None:
    config, network, _ = built(2**33)
    assert config.parameters == sum(p.numel() for p in network.parameters())
    assert config.neurons == network.neurons
