"""A model in memory that continues prompts: any text, and settings that text can be drawn with."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_mlflow.errors import InputError, NonFiniteError
from bdh_mlflow.inference import generate
from bdh_mlflow.inference.generate import Loaded, Sampling
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.vocabulary import BYTES
from tests.conftest import tiny_config


@pytest.fixture
def loaded() -> Loaded:
    config = tiny_config()
    contents = generate.Contents(BDH(config.to_bdh_config()).state_dict(), config, BYTES, {})
    return generate.from_weights(contents, Path("x"), 1, ())


@pytest.mark.parametrize("prompt", ["", "a", "a\0b", "日本語", "\udcff", "\U0001f600", "x" * 300])
def test_any_bytes_are_a_prompt(loaded: Loaded, prompt: str) -> None:
    assert len("".join(generate.write(loaded, prompt, 4, Sampling(seed=1)))) >= 1


def test_several_prompts_may_be_none(loaded: Loaded) -> None:
    assert generate.write_all(loaded, [], 4) == []
    assert len(generate.write_all(loaded, ["", "a", "x" * 300], 4, Sampling(seed=1))) == 3


@pytest.mark.parametrize(("prompt", "stop"), [("\ud800", ""), ("a", "\ud800")])
def test_half_a_surrogate_pair_is_no_text(loaded: Loaded, prompt: str, stop: str) -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        generate.write_all(loaded, [prompt], 4, Sampling(stop=stop))


@pytest.mark.parametrize(
    "values",
    [{"temperature": math.nan}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": math.nan}, {"seed": -1}, {"seed": 2**63}],
)
def test_settings_that_no_text_can_be_drawn_with_are_refused_by_name(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InputError, match=f"{name}: .*; accepted: "):
        Sampling(**values)


def test_weights_that_are_no_numbers_write_no_text(loaded: Loaded) -> None:
    with torch.no_grad():
        loaded.model.lm_head.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        generate.write_all(loaded, ["a"], 4)
