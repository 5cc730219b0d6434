"""Models laid side by side, and grown ones: what they compute is known."""

import pytest
import torch

from bdh_mlflow.model import join
from bdh_mlflow.model.bdh import BDH, BDHConfig

CONFIG = BDHConfig(n_layer=3, n_embd=16, dropout=0.0, n_head=2, mlp_internal_dim_multiplier=4)


def model(seed: int, copies: int = 1) -> BDH:
    torch.manual_seed(seed)
    return BDH(BDHConfig(**{**vars(CONFIG), "mlp_internal_dim_multiplier": 4 * copies})).eval()


def trained(seed: int) -> BDH:
    """Large weights, as training makes them: of small ones the epsilon of LayerNorm is a part of the result."""
    made = model(seed)
    with torch.no_grad():
        for weights in made.parameters():
            weights.mul_(10)
    return made


def with_weights(weights: dict[str, torch.Tensor], copies: int) -> BDH:
    wider = model(9, copies)
    wider.load_state_dict(weights)
    return wider


IDX = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("copies", [2, 3])
def test_a_model_merged_with_itself_is_that_model(copies: int) -> None:
    one = trained(1)
    joined = join.concatenated([one.state_dict()] * copies)
    assert torch.equal(joined["decoder"].unflatten(0, (2, -1))[:, :32], one.decoder.unflatten(0, (2, -1)) / copies)
    assert torch.allclose(with_weights(joined, copies)(IDX)[0], one(IDX)[0], atol=1e-4)


def test_neurons_keep_their_weights_and_frequencies_and_the_rest_is_a_mean() -> None:
    models = [trained(1), trained(2)]
    joined = join.concatenated([each.state_dict() for each in models])
    assert torch.equal(joined["embed.weight"], (models[0].embed.weight + models[1].embed.weight) / 2)
    assert torch.equal(joined["encoder"][:, :, 32:], models[1].encoder)
    assert torch.equal(joined["decoder"].unflatten(0, (2, -1))[:, 32:].flatten(0, 1), models[1].decoder / 2)
    assert torch.equal(joined["attn.freqs"][..., 32:], models[0].attn.freqs)


@pytest.mark.parametrize("copies", [2, 5])
def test_a_grown_model_gives_the_same_logits_and_its_copies_part(copies: int) -> None:
    one = trained(1)
    wider = with_weights(join.grown(one.state_dict(), copies), copies)
    with torch.no_grad():
        expected, found = one(IDX)[0], wider(IDX)[0]
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert torch.equal(join.grown(one.state_dict(), copies)["decoder"], join.grown(one.state_dict(), copies)["decoder"])
    loss = wider(IDX, IDX)[1]
    loss.backward()
    gradients = wider.encoder.grad.unflatten(2, (copies, -1))
    moved = gradients.abs().amax(dim=(1, 2)) > 0
    assert not torch.allclose(gradients[:, :, 0], gradients[:, :, 1], rtol=0.01)
    assert moved.any()


def test_likeness_is_that_of_the_least_like_projection() -> None:
    one, other = model(1).state_dict(), model(2).state_dict()
    assert join.likeness(one, one) == pytest.approx(1)
    assert abs(join.likeness(one, other)) < 0.1
    half = {**one, "decoder": other["decoder"]}
    assert abs(join.likeness(one, half)) < 0.1
