"""`verify-resume`: configurations resume exactly, and a difference would be found."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_mlflow import host
from bdh_mlflow.config import Config
from bdh_mlflow.studies import verify
from bdh_mlflow.studies.verify import bitwise_difference
from bdh_mlflow.training import build
from bdh_mlflow.training.trainer import Trainer
from tests.conftest import run_cli, tiny_config

PLATEAU = {"type": "plateau", "patience": 0, "factor": 0.5}
FP8 = {"use_fp8": True, "use_4bit": False}
NEVER_BETTER = {"type": "plateau", "patience": 100}  # with a tiny rate: every evaluation counts


def verified(config: Config, tmp_path: Path, *, steps: int = 12, interruptions: int = 2, sizes: tuple[int, ...] = (1,)) -> dict[str, str]:
    folder = tmp_path / "verify"
    folder.mkdir()
    rows = verify.verify(config, verify.Plan(steps, interruptions, sizes), folder, lambda text: None)
    assert len(rows) == len(verify.PARTS) + len(verify.CURVES) + 1
    return {row.what: row.difference for row in rows if row.difference}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {
            "low_precision": {"compute_dtype": "bfloat16", "use_4bit": False, "optimizer_bits": 8},
            "scheduler": {"type": "exponential", "gamma": 0.9},
        },
        {
            "low_precision": {"compute_dtype": "float16", "use_4bit": False},
            "dataset": {"max_cached_files": 1},
            "training": {"block_size": 70, "log_freq": 4},
        },
        {"low_precision": {"compute_dtype": "float32", "use_4bit": True}, "scheduler": {"type": "linear"}},
        {"training": {"gradient_accumulation_steps": 3}, "scheduler": {"type": "cosine", "warmup_steps": 2}},
        {"low_precision": FP8, "fp8": {"emulate": True, "amax_history_len": 4}},
        {"scheduler": PLATEAU, "training": {"learning_rate": 0.5}},
        {
            "low_precision": {"compute_dtype": "float32", "use_4bit": True},
            "training": {"optimizer": "muon", "betas": [0.8, 0.9], "grad_clip_z": 0.5, "ema_decay": 0.9},
        },
    ],
    ids=lambda sections: ",".join(f"{k}={v}" for values in sections.values() for k, v in values.items()),
)
def test_resume_is_bit_exact_after_a_stop_and_a_kill(text: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    assert verified(tiny_config(**sections), tmp_path) == {}


@pytest.mark.slow
def test_resume_with_4bit_states_is_bit_exact(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compiler", lambda: None)  # compiling takes half a minute a process
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # the same for the child that is killed
    assert verified(tiny_config(low_precision={"optimizer_bits": 4}), tmp_path) == {}


@pytest.mark.slow
def test_the_number_of_processes_may_change_at_each_interruption(text: Path, tmp_path: Path) -> None:
    """Stopped with four processes, killed with one, and to the end with two; rows read on, so each has states of its own."""
    training = {"gradient_accumulation_steps": 4, "test_iters": 3, "carry_state": True}
    assert verified(tiny_config(training=training), tmp_path, sizes=(4, 1, 2)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "sections", "steps", "seen_in"),
    [
        ("model_state_dict", {}, 12, "weights"),
        ("optimizer_state_dict", {}, 12, "optimizer"),
        ("scheduler_state_dict", {"scheduler": NEVER_BETTER, "training": {"learning_rate": 1e-9}}, 12, "scheduler"),
        ("scaler_state_dict", {"low_precision": {"compute_dtype": "float16", "use_4bit": False}}, 12, "scaler"),
        ("precision_state_dict", {"low_precision": FP8, "fp8": {"emulate": True}}, 12, "number formats"),
        ("ema_state_dict", {"training": {"ema_decay": 0.9}}, 12, "average of the weights"),
        ("zclip_state_dict", {"training": {"grad_clip_z": 0.5}}, 12, "clipping"),
        ("carried_state", {"training": {"carry_state": True}}, 12, "carried state"),
        ("data_position", {}, 12, "data position"),
        ("tokens_seen", {}, 12, "tokens seen"),
        ("accumulators", {"training": {"log_freq": 3}}, 26, "curve train/loss"),
    ],
)
def test_any_part_of_the_state_that_is_not_restored_is_noticed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, sections: dict[str, Any], steps: int, seen_in: str
) -> None:
    if part == "data_position":
        monkeypatch.setattr(build, "position_of", lambda *_: None)
    else:
        _do_not_restore(part, monkeypatch)
    different = verified(tiny_config(**sections), tmp_path, steps=steps, interruptions=1)
    assert seen_in in different


@pytest.mark.slow
def test_evaluation_that_is_repeated_after_a_kill_is_noticed(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves a checkpoint whose evaluation was made: repeating it would make a plateau schedule lose patience sooner."""
    sections: dict[str, Any] = {"scheduler": NEVER_BETTER, "training": {"learning_rate": 1e-9, "test_freq": 2, "checkpoint_freq": 2}}
    _do_not_restore("evaluated_step", monkeypatch)
    assert "scheduler" in verified(tiny_config(**sections), tmp_path)


def _do_not_restore(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.load_state_dict

    def partly(self: Trainer, state: dict[str, Any]) -> None:
        real(self, {**state, part: self.state_dict()[part]})

    monkeypatch.setattr(Trainer, "load_state_dict", partly)


@pytest.mark.slow  # the command around what is tested above
def test_command_prints_the_table_and_leaves_nothing_behind(text: Path, tiny: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run_cli("verify-resume", "--config", str(tiny), "--steps", "6", "--interruptions", "1")
    assert result.exit_code == 0, result.output
    rows = len(verify.PARTS) + len(verify.CURVES) + 1
    assert len(re.findall(r"│ equal +│", result.output)) == rows
    assert result.output.endswith(f"Exact: {rows} of {rows} rows equal to the bit\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.slow  # its exit code
def test_command_fails_if_one_bit_differs(text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _do_not_restore("tokens_seen", monkeypatch)
    result = run_cli("verify-resume", "--config", str(tiny), "--steps", "6", "--interruptions", "1")
    assert result.exit_code == 1
    assert "Not exact: tokens seen" in result.output


def test_interruptions_are_spread_and_inside_the_training() -> None:
    assert verify.interruption_steps(40, 5) == [6, 13, 20, 26, 33]
    assert verify.interruption_steps(3, 2) == [1, 2]


def test_difference_is_found_down_to_the_bit() -> None:
    a = {"x": [torch.tensor([1.0, float("nan")]), 3]}
    assert bitwise_difference(a, {"x": [torch.tensor([1.0, float("nan")]), 3]}) == ""
    assert bitwise_difference(torch.tensor([0.0]), torch.tensor([-0.0])) != ""
    assert bitwise_difference(a, {"x": [torch.tensor([1.5, float("nan")]), 3]}).startswith("/x/0: values differ")
    assert bitwise_difference({"a": 1}, {"b": 1}) == ": different keys"
    assert bitwise_difference([1], [1, 2]) == ": 1 and 2 items"
    assert bitwise_difference(1, 1.0) == ": int and float"
    assert bitwise_difference({"n": 1}, {"n": 2}) == "/n: 1 and 2"
