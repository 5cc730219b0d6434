"""`checkpoints merge`, `checkpoints grow`, and `evaluate` of several."""

import re
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from tests.conftest import documents, run_cli, train, write_shards


def newest(store: MlflowClient) -> tuple[Path, dict[str, str]]:
    """The run that began last: its directory and tags."""
    (experiment,) = store.search_experiments(filter_string="name = 'bdh'")
    run = store.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]
    return Path("checkpoints") / run.data.tags["bdh.run_dir"], run.data.tags


def test_forks_are_merged_compared_and_trained_on(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "other", documents(80, seed=5))
    options = ("--config", str(tiny))
    assert train(tiny).exit_code == 0
    base, _ = newest(store)
    assert train(tiny, "training.max_iters=8", "dataset.parquet_dir=other", resume=str(base), fork=True).exit_code == 0
    fork, _ = newest(store)
    result = run_cli("checkpoints", "merge", str(base), str(fork), *options)
    assert result.exit_code == 0, result.output
    merged, tags = newest(store)
    assert tags["bdh.merged_from"].count("runs:/") == 2
    assert (merged / "checkpoint_0.pt").is_file()
    assert "Merged: 0.01 M parameters at step 0, val/loss " in result.output
    saved = checkpoint.load(merged / "checkpoint_0.pt")
    assert torch.equal(
        saved["model_state_dict"]["attn.freqs"][..., :32], checkpoint.load(base / "checkpoint_6.pt")["model_state_dict"]["attn.freqs"]
    )
    places = (str(base), str(fork), str(merged))
    compared = run_cli("evaluate", *places, "--data", "text", "--data", "other", *options)
    assert compared.exit_code == 0, compared.output
    assert compared.output.count(", step ") == 3
    assert "┃ text " in compared.output
    assert "┃ other " in compared.output
    write_shards(tmp_path / "deeper" / "other", documents(80))
    alike = run_cli("evaluate", str(base), "--data", "other", "--data", "deeper/other", *options)
    assert (alike.exit_code, "several folders are called other" in alike.output) == (2, True)
    again = train(merged / "config.yaml", "training.max_iters=3", resume=str(merged))
    assert again.exit_code == 0, again.output
    state = checkpoint.load(merged / "checkpoint_3.pt")
    assert torch.equal(state["model_state_dict"]["attn.freqs"], saved["model_state_dict"]["attn.freqs"])
    text_of = run_cli("generate", str(merged), "--max-new-tokens", "5", "--temperature", "0", *options)
    assert text_of.exit_code == 0, text_of.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "model.n_layer=3"), "model.n_layer=3: the weights are of 2"),
        (("--set", "model.n_embd=32"), "model.n_embd=32: the weights are of 16"),
        (("--multiplier", "400000000000"), r"--multiplier 400000000000: .* GiB are needed"),
    ],
)
def test_what_the_weights_are_not_of_is_refused(store: MlflowClient, text: Path, tiny: Path, words: tuple[str, ...], message: str) -> None:
    assert train(tiny, "training.max_iters=1").exit_code == 0
    result = run_cli("checkpoints", "grow", "latest", "--multiplier", "8", *words, "--config", str(tiny))
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output
    assert len(checkpoint.list_all(Path("checkpoints"))) == 1


def test_a_grown_model_evaluates_as_before_and_is_exported_with_its_frequencies(store: MlflowClient, text: Path, tiny: Path) -> None:
    options = ("--config", str(tiny))
    assert train(tiny, "training.ema_decay=0.5").exit_code == 0
    base, _ = newest(store)
    result = run_cli("checkpoints", "grow", str(base), "--multiplier", "12", "--out", "wide", *options)
    assert result.exit_code == 0, result.output
    (grown,) = checkpoint.list_all(Path("wide"))
    losses = [run_cli("evaluate", str(place), *options).output.splitlines()[1] for place in (base, grown)]
    assert losses[0] == losses[1]
    for average in ((), ("--ema",)):
        assert (
            run_cli("checkpoints", "export", str(grown), "--format", "safetensors", "-o", "w.safetensors", *average, *options).exit_code
            == 0
        )
        exported = run_cli("evaluate", "w.safetensors", *options)
        assert exported.output.splitlines()[1] == losses[0]
