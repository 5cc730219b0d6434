"""The folder for Hugging Face transformers: our logits, constant cost, text read back, in a process without this package."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")  # where transformers copies code to, read when it is imported

from transformers import AutoModelForCausalLM, AutoTokenizer

from bdh_mlflow import checkpoint
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.inference import generate, load
from bdh_mlflow.inference.generate import Loaded
from tests.conftest import run_cli, train
from tests.vocabulary import made

CONFIG = ("--config", "tiny.yaml")
OPEN = {"trust_remote_code": True}
BPE = ("tokenizer.type=huggingface", "tokenizer.path=made.json", "model.vocab_size=null")
KINDS = {
    "bytes": (),
    "huggingface": BPE,
    "sentencepiece": ("tokenizer.type=sentencepiece", *BPE[1:]),
    "tiktoken": ("tokenizer.type=tiktoken", *BPE[1:]),
}
CONTENTS = {"huggingface": made.bpe, "sentencepiece": made.sentencepiece_model, "tiktoken": made.tiktoken_file}


def exported(tmp_path: Path, *settings: str) -> tuple[Path, Loaded]:
    """A trained model as a folder, and as our own commands load it."""
    result = train(tmp_path / "tiny.yaml", "training.max_iters=3", *settings)
    assert result.exit_code == 0, result.output
    (saved,) = Path("checkpoints").glob("*/checkpoint_3.pt")
    done = run_cli("checkpoints", "export", str(saved), "--format", "huggingface", "-o", "folder", *CONFIG)
    assert done.exit_code == 0, done.output
    return tmp_path / "folder", load.load(str(saved), Path("checkpoints"), TrackingConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_logits_and_our_text(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, kind: str) -> None:
    if kind in CONTENTS:
        (tmp_path / "made.json").write_bytes(CONTENTS[kind]())
    folder, own = exported(tmp_path, *KINDS[kind])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, **OPEN).eval(), AutoTokenizer.from_pretrained(folder, **OPEN)
    for words in ("def return self = x", "na\u00efve <|endoftext|> \U0001f600"):
        ids = tokenizer(words)["input_ids"]
        assert ids == own.tokenizer.encode(words)
        assert tokenizer.decode(ids).removeprefix(" ") == words
    idx = torch.randint(1, own.config.vocab_size, (2, 300))  # more than the tokens whose scores are computed at once
    with torch.no_grad():
        assert torch.allclose(model(idx).logits, own.model(idx)[0], atol=1e-5)
    prompt = tokenizer("def return", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    greedy = "".join(generate.write(own, "def return", 12, generate.Sampling(temperature=0)))
    assert own.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :].tolist()) == greedy


@pytest.fixture
def four_bit(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> tuple[Path, Loaded]:
    return exported(tmp_path, "low_precision.use_4bit=true", "model.mlp_internal_dim_multiplier=64", "model.attention_decay=2")


def test_weights_are_those_of_the_evaluation_and_the_card_says_where_they_come_from(four_bit: tuple[Path, Loaded], tmp_path: Path) -> None:
    folder, own = four_bit
    model = AutoModelForCausalLM.from_pretrained(folder, **OPEN).eval()
    idx = torch.randint(1, 256, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model(idx).logits, own.model(idx)[0], atol=1e-5)
        assert not torch.equal(model.encoder, own.model.encoder), "rounded to 4 bits"
    (saved,) = Path("checkpoints").glob("*/checkpoint_3.pt")
    manifest, card = checkpoint.describe(saved).manifest, (folder / "README.md").read_text()
    assert isinstance(manifest, checkpoint.Manifest)
    for part in (
        manifest.mlflow_run_id,
        manifest.data_digest,
        manifest.files[0].sha256,
        f"{manifest.val_bpb:.4f}",
        "nf4 values",
        "use_4bit: true",
    ):
        assert part is not None
        assert part in card
    assert str(tmp_path) not in card, "no path of this machine"
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_bdh.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_state_carries_on_and_padding_is_left_out_of_it(four_bit: tuple[Path, Loaded]) -> None:
    folder, _ = four_bit
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, **OPEN).eval(), AutoTokenizer.from_pretrained(folder, **OPEN)
    idx = torch.randint(1, 256, (2, 200))
    with torch.no_grad():
        straight, first = model(idx).logits, model(idx[:, :150], use_cache=True)
        second = model(idx[:, 150:], cache=first.cache)
    assert torch.allclose(torch.cat((first.logits, second.logits), dim=1), straight, atol=1e-5)
    assert second.cache.position == 200
    prompts = ["x", "def return self"]
    together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row, -8:], alone[0, -8:])
    prompt = tokenizer("def", return_tensors="pt")
    cached, recomputed = (model.generate(**prompt, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, recomputed)


def test_loss_of_labels_is_ours_and_gives_gradients(four_bit: tuple[Path, Loaded]) -> None:
    folder, own = four_bit
    model = AutoModelForCausalLM.from_pretrained(folder, **OPEN).eval()
    idx = torch.randint(1, 256, (2, 20))
    loss = model(idx, labels=idx).loss
    with torch.no_grad():
        assert torch.allclose(loss, own.model(idx[:, :-1], idx[:, 1:])[1], atol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_transformers_asks_of_a_model_is_given_or_refused(four_bit: tuple[Path, Loaded]) -> None:
    folder, own = four_bit
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, **OPEN).eval(), AutoTokenizer.from_pretrained(folder, **OPEN)
    idx = torch.randint(1, 256, (2, 20))
    with torch.no_grad():
        whole = model(idx, labels=idx)
        parts = [model(row, labels=row, num_items_in_batch=38).loss for row in idx.split(1)]
        assert torch.allclose(sum(parts), whole.loss), "the mean over accumulated batches"
        assert torch.allclose(model(idx, logits_to_keep=1).logits, whole.logits[:, -1:], atol=1e-5)
        assert torch.equal(model(idx, return_dict=False)[0], whole.logits)
        begun = model.generate(idx, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
        on = model.generate(begun.sequences, cache=begun.cache, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(on, model.generate(idx, max_new_tokens=10, do_sample=False, eos_token_id=None))
        from_nothing = model.generate(max_new_tokens=5, do_sample=False)
    assert own.tokenizer.decode(from_nothing[0, 1:].tolist()) == "".join(generate.write(own, "", 5, generate.Sampling(temperature=0)))
    assert tokenizer("")["input_ids"] == []
    for ask in (
        lambda: model(torch.empty(1, 0, dtype=torch.long)),
        lambda: model(idx, output_hidden_states=True),
        lambda: model.resize_token_embeddings(300),
    ):
        with pytest.raises(ValueError, match=r"separator|hidden states|stays at 256 tokens"):
            ask()
    assert model.resize_token_embeddings(256) is model.embed


@pytest.mark.parametrize("kept", [{"dtype": torch.bfloat16}, {}], ids=["loaded as", "cast to"])
def test_frequencies_are_part_of_it_and_stay_in_float32(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, kept: dict[str, Any]
) -> None:
    """Rounded to bfloat16 they would turn elsewhere: transformers#25681, #29496."""
    folder, own = exported(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "attn.freqs": 3 * weights["attn.freqs"]}, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, **OPEN, **kept).to(torch.bfloat16)
    assert model.encoder.dtype is torch.bfloat16
    assert torch.equal(model.attn.freqs, 3 * own.model.attn.freqs)


