"""The next token: greedy, or drawn among the tokens that the limits leave."""

import pytest
import torch

from bdh_mlflow.errors import NonFiniteError
from bdh_mlflow.model.sampling import Sampler

LOGITS = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))


def drawn(sampler: Sampler, times: int) -> set[int]:
    return {int(sampler.draw(LOGITS)) for _ in range(times)}


def test_top_k_never_takes_another_token() -> None:
    found = drawn(Sampler(temperature=5.0, top_k=3), 50)
    assert found <= set(LOGITS[0].topk(3).indices.tolist())
    assert len(found) > 1


@pytest.mark.parametrize("kept", [1, 3])
def test_top_p_keeps_the_likeliest_that_reach_it(kept: int) -> None:
    likelihood = (LOGITS[0] / 3).softmax(-1).sort(descending=True)
    top_p = float(likelihood.values[:kept].sum()) - 1e-5
    found = drawn(Sampler(temperature=3.0, top_p=top_p), 40)
    assert found <= set(likelihood.indices[:kept].tolist())
    assert len(found) > (kept > 1)


@pytest.mark.parametrize("sampler", [Sampler(temperature=0), Sampler(temperature=1e-40), Sampler(top_p=0.0), Sampler(top_k=1)], ids=str)
def test_extreme_sampling_still_takes_the_likeliest(sampler: Sampler) -> None:
    assert drawn(sampler, 5) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.0), Sampler(top_k=3, top_p=0.5)])
def test_logits_that_are_no_numbers_are_an_error_and_no_token(value: float, sampler: Sampler) -> None:
    logits = LOGITS.clone()
    logits[0, 7] = value
    with pytest.raises(NonFiniteError, match="non-finite values"):
        sampler.draw(logits)
