"""Exported files: the same model to the bit, small, and nothing damaged or foreign is run."""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import CheckpointError
from bdh_mlflow.inference import export, generate, load
from bdh_mlflow.model.bdh import PROJECTIONS
from tests.conftest import run_cli, train

CONFIG = ("--config", "tiny.yaml")


@pytest.fixture
def trained(store: MlflowClient, text: Path, tiny: Path) -> Path:
    """The last checkpoint of a tiny run with 4-bit weights."""
    result = train(tiny, "low_precision.use_4bit=true", "model.mlp_internal_dim_multiplier=64")
    assert result.exit_code == 0, result.output
    (saved,) = Path("checkpoints").glob("*/checkpoint_6.pt")
    return saved


def exported(saved: Path, kind: str) -> Path:
    result = run_cli("checkpoints", "export", str(saved), "--format", kind, "-o", f"out.{kind}.safetensors", *CONFIG)
    assert result.exit_code == 0, result.output
    return Path(f"out.{kind}.safetensors")


@pytest.mark.slow  # trains in emulated FP8
def test_file_of_a_run_with_emulated_fp8_runs_without(store: MlflowClient, text: Path, tiny: Path) -> None:
    settings = "low_precision.use_4bit=false", "low_precision.use_fp8=true", "fp8.emulate=true"
    assert train(tiny, *settings, "training.max_iters=1").exit_code == 0
    path = exported(next(Path("checkpoints").glob("*/checkpoint_1.pt")), "safetensors")
    result = run_cli("generate", str(path), "--prompt", "def ", "--max-new-tokens", "4", *CONFIG)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("trained in FP8, whose scales are not in the file; it computes in float32\ndef ")


def test_4bit_file_is_the_model_that_training_evaluated(trained: Path) -> None:
    path = exported(trained, "4bit")
    run, file = (load.load(str(p), Path("checkpoints"), TrackingConfig()) for p in (trained, path))
    assert path.stat().st_size < 0.3 * sum(p.numel() * 4 for p in run.model.parameters())
    losses = [load.validation_loss(loaded, run.config.dataset, 2).loss for loaded in (run, file)]
    assert losses[0] == losses[1]
    assert file.step == 6
    for name in PROJECTIONS:
        assert torch.equal(file.model.get_parameter(name), run.model.weight_view(name, run.model.get_parameter(name)))
    greedy = generate.Sampling(temperature=0)
    assert "".join(generate.write(file, "def ", 12, greedy)) == "".join(generate.write(run, "def ", 12, greedy))


def test_commands_accept_the_file_and_describe_it(trained: Path) -> None:
    result = run_cli("checkpoints", "export", str(trained), "--format", "4bit", *CONFIG)
    path = trained.with_name("checkpoint_6.4bit.safetensors")
    assert f"{path}: " in result.output
    assert "nf4 with double-quantised scales" in result.output
    of_run, of_file = (run_cli("evaluate", str(p), "--no-log", *CONFIG).output.splitlines()[-1] for p in (trained, path))
    assert of_run == of_file
    assert run_cli("generate", str(path), "--prompt", "def ", "--max-new-tokens", "3", *CONFIG).exit_code == 0
    assert "2 intact" in run_cli("checkpoints", "verify", str(trained.parent), *CONFIG).output, (
        "an exported file next to checkpoints is not taken for one"
    )


def test_plain_file_holds_the_published_weights(trained: Path) -> None:
    weights = load_file(exported(trained, "safetensors"))
    own = torch.load(trained, weights_only=True)["model_state_dict"]
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)


@pytest.mark.parametrize("kind", ["4bit", "safetensors"])
@pytest.mark.parametrize("where", [0.5, pytest.param(0.1, marks=pytest.mark.slow), pytest.param(0.999, marks=pytest.mark.slow)])
def test_flipped_byte_is_refused(trained: Path, kind: str, where: float) -> None:
    path = exported(trained, kind)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export.read(path)
    result = run_cli("evaluate", str(path), *CONFIG)
    assert result.exit_code == 2
    assert "damaged" in result.output


def test_file_that_is_cut_short_is_refused(trained: Path) -> None:
    path = exported(trained, "4bit")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged, or not a safetensors file"):
        export.read(path)


def test_file_of_another_architecture_is_refused(trained: Path) -> None:
    path = exported(trained, "safetensors")
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[export.HEADER])
    facts["config"]["model"]["n_embd"] = 32
    header, tensors = json.dumps(facts), load_file(path)
    save_file(tensors, path, metadata={export.HEADER: header, export.DIGEST: export.digest(header, tensors)})
    with pytest.raises(CheckpointError, match="of another architecture than its configuration\n  decoder: "):
        export.read(path)


def test_foreign_and_missing_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name, message in (("foreign", "not exported by bdh-mlflow"), ("absent", "no such file")):
        result = run_cli("generate", str(tmp_path / f"{name}.safetensors"), *CONFIG)
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output


def test_run_that_was_not_trained_for_4bit_is_exported_with_a_warning(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    result = run_cli("checkpoints", "export", "latest", "--format", "4bit", *CONFIG)
    assert result.exit_code == 0
    assert "not trained for 4-bit weights" in result.output
