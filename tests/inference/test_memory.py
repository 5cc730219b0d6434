"""What was read goes on: in memory, and through a file."""

import os
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from bdh_mlflow.errors import CheckpointError, InputError
from bdh_mlflow.inference import generate, memory
from bdh_mlflow.inference.generate import Loaded, Sampling
from bdh_mlflow.inference.memory import Memory
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.sampling import Sampler
from bdh_mlflow.vocabulary import BYTES
from tests.conftest import run_cli, tiny_config, train

GREEDY = Sampling(temperature=0, top_k=None)


@pytest.fixture(params=[0.0, 2.0])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    torch.manual_seed(1)
    config = tiny_config(model={"attention_decay": request.param})
    network = BDH(config.to_bdh_config())
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(8)  # so that texts differ
    contents = generate.Contents(network.state_dict(), config, BYTES, {})
    return generate.from_weights(contents, Path("x"), 1, ())


def joined(loaded: Loaded, prompt: str, count: int, kept: Memory | None = None) -> str:
    return "".join(generate.write(loaded, prompt, count, GREEDY, kept))


def test_text_in_parts_is_continued_as_a_whole(loaded: Loaded, tmp_path: Path) -> None:
    """Also through a file, and with no words between two calls."""
    straight = joined(loaded, "def read(self, text):", 40)
    kept = Memory.fresh(loaded.model)
    first = joined(loaded, "def read(self, text):", 10, kept)
    assert kept.tokens == len("def read(self, text):") + 10
    memory.write(tmp_path / "s", kept, loaded.model, "x")
    again = memory.read(tmp_path / "s", loaded.model)
    assert (again.last, again.tokens) == (kept.last, kept.tokens)
    assert first + joined(loaded, "", 30, again) == straight


def test_a_prompt_is_read_after_what_was_written(loaded: Loaded) -> None:
    kept = Memory.fresh(loaded.model)
    ids = list(b"import os\n")
    tokens = [int(t) for t in loaded.model.stream([torch.tensor(ids)], 6, _greedy(), state=kept.state)]
    whole = [*ids, *tokens, *b"class "]
    expected = [int(t) for t in loaded.model.stream([torch.tensor(whole)], 8, _greedy())]
    found = [int(t) for t in loaded.model.stream([torch.tensor([tokens[-1], *b"class "])], 8, _greedy(), state=kept.state)]
    assert found == expected


def _greedy() -> Sampler:
    return Sampler(0.0, None, None)


def test_other_weights_and_other_files_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    kept, file = Memory.fresh(loaded.model), tmp_path / "s"
    joined(loaded, "a", 3, kept)
    memory.write(file, kept, loaded.model, "run_1/checkpoint_5.pt, step 5")
    other = BDH(loaded.model.config)
    with pytest.raises(InputError, match=r"saved with other weights \(run_1/checkpoint_5.pt, step 5\)"):
        memory.read(file, other)
    for name, content in (("none", None), ("text", b"text"), ("empty", b""), ("plain", {"x": torch.zeros(1)})):
        bad = tmp_path / name
        if isinstance(content, bytes):
            bad.write_bytes(content)
        elif content is not None:
            save_file(content, bad)
        with pytest.raises(CheckpointError, match=r"no such file|damaged|no state that generate"):
            memory.read(bad, loaded.model)
    with pytest.raises(CheckpointError, match=r"damaged, or no state"):
        memory.read(tmp_path, loaded.model)
    whole = file.read_bytes()
    for at in (len(whole) - 5, whole.index(b"last") + 8):  # a value, and the header
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            memory.read(file, loaded.model)


def test_generate_keeps_and_takes_up_a_state(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny).exit_code == 0
    options = ("--config", str(tiny), "--temperature", "0")
    whole = run_cli("generate", "latest", "--prompt", "def ", "--max-new-tokens", "12", *options).output
    first = run_cli("generate", "latest", "--prompt", "def ", "--max-new-tokens", "5", "--save-state", "s.state", *options)
    assert "State after 9 tokens: s.state. Go on: bdh-mlflow generate latest --state s.state --prompt TEXT" in first.output
    second = run_cli("generate", "latest", "--prompt", "", "--max-new-tokens", "7", "--state", "s.state", *options)
    assert (first.output.split("\nState")[0] + second.output.rstrip("\n")).strip() == whole.strip()
    os.mkfifo("pipe")
    Path("link").symlink_to("linked")
    assert run_cli("generate", "latest", "--prompt", "a", "--max-new-tokens", "1", "--save-state", "link", *options).exit_code == 0
    assert (Path("link").is_symlink(), Path("linked").is_file()) == (True, True)
    for words, message in (
        (("--state", "s.state", "--interactive"), "are of one text"),
        (("--save-state", "none/s"), "--save-state none/s: there is no folder none"),
        (("--save-state", "text"), "--save-state text: cannot be written: Is a directory"),
        (("--save-state", "pipe"), "--save-state pipe: cannot be written: not a regular file"),
        (("--state", "absent", "--prompt", "a"), "absent: no such file"),
        (("--state", "tiny.yaml", "--prompt", "a"), "damaged, or no state"),
    ):
        refused = run_cli("generate", "latest", *words, *options)
        assert (refused.exit_code != 0, message in refused.output) == (True, True), refused.output
