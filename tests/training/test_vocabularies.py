"""A run with a vocabulary, from the training of its tokenizer to the served model: every command reads the same text."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.inference import generate, load
from tests.conftest import history, only_run, run_cli, train
from tests.vocabulary import made

BPE = ("tokenizer.type=huggingface", "tokenizer.path=own/made.json", "model.vocab_size=null")
CONFIG = ("--config", "tiny.yaml")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The tokenizer's file that the settings BPE name."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "made.json").write_bytes(made.bpe())
    return tmp_path / "own" / "made.json"


def saved(step: int) -> Path:
    (found,) = Path("checkpoints").glob(f"*/checkpoint_{step}.pt")
    return found


def weights(step: int) -> Any:
    return checkpoint.load(saved(step))["model_state_dict"]


def test_a_missing_tokenizer_is_trained_and_travels_with_the_run(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    result = train(tiny, *BPE, "tokenizer.train_size=270")
    assert result.exit_code == 0, result.output
    assert "own/made.json does not exist: training a tokenizer of 270 tokens on the training text" in result.output
    trained = (tmp_path / "own" / "made.json").read_bytes()
    run, run_dir = only_run(store), saved(6).parent
    mirrored = Path(run.info.artifact_uri.removeprefix("file://")) / "checkpoints" / run_dir.name / "tokenizer.json"
    assert (run_dir / "tokenizer.json").read_bytes() == mirrored.read_bytes() == trained
    manifest = json.loads(saved(6).with_suffix(".json").read_text())
    assert manifest["tokenizer"]["name"] == "tokenizer.json"
    assert run.data.params["model.vocab_size"] == "270"
    assert run.data.params["tokenizer.digest"] == manifest["tokenizer"]["sha256"][:32]
    (_, loss), (_, bpb) = history(store, run.info.run_id, "val/loss")[-1], history(store, run.info.run_id, "val/bpb")[-1]
    bytes_per_token = loss / math.log(2) / bpb
    assert 1.2 < bytes_per_token < 6
    assert (0, bpb) in history(store, run.info.run_id, "by_bytes/val_bpb"), "96 tokens are less than a thousand bytes"
    assert f"val/bpb {bpb:.4f}" in result.output


def test_resumed_from_the_mirror_alone_it_goes_on_bit_for_bit(store: MlflowClient, text: Path, tiny: Path, own: Path) -> None:
    """Neither the run directory nor the tokenizer's file is here any more, as on another machine."""
    assert train(tiny, *BPE).exit_code == 0
    straight, losses = weights(6), history(store, only_run(store).info.run_id, "train/loss")
    shutil.rmtree("checkpoints")
    assert train(tiny, *BPE, "training.max_iters=3", "scheduler.decay_steps=6", "tracking.experiment=other").exit_code == 0
    run = only_run(store, "other")
    target = f"runs:/{run.info.run_id}/checkpoints/{saved(3).parent.name}/checkpoint_3.pt"
    shutil.rmtree("checkpoints")
    own.unlink()
    result = train(tiny, *BPE, resume=target)
    assert result.exit_code == 0, result.output
    assert (saved(6).parent / "tokenizer.json").read_bytes() == made.bpe()
    assert history(store, run.info.run_id, "train/loss") == losses
    assert all(torch.equal(tensor, straight[name]) for name, tensor in weights(6).items())


