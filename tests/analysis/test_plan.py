"""What may be asked of a model."""

import dataclasses

import pytest
import torch

from bdh_mlflow.analysis.plan import Plan, Subject, checked, findings, letters_of
from bdh_mlflow.errors import InputError
from bdh_mlflow.vocabulary import BYTES
from tests.analysis import made

WINDOWS = [torch.randint(0, 256, (2, 41), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)]


def subject(windows: list[torch.Tensor] = WINDOWS) -> Subject:
    return Subject(made.model(layers=3, heads=2, multiplier=4), BYTES, windows, {"step": 7})


def test_all_analyses_of_a_model_leave_it_as_it_was() -> None:
    about = subject()
    about.model.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan = checked(Plan(words=8), about)
    assert plan.layer == 1
    found = {each.name: each for each in findings(about, plan)}
    assert list(found) == ["activity", "repetition", "graph", "synapses_l1h0"]
    assert about.model.training
    assert torch.equal(torch.get_rng_state(), before), "a training that looks on the way draws the same numbers"
    for each in found.values():
        assert each.made_of["step"] == 7
        assert set(each.files(7)) == {f"analysis/{each.name}/step_7.svg", f"analysis/{each.name}/step_7.json"}
        assert all(key.startswith("analysis/") for key in each.metrics)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(names=("activty",)), "activty: no analysis of that name; accepted: activity, "),
        (Plan(layer=3), "--layer 3: this model has layers 0 to 2"),
        (Plan(head=2), "--head 2: this model has heads 0 to 1"),
        (Plan(names=("selectivity",)), "--sentences FILE"),
    ],
)
def test_what_cannot_be_asked_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked(plan, subject())


def test_models_and_texts_without_anything_to_see_are_refused() -> None:
    broken = subject()
    broken.model.encoder.data[0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not all finite"):
        checked(Plan(), broken)
    with pytest.raises(InputError, match="no validation text"):
        checked(Plan(), subject([]))
    assert checked(Plan(names=("graph", "synapses"), text="x" * 50), subject([])).layer == 1


def test_letters_are_tokens_of_one_letter() -> None:
    assert letters_of(BYTES).tolist() == list(range(97, 123))
    few = dataclasses.replace(BYTES, encode=lambda text: [1, 2]) if dataclasses.is_dataclass(BYTES) else None
    if few is not None:
        with pytest.raises(InputError, match="0 tokens of single letters; 13 are needed"):
            letters_of(few)
