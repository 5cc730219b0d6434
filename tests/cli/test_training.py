"""`train`: what it leaves on disk and in MLflow, what it prints, how it fails."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.cli import console
from bdh_mlflow.config import Config, resolve
from tests.conftest import documents, history, only_run, train, write_shards


def test_training_leaves_the_documented_files_metrics_and_tags(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    result = train(tiny, "tracking.tags.team=dragons", "tracking.log_system_metrics=true")
    assert result.exit_code == 0, result.output
    run = only_run(store)
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    assert re.fullmatch(r"run_\d{8}_\d{6}", directory.name)
    files = ["checkpoint_3.json", "checkpoint_3.pt", "checkpoint_6.json", "checkpoint_6.pt", "config.yaml"]
    assert [p.name for p in sorted(directory.iterdir())] == [*files, "journal.json", "journal.jsonl"]
    mirrored = [f.path for f in store.list_artifacts(run.info.run_id, f"checkpoints/{directory.name}")]
    assert mirrored == [f"checkpoints/{directory.name}/{name}" for name in files]
    assert {f.path for f in store.list_artifacts(run.info.run_id)} >= {"checkpoints", "config.yaml", "data", "environment.txt", "samples"}
    assert [f.path for f in store.list_artifacts(run.info.run_id, "samples")] == ["samples/step_3.txt", "samples/step_6.txt"]
    saved = Config.from_yaml(directory / "config.yaml")
    settings = ["tracking.tags.team=dragons", "tracking.log_system_metrics=true", "training.layer_form=blocked"]
    settled = ["training.compile=false", "training.recompute=true"]
    assert saved == resolve(Config.from_yaml(tiny, [*settings, *settled])).config
    assert run.data.params == {k: v if isinstance(v, str) else json.dumps(v) for k, v in saved.flat().items()}
    for key in (
        "train/loss",
        "optim/lr",
        "optim/grad_norm",
        "perf/tokens_per_s",
        "perf/step_ms",
        "perf/mfu_pct",
        "mem/peak_gib",
        "progress/epoch",
    ):
        assert [step for step, _ in history(store, run.info.run_id, key)] == [1, 2, 3, 4, 5, 6], key
    for key in ("val/loss", "val/bpb", "ckpt/blocked_ms", "ckpt/upload_s"):
        assert [step for step, _ in history(store, run.info.run_id, key)] == [3, 6], key
    tags = run.data.tags
    assert tags["bdh.run_dir"] == directory.name
    assert tags["bdh.latest_checkpoint"] == f"checkpoints/{directory.name}/checkpoint_6.pt"
    assert (tags["bdh.stop_reason"], tags["bdh.stop_step"], tags["team"]) == ("finished", "6", "dragons")
    assert tags["bdh.precision"] == "float32 matmuls; float32 weights; cpu"
    assert [i.tags[0].value for i in run.inputs.dataset_inputs] == ["training", "validation"]
    assert run.info.status == "FINISHED"


def test_last_lines_say_where_the_run_is_and_what_to_type(store: MlflowClient, text: Path, tiny: Path) -> None:
    lines = train(tiny, "training.max_iters=5", "training.max_iters=6", "tracking.tags.a=b c").output.splitlines()
    run = only_run(store)
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    start_of_end = next(i for i, line in enumerate(lines) if line.startswith("Finished at step 6, val/loss "))
    end = lines[start_of_end:]
    assert re.fullmatch(r"Finished at step 6, val/loss \d\.\d{4}, val/bpb \d\.\d{4}; peak memory \d+\.\d\d GiB", end[0])
    assert end[1] == f"Checkpoints: {directory}"
    assert end[2] == f"Try it:  bdh-mlflow generate {directory} --prompt 'def '"
    assert end[3] == (
        f"Resume:  bdh-mlflow train --config {tiny} --resume {run.info.run_id} --set training.max_iters=12 --set 'tracking.tags.a=b c'"
    )
    assert end[4] == f"Look:    mlflow ui --backend-store-uri {store.tracking_uri}"
    assert end[5].endswith(f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/model-metrics?workflowType=machine_learning")


def test_checkpoint_holds_the_documented_state(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    state = torch.load(directory / "checkpoint_6.pt", weights_only=True)
    assert set(state) >= {
        "format", "step", "tokens_seen", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
        "scaler_state_dict", "data_position", "loss", "config",
    }  # fmt: skip
    assert set(state["model_state_dict"]) == {"embed.weight", "encoder", "encoder_v", "decoder", "lm_head", "attn.freqs"}
    assert (state["step"], state["tokens_seen"]) == (6, 6 * 2 * 8)


def test_samples_are_a_table_that_the_ui_shows(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    run = only_run(store)
    table = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/samples.json")
    assert table["columns"] == ["step", "prompt", "written"]
    assert [row[0] for row in table["data"]] == [3, 3, 3, 6, 6, 6]
    prompts = [row[1] for row in table["data"]]
    assert prompts[:3] == prompts[3:], "always the same prompts"
    assert len(set(prompts)) == 3
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]
    assert len(store.load_table(run.info.experiment_id, "samples.json", [run.info.run_id])) == 6
    train(tiny, "training.max_iters=9", resume="checkpoints/" + next(Path("checkpoints").iterdir()).name + "/checkpoint_3.pt")
    table = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/samples.json")
    assert [row[0] for row in table["data"]] == [3, 3, 3, 6, 6, 6, 9, 9, 9], "a step trained again has its rows once"


def test_missing_data_is_prepared_from_its_source_with_a_message(store: MlflowClient, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a line of text\n" * 5000)
    result = train(tiny, "dataset.source=book.txt")
    assert result.exit_code == 0, result.output
    assert "text does not exist: preparing it from book.txt (dataset.source)" in result.output
    assert "prepared 64 documents, 0.1 MB of text" in result.output


def test_debug_prints_the_first_window_as_text_and_switches_itself_off_afterwards(store: MlflowClient, text: Path, tiny: Path) -> None:
    result = train(tiny, "training.debug=true", "training.max_iters=1")
    assert result.exit_code == 0
    assert "first window of (2, 9):\n" in result.output
    assert not torch.is_anomaly_enabled()


@pytest.mark.slow  # the same losses with loader processes, which take seconds to start
def test_worker_processes_do_not_change_the_losses(store: MlflowClient, text: Path, tiny: Path) -> None:
    plain = train(tiny, "tracking.experiment=a")
    fed = train(tiny, "tracking.experiment=b", "dataloader.num_workers=1", "dataloader.prefetch_factor=3")
    assert (plain.exit_code, fed.exit_code) == (0, 0)
    losses = [history(store, only_run(store, name).info.run_id, "train/loss") for name in "ab"]
    assert losses[0] == losses[1]


def test_full_disk_is_a_failure_that_keeps_the_previous_checkpoint(
    store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def full(state: dict[str, Any], file: Any) -> None:
        if state["step"] == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    result = train(tiny)
    assert result.exit_code == 1
    assert "checkpoint_6.pt: not saved: No space left on device" in result.output
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    newest, _ = checkpoint.newest(directory)
    assert newest is not None
    assert newest.manifest.step == 3
    run = only_run(store)
    assert (run.info.status, run.data.tags["bdh.stop_reason"]) == ("FAILED", "SaveError")


def test_unexpected_failure_leaves_a_failed_run(store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, values: Any, step: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(console.PlainLines, "point", broken)
    with pytest.raises(RuntimeError):
        train(tiny)
    run = only_run(store)
    assert run.info.status == "FAILED"
    assert (run.data.tags["bdh.stop_reason"], run.data.tags["bdh.stop_message"]) == ("RuntimeError", "out of memory")
    (saved,) = Path("checkpoints").glob("run_*/checkpoint_*.json")
    assert saved.name == "checkpoint_1.json", "the step at which it happened, whose weights are good"


@pytest.mark.slow  # a damaged row group met in the middle of a training run
def test_data_that_turns_out_damaged_stops_the_run_with_a_checkpoint(store: MlflowClient, tiny: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "text", documents(400), shards=1, row_group_size=100)
    file = tmp_path / "text" / "part-0.parquet"
    metadata = pq.ParquetFile(file).metadata
    raw = bytearray(file.read_bytes())
    for group in (2, 3):
        offset = metadata.row_group(group).column(0).data_page_offset
        raw[offset : offset + 20] = b"\xff" * 20
    file.write_bytes(raw)
    result = train(
        tiny, "dataset.max_cached_files=1", "training.max_iters=100000", "training.checkpoint_freq=100000", "training.test_freq=100000",
        "training.log_freq=100000", "dataset.val_fraction=0",
    )  # fmt: skip
    assert "part-0.parquet: row group" in result.output
    assert result.exit_code == 1
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    newest, _ = checkpoint.newest(directory)
    assert newest is not None
    assert newest.manifest.step > 1