def test_another_tokenizer_is_refused_on_resume_and_a_fork_reads_from_the_beginning(
    store: MlflowClient, text: Path, tiny: Path, own: Path
) -> None:
    assert train(tiny, *BPE, "training.max_iters=3").exit_code == 0
    own.write_bytes(made.bpe().replace(b'"use_regex": true', b'"use_regex": false'))
    refused = train(tiny, *BPE, "scheduler.decay_steps=3", resume="latest")
    assert refused.exit_code == 2
    assert re.search(f"tokenizer.digest was .?{made.of_bpe().digest}.?, config says", refused.output)
    forked = train(tiny, *BPE, resume="latest", fork=True)
    assert forked.exit_code == 0, forked.output
    assert "fork: other data or another order of it, so it is read from its beginning" in forked.output
    bytes_again = train(tiny, "scheduler.decay_steps=3", "training.max_iters=6", resume=str(sorted(Path("checkpoints").iterdir())[0]))
    assert bytes_again.exit_code == 2
    assert "tokenizer.type was huggingface, config says byte" in bytes_again.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((*BPE[:2],), "model.vocab_size: 256 is less than the 280 tokens of the tokenizer own/made.json; null follows it"),
        ((BPE[0], BPE[2]), "tokenizer.path: null, and so is tokenizer.name: tokenizer.type huggingface needs one of them"),
        (("tokenizer.path=own/made.json",), "tokenizer.path: "),
        ((*BPE, "tokenizer.name=gpt2"), "tokenizer.name: gpt2 besides tokenizer.path"),
        (("tokenizer.type=sentencepiece", "tokenizer.name=x"), "SentencePiece models have no names; set tokenizer.path"),
        (("tokenizer.type=tiktoken", "tokenizer.path=x", "tokenizer.train_size=300"), "what is trained is a tokenizer.json"),
        ((*BPE, "tokenizer.train_size=200"), "tokenizer.train_size: 200 leaves no room besides the 256 bytes"),
        (("model.vocab_size=255",), "model.vocab_size: 255 does not hold every byte (tokenizer.type is byte)"),
        ((BPE[0], "tokenizer.path=own/made.jsn", BPE[2]), "own/made.jsn: no such file (tokenizer.path); did you mean `made.json`?"),
        ((*BPE, "tokenizer.digest=abc"), "not the tokenizer of this run"),
        ((*BPE, "tokenizer.separator=<s>"), "own/made.json: no token `<s>` (tokenizer.separator)"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_written(
    store: MlflowClient, text: Path, tiny: Path, own: Path, settings: tuple[str, ...], message: str
) -> None:
    result = train(tiny, *settings)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not Path("checkpoints").exists()


def test_a_vocabulary_may_be_larger_than_its_tokenizer(store: MlflowClient, text: Path, tiny: Path, own: Path) -> None:
    assert train(tiny, *BPE[:2], "model.vocab_size=384", "training.max_iters=1").exit_code == 0
    assert weights(1)["embed.weight"].shape == (384, 16)


@pytest.mark.parametrize(
    ("kind", "content", "name"),
    [
        ("huggingface", made.bpe(), "tokenizer.json"),
        ("sentencepiece", made.sentencepiece_model(), "tokenizer.model"),
        ("tiktoken", made.tiktoken_file(), "tokenizer.tiktoken.json"),
    ],
    ids=str,
)
def test_run_exported_file_and_registered_model_write_the_same_text(
    store: MlflowClient, text: Path, tiny: Path, own: Path, kind: str, content: bytes, name: str
) -> None:
    own.write_bytes(content)
    settings = (f"tokenizer.type={kind}", *BPE[1:], "training.max_iters=3")
    result = train(tiny, *settings)
    assert result.exit_code == 0, result.output
    own.unlink()
    assert (saved(3).parent / name).read_bytes() == content
    exported = run_cli("checkpoints", "export", str(saved(3)), "--format", "safetensors", "-o", "out.safetensors", *CONFIG)
    assert exported.exit_code == 0, exported.output
    registered = run_cli("checkpoints", "register", str(saved(3)), "--name", "made", *CONFIG)
    assert registered.exit_code == 0, registered.output
    targets = [str(saved(3)), "out.safetensors", "models:/made/1"]
    models = [load.load(target, Path("checkpoints"), TrackingConfig()) for target in targets]
    greedy = generate.Sampling(temperature=0)
    texts = [generate.write_all(model, ["def return", ""], 12, greedy) for model in models]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] == ["".join(generate.write(models[0], prompt, 12, greedy)) for prompt in ("def return", "")]
    evaluated = [run_cli("evaluate", target, "--no-log", *CONFIG).output.splitlines()[-1] for target in targets]
    logged = history(store, only_run(store).info.run_id, "val/bpb")[-1][1]
    assert evaluated[0] == evaluated[1] == evaluated[2]
    assert f"val/bpb {logged:.4f} on " in evaluated[0]


@pytest.mark.slow  # processes and loader workers that make the tokens themselves
def test_a_vocabulary_resumes_exactly_with_two_workers(store: MlflowClient, text: Path, tiny: Path, own: Path) -> None:
    result = run_cli("verify-resume", *CONFIG, *[w for s in (*BPE, "dataloader.num_workers=2") for w in ("--set", s)])
    assert result.exit_code == 0, result.output
    assert "Exact: " in result.output
