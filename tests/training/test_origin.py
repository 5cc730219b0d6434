"""Where a training run begins, and what it may change there."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from bdh_mlflow import host
from bdh_mlflow.config import Config, Machine
from bdh_mlflow.errors import ResumeError
from bdh_mlflow.tracking import locate
from bdh_mlflow.tracking.resolved import ResolvedCheckpoint
from bdh_mlflow.training.origin import Origin
from bdh_mlflow.training.settle import find_origin
from tests.conftest import train

CHECKPOINTS = Path("checkpoints")
CPU, CUDA = Machine("cpu", 8 * 2**30), Machine("cuda", 80 * 2**30)


class Unseen:
    """Nobody watches."""

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None: ...

    def point(self, values: object, step: int) -> None: ...

    def note(self, text: str) -> None: ...


def resumed(tiny: Path, machine: Machine, *settings: str) -> Origin:
    config = Config.from_yaml(tiny, ["training.resume_from_checkpoint=latest", *settings])
    return find_origin(config, machine, Unseen(), fork=False).origin


def test_debug_may_come_and_go_although_nothing_is_compiled_under_it(
    store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "compiler", lambda: "c++")
    assert train(tiny, "training.max_iters=3", "training.debug=true").exit_code == 0
    origin = resumed(tiny, CUDA, "training.layer_form=blocked")  # on CUDA the part after it is compiled
    assert (origin.kind, origin.saved and origin.saved.training.compile) == ("resumed", False)


def test_run_whose_compilation_is_kept_is_not_resumed_where_nothing_can_be_compiled(
    store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was compiled on CUDA, seen from a machine without CUDA and without a compiler."""
    assert train(tiny, "training.max_iters=3").exit_code == 0
    real = locate.Locator.find

    def find(self: locate.Locator, target: str) -> ResolvedCheckpoint:
        found = real(self, target)
        found.state["config"]["training"]["compile"] = True
        return found

    monkeypatch.setattr(locate.Locator, "find", find)
    monkeypatch.setattr(host, "compiler", lambda: "c++")
    assert resumed(tiny, CPU).kind == "resumed"
    monkeypatch.setattr(host, "compiler", lambda: None)
    with pytest.raises(
        ResumeError, match=r"(?s)cannot resume .*checkpoint_3\.pt on this machine.*training\.compile: true needs a C.*--fork"
    ):
        resumed(tiny, CPU)


def test_run_that_is_beyond_max_iters_is_not_called_finished(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny).exit_code == 0  # 6 steps
    for fork in (False, True):
        result = train(tiny, "training.max_iters=4", resume="latest", fork=fork)
        assert result.exit_code == 2
        assert "nothing to do, it is at step 6 and training.max_iters is 4. Set training.max_iters above 6" in result.output
    forked = train(tiny, resume="latest", fork=True)
    assert (forked.exit_code, "nothing to do, it is at step 6" in forked.output) == (2, True)
    again = train(tiny, resume="latest")
    assert again.exit_code == 0, "what a scheduler starts again has ended well"
    assert "Nothing to do: the run was at step 6" in again.output
    assert "Finished" not in again.output
