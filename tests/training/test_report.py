"""What a run says of the source it comes from."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bdh_mlflow import checkpoint, host
from bdh_mlflow.host import UNKNOWN, SourceState
from tests.conftest import only_run, train


@pytest.mark.parametrize(
    ("state", "tag"),
    [
        (UNKNOWN, "unknown"),
        pytest.param(SourceState("c0ffee", None, ""), "unknown", marks=pytest.mark.slow),
        pytest.param(SourceState("c0ffee", False, ""), "false", marks=pytest.mark.slow),
    ],
)
def test_what_git_cannot_tell_is_called_unknown(
    state: SourceState, tag: str, store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "source_state", lambda folder: state)
    assert train(tiny).exit_code == 0
    tags = only_run(store).data.tags
    assert (tags["bdh.git_dirty"], tags.get("mlflow.source.git.commit")) == (tag, state.commit)
    (run_dir,) = Path("checkpoints").glob("run_*")
    (found, *_) = checkpoint.list_run(run_dir).checkpoints
    assert (found.manifest.git_commit, found.manifest.git_dirty) == (state.commit, state.dirty)
    assert json.loads(found.manifest_path.read_text())["git_dirty"] is state.dirty
    assert train(tiny, "training.max_iters=9", resume="latest").exit_code == 0
