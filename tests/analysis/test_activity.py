"""Active neurons, counted by hand."""

import torch

from bdh_mlflow.analysis import activity
from tests.analysis import made


def test_shares_of_a_known_network() -> None:
    model = made.model(layers=1, width=8, multiplier=1)
    with torch.no_grad():
        model.encoder.zero_()
        model.encoder[0, :, 0] = model.embed.weight[65] - model.embed.weight[65].mean()  # active for A
        model.encoder[0, :, 1] = -model.encoder[0, :, 0]
    found = activity.analyze(model, [torch.full((2, 10), 65)], {})
    assert found.metrics["analysis/active_x_l0"] == 1 / 8, "one neuron at each token"
    assert found.metrics["analysis/dead_x_l0"] == 7 / 8
    assert found.metrics["analysis/active_xy_l0"] <= 1 / 8
    assert found.made_of["tokens"] == 20
    assert found.figure is not None
    assert found.figure.startswith("<?xml")
    assert found.tables[0].rows[0][1] == "12.50 %"


def test_the_figure_is_the_same_text_each_time() -> None:
    windows = [torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))]
    first, second = (activity.analyze(made.model(), windows, {"step": 3}) for _ in range(2))
    assert first == second
