"""`checkpoints list` and `checkpoints verify`, on disk and mirrored."""

from pathlib import Path

from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from tests.conftest import only_run, run_cli, train


def test_checkpoints_are_listed_and_verified(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    output = run_cli("checkpoints", "list").output
    assert f"{directory}/checkpoint_3.pt" in output
    assert output.count(" best") == 1
    result = run_cli("checkpoints", "verify", str(directory))
    assert result.exit_code == 0
    assert result.output.endswith("2 intact, 0 damaged\n")
    (directory / "checkpoint_6.pt").write_bytes(b"x" * (directory / "checkpoint_6.pt").stat().st_size)
    result = run_cli("checkpoints", "verify")
    assert result.exit_code == 1
    assert "checkpoint_6.pt: damaged (sha256 " in result.output
    assert result.output.endswith("1 intact, 1 damaged\n")
    assert run_cli("checkpoints", "list", "nowhere").exit_code == 2


def test_mirrored_checkpoints_are_listed_and_verified(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny, "tracking.run_name=first").exit_code == 0
    run_id = only_run(store).info.run_id
    listed = run_cli("checkpoints", "list", run_id, "--config", str(tiny))
    assert [f"checkpoint_{step}.pt" in listed.output for step in (3, 6)] == [True, True]
    best = run_cli("checkpoints", "list", "--all-runs", "--best", "--config", str(tiny))
    assert best.output.count("runs:/") == 1
    local = run_cli("checkpoints", "list", "--best")
    assert local.output.count("checkpoint_") == 1
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    mirror = Path(only_run(store).info.artifact_uri.removeprefix("file://")) / "checkpoints" / directory.name
    intact = run_cli("checkpoints", "verify", f"runs:/{run_id}", "--config", str(tiny))
    assert (intact.exit_code, "2 intact, 0 damaged" in intact.output) == (0, True)
    content = bytearray((mirror / "checkpoint_3.pt").read_bytes())
    content[100] ^= 1
    (mirror / "checkpoint_3.pt").unlink()
    (mirror / "checkpoint_3.pt").write_bytes(content)
    damaged = run_cli("checkpoints", "verify", run_id, "--config", str(tiny))
    assert (damaged.exit_code, "1 intact, 1 damaged" in damaged.output) == (1, True)
