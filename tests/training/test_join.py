"""Which checkpoints may be merged, and with which settings the new run begins."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.config import Config
from bdh_mlflow.errors import InputError
from bdh_mlflow.tracking import locate
from bdh_mlflow.tracking.resolved import ResolvedCheckpoint
from bdh_mlflow.training import join
from tests.conftest import train


def found(target: Path | str, tiny: Path) -> ResolvedCheckpoint:
    config = Config.from_yaml(tiny)
    return locate.Locator(Path(config.training.checkpoint_dir), config.tracking).find(str(target))


@pytest.fixture
def here(tiny: Path) -> Config:
    return Config.from_yaml(tiny)


def trained(tiny: Path, *settings: str, **how: Any) -> ResolvedCheckpoint:
    before = set(checkpoint.list_all(Path("checkpoints")))
    result = train(tiny, *settings, **how)
    assert result.exit_code == 0, result.output
    (new,) = set(checkpoint.list_all(Path("checkpoints"))) - before
    return found(new, tiny)


def test_forks_are_told_from_strangers_by_their_weights(store: MlflowClient, text: Path, tiny: Path, here: Config) -> None:
    base = trained(tiny)
    fork = trained(tiny, "training.max_iters=8", resume=f"{base.path}", fork=True)
    begun = join.merged([base, fork], here)
    assert begun.likeness is not None
    assert begun.likeness > 0.9
    assert begun.config.model.mlp_internal_dim_multiplier == 8
    assert begun.config.training.layer_form == "auto"
    stranger = trained(tiny, "training.seed=7")
    with pytest.raises(InputError, match=r"not forks of one model.*\(cosine -?0\.0\d.*--strangers"):
        join.merged([base, fork, stranger], here)
    assert join.merged([base, stranger], here, strangers=True).config.neurons == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.n_head=4",), r"model.n_head: 2 in .*, 4 in "),
        (("model.vocab_size=300",), r"model.vocab_size: 256 in .*, 300 in "),
        (("low_precision.use_4bit=true", "model.mlp_internal_dim_multiplier=64"), r"low_precision.use_4bit: False in .*, True in "),
    ],
    ids=["shape", "vocabulary", "precision"],
)
def test_models_that_do_not_fit_are_refused_with_the_difference(
    store: MlflowClient, text: Path, tiny: Path, here: Config, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        join.merged([trained(tiny), trained(tiny, *settings)], here)


def test_other_frequencies_weights_alone_and_one_checkpoint_are_refused(store: MlflowClient, text: Path, tiny: Path, here: Config) -> None:
    base = trained(tiny)
    other = found(base.path, tiny)
    other.state["model_state_dict"]["attn.freqs"] *= 2
    with pytest.raises(InputError, match=r"attn\.freqs: other frequencies"):
        join.merged([base, other], here)
    other.state["model_state_dict"]["encoder"][0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"encoder: not all values are finite"):
        join.merged([base, other], here, strangers=True)
    with pytest.raises(InputError, match="one checkpoint is named"):
        join.merged([base], here)
    torch.save(base.state["model_state_dict"], "bare.pt")
    with pytest.raises(InputError, match=r"bare\.pt: bare weights"):
        join.merged([base, found("bare.pt", tiny)], here)


@pytest.mark.parametrize("multiplier", [4, 6, 2])
def test_a_model_grows_by_whole_copies(store: MlflowClient, text: Path, tiny: Path, here: Config, multiplier: int) -> None:
    base = trained(tiny)
    with pytest.raises(InputError, match=r"accepted: 8, 12, \.\.\."):
        join.grown(base, here, multiplier)
    assert join.grown(base, here, 12).config.model.mlp_internal_dim_multiplier == 12
