"""FSDP2 against replicated processes: losses within rounding, the same files."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from tests.conftest import only_run
from tests.training.together import FSDP, Left, at_step, curves, digests, end, put_away, train

pytestmark = [
    pytest.mark.slow,  # each process that is started imports torch, three seconds of a core
    pytest.mark.usefixtures("text"),
]


def state_of(step: int) -> dict[str, Any]:
    return checkpoint.load(next(Path("checkpoints").glob(f"run_*/checkpoint_{step}.pt")))


def relative_difference(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> float:
    assert [step for step, _ in one] == [step for step, _ in other]
    return max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(one, other, strict=True))


def test_fsdp_follows_ddp_within_rounding(store: MlflowClient, four: Path) -> None:
    words = [f"--training.{key}={value}" for key, value in (("max_iters", 100), ("test_freq", 50), ("checkpoint_freq", 100))]
    found = []
    for size, strategy in ((1, ()), (2, FSDP), (4, FSDP)):
        result = train(four, size, *words, *strategy)
        assert result.exit_code == 0, result.output
        found.append((curves(store), state_of(100), only_run(store).data.tags["bdh.strategy"]))
        put_away(store)
    (straight, whole, _), *others = found
    for size, (own, state, tag) in zip((2, 4), others, strict=True):
        assert tag == f"FSDP2, {size} shares"
        for key in ("train/loss", "val/loss"):
            assert relative_difference(straight[key], own[key]) <= 1e-6, key
        assert [value for _, value in own["bdh/active_x_l0"]] == pytest.approx(
            [value for _, value in straight["bdh/active_x_l0"]], abs=0.02
        )
        assert state.keys() == whole.keys()
        assert state["model_state_dict"].keys() == whole["model_state_dict"].keys()
        for name, weights in state["model_state_dict"].items():
            assert weights.shape == whole["model_state_dict"][name].shape
            assert type(weights) is torch.Tensor
        kept = state["optimizer_state_dict"]["state"]
        assert kept.keys() == whole["optimizer_state_dict"]["state"].keys() == whole["model_state_dict"].keys() - {"attn.freqs"}
        assert all(sorted(each) == ["exp_avg", "exp_avg_sq", "step"] for each in kept.values())


def test_checkpoints_of_fsdp_and_ddp_interchange(store: MlflowClient, four: Path, alone: Left) -> None:
    for number, (size, last, strategy) in enumerate(((2, 2, FSDP), (1, 3, ()), (4, 5, FSDP), (2, 6, ()))):
        words = "--set", f"training.max_iters={last}", *strategy
        result = train(four, size, *words, *(("--resume", "latest") if number else ()))
        assert result.exit_code == 0, result.output
        if number:
            assert "gradients are summed in another order than in the segment before" in result.output
    losses = curves(store)["train/loss"]
    assert relative_difference(losses, alone[1]["train/loss"]) <= 1e-6


def test_fsdp_stops_at_a_signal_with_a_checkpoint(store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(1, end(signal.SIGTERM), monkeypatch)
    result = train(four, 2, *FSDP)
    assert result.exit_code == 143, result.output
    assert len(digests()) == 1


def test_fsdp_ends_when_a_rank_is_killed(store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(4, end(signal.SIGKILL), monkeypatch)
    result = train(four, 2, *FSDP)
    assert result.exit_code == 1
    assert re.search(r"Error: rank 1 \(.+\) was killed by SIGKILL\n", result.output), result.output
    assert list(digests()) == ["checkpoint_3.pt"], "a state that is spread over the processes is lost with one of them"