def test_an_empty_folder_stays_the_one_it_was(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    inode = (tmp_path / "folder").stat().st_ino
    folder, _ = exported(tmp_path)
    assert folder.stat().st_ino == inode
    assert len(list(folder.iterdir())) == 7
    refused = run_cli("checkpoints", "export", "latest", "--format", "huggingface", "-o", "s3://b/x", *CONFIG)
    assert (refused.exit_code, "--output s3://b/x: a folder on this machine is written" in refused.output) == (2, True)


def test_what_cannot_become_a_folder_is_refused(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    exported(tmp_path)
    again = run_cli("checkpoints", "export", "latest", "--format", "huggingface", "-o", "folder", *CONFIG)
    assert again.exit_code == 2
    assert "folder: there already, and not an empty folder" in again.output
    before = sorted(tmp_path.iterdir())
    file = run_cli("checkpoints", "export", "latest", "--format", "huggingface", "-o", "tiny.yaml/x", *CONFIG)
    assert file.exit_code == 1
    assert "not written" in file.output
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow  # a process in which this package cannot be imported
def test_the_folder_runs_without_this_package(four_bit: tuple[Path, Loaded], tmp_path: Path) -> None:
    folder, own = four_bit
    code = f"""
import sys
import tempfile
sys.modules |= {{"bdh_mlflow": None, "mlflow": None}}  # not there, also for accelerate, which looks what there is
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
ids = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=10, do_sample=False, eos_token_id=None)
print(ids[0].tolist()[4:])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert own.tokenizer.decode(json.loads(done.stdout)) == "".join(generate.write(own, "def ", 10, generate.Sampling(temperature=0)))
