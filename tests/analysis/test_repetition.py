"""The repetition probe: its texts, and what it says of models that do and do not notice."""

import json

import pytest
import torch

from bdh_mlflow.analysis import repetition
from bdh_mlflow.analysis.layers import activations
from bdh_mlflow.model import layer
from tests.analysis import made

LETTERS = torch.arange(97, 123)


def test_texts_repeat_a_word_and_the_null_its_letters() -> None:
    texts = repetition.probe(LETTERS, 5, seed=3)
    warm, measured = repetition.WARM_UP, repetition.WORD * repetition.TIMES
    words = texts.repeated[:, -measured:].unflatten(1, (repetition.TIMES, repetition.WORD))
    assert torch.equal(words, words[:, :1].expand_as(words))
    assert torch.equal(texts.repeated.sort(dim=1).values, texts.shuffled.sort(dim=1).values)
    assert torch.equal(texts.repeated[:, : 8 - measured], texts.shuffled[:, : 8 - measured]), "until the first presentation"
    others = texts.shuffled[:, -measured:].unflatten(1, (repetition.TIMES, repetition.WORD))
    assert not torch.equal(others, others[:, :1].expand_as(others))
    assert all(len(set(row[-measured:].tolist())) == 8 for row in texts.repeated), "no letter twice in a word"
    assert torch.equal(texts.repeated[:, :warm], LETTERS[:warm].expand(5, warm))
    assert torch.equal(texts.repeated, repetition.probe(LETTERS, 5, seed=3).repeated)


def test_an_untrained_model_shows_nothing_and_it_is_said() -> None:
    found = repetition.analyze(made.model(heads=2, multiplier=8, scale=1), LETTERS, 16, 0, {})
    assert "too small to show it" in found.says


@pytest.mark.parametrize("multiplier", [1, 2, 5])
def test_few_neurons_have_fewer_bands(multiplier: int) -> None:
    found = repetition.analyze(made.model(heads=2, multiplier=multiplier), LETTERS, 16, 0, {})
    told = json.loads(found.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert "nan" not in found.tables[0].rows[0]
    assert all(len(bands) == min(8, made.model(heads=2, multiplier=multiplier).neurons) for bands in told["data"]["bands"])


def test_activity_that_falls_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """y is taken from a table: in layer 1 half as many neurons at letters whose predecessor has been followed by them before."""

    def fewer(model: object, idx: torch.Tensor) -> object:
        for depth, found in enumerate(activations(model, idx)):  # type: ignore[arg-type]
            y = torch.ones_like(found.y)
            ids = idx[0].tolist()
            for place in range(1, len(ids)):
                seen = any(ids[s - 1 : s + 1] == ids[place - 1 : place + 1] for s in range(1, place))
                if depth == 1 and seen:
                    y[..., place, : y.shape[-1] // 2] = 0
            yield layer_like(found, y)

    def layer_like(found: object, y: torch.Tensor) -> object:
        return found._replace(x=torch.ones_like(y), y=y)  # type: ignore[attr-defined]

    monkeypatch.setattr(repetition, "activations", fewer)
    found = repetition.analyze(made.model(heads=2, multiplier=8), LETTERS, 16, 0, {})
    assert "in layers 1;" in found.says
    assert found.metrics["analysis/repetition_ratio_l0"] == 1
    assert 1.9 < found.metrics["analysis/repetition_ratio_l1"] <= 2
    assert found.metrics["analysis/repetition_null_l1"] < 1.5
    bands = found.data["bands"][1]
    assert bands[0] > 1.5, "the faster half"
    assert bands[-1] == 1
    assert layer.ACTIVITY_STRIDE, "unused by the probe: every token is counted"
