"""The parts of a training run, as a configuration asks for them, and what is said of them."""

from typing import Any

import pytest
import torch

from bdh_mlflow.config import Config, Machine, resolve
from bdh_mlflow.model import native
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.training.build import build_network
from tests.conftest import tiny_config

DEVICE = torch.device("cpu")
KEPT = 8 * 2 * 2 * 2 * 8 * 32 * 4  # bytes of activations of the tiny network


def built(free_bytes: int, dtype: str = "float32", **training: Any) -> tuple[Config, Any, dict[str, str]]:
    config, why = resolve(tiny_config(training=training, low_precision={"compute_dtype": dtype}), Machine("cpu", free_bytes))
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


@pytest.mark.parametrize(
    ("training", "dtype", "compiler", "passes", "compiled"),
    [
        ({}, "float32", "g++", "C++ (g++ 12)", "no (auto on cpu)"),
        ({"compile": True}, "bfloat16", "g++", "C++ (g++ 12)", "no (blocked layers on a CPU have their elementwise passes in C++)"),
        ({}, "bfloat16", None, "PyTorch, a step takes up to 1.13 times as long (no compiler)", "no (auto on cpu)"),
        ({}, "float16", "g++", "PyTorch (none in C++ for float16)", "no (auto on cpu)"),
        ({"layer_form": "reference"}, "float32", "g++", "PyTorch", "no (auto on cpu)"),
    ],
)
def test_a_tag_says_who_does_the_elementwise_work(
    training: dict[str, Any], dtype: str, compiler: str | None, passes: str, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: (object(), f"{compiler} 12") if compiler else (None, "no compiler"))
    _, _, facts = built(2**33, dtype, **training)
    assert (facts["bdh.passes"], facts["bdh.compiled"]) == (passes, compiled)


def test_number_of_parameters_is_that_of_the_network() -> None:
    config, network, _ = built(2**33)
    assert config.parameters == sum(p.numel() for p in network.parameters())
    assert config.neurons == network.neurons
