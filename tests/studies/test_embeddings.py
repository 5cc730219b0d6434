"""A look at a model's tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow.errors import InputError
from bdh_mlflow.studies.embeddings import Embeddings
from bdh_mlflow.vocabulary import BYTES
from tests.conftest import only_run, run_cli, train
from tests.vocabulary import made


def byte_vectors() -> torch.Tensor:
    """256 vectors in three dimensions: nearly all at one point, `a` and `b` side by side, `z` on the other side."""
    vectors = torch.full((256, 3), 5.0)
    vectors[ord("a")], vectors[ord("b")], vectors[ord("z")] = torch.tensor([[8.0, 5, 5], [9.0, 5, 5.5], [2.0, 5, 5]])
    return vectors


def test_nearness_is_the_angle_around_the_mean() -> None:
    look = Embeddings(byte_vectors(), BYTES)
    near = look.nearest(ord("a"), 255)
    assert (near[0].token, near[-1].token, len(near)) == (ord("b"), ord("z"), 254)
    assert near[0].cosine == pytest.approx(4 / np.hypot(4, 0.5), abs=0.01)
    assert near[-1].cosine == pytest.approx(-1, abs=0.01)
    assert 0 not in look.ids, "the separator stands for no text"
    assert look.norms[ord("z")] == pytest.approx(np.sqrt(4 + 25 + 25))


def test_the_map_has_the_two_largest_directions() -> None:
    places, share = Embeddings(byte_vectors(), BYTES).plane()
    assert places.shape == (255, 2)
    assert share == pytest.approx(1.0), "all differences lie in a plane"
    assert places[ord("a") - 1, 0] * places[ord("z") - 1, 0] < 0
    assert np.abs(places).max(axis=0).tolist() == places.max(axis=0).tolist()


def test_a_text_of_one_token_is_found_and_another_is_refused_with_its_tokens() -> None:
    look = Embeddings(torch.randn(made.SIZE, 4), made.of_bpe())
    assert look.token_of("return") == made.of_bpe().encode("return")[0]
    with pytest.raises(InputError, match=r"'returnx': 2 tokens \('return' 'x'\); accepted: the text of one token"):
        look.token_of("returnx")
    with pytest.raises(InputError, match="0 tokens"):
        look.token_of("")


def test_the_command_draws_the_map_into_the_run(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny, "training.max_iters=3", "training.ema_decay=0.5").exit_code == 0
    result = run_cli("embeddings", "latest", "--token", "e", "--config", str(tiny))
    assert result.exit_code == 0, result.output
    run = only_run(store)
    assert [file.path for file in store.list_artifacts(run.info.run_id, "embeddings")] == ["embeddings/embeddings_3.png"]
    assert Path("embeddings_3.png").read_bytes().startswith(b"\x89PNG")
    assert run_cli("embeddings", "latest", "--no-log", "--ema", "--config", str(tiny)).exit_code == 0
    assert run_cli("embeddings", "latest", "--token", "two", "--config", str(tiny)).exit_code == 2
    assert run_cli("embeddings", "latest", "--out", "x.jpg", "--config", str(tiny)).exit_code == 2
