"""The front door: words in, messages and exit codes out."""

import errno
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.cli import console
from bdh_mlflow.cli.main import cli
from bdh_mlflow.config import Config, resolve
from bdh_mlflow.training import start
from tests.conftest import documents, history, only_run, run_cli, tiny_config, train, write_shards


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "mlflow.db" not in p.name)


def test_training_leaves_what_the_design_promises(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
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
    assert end[3].endswith(f"-P config={tiny} -P resume={run.info.run_id} -P training.max_iters=12 -P 'tracking.tags.a=b c'")
    assert end[4] == f"Look:    mlflow ui --backend-store-uri {store.tracking_uri}"
    assert end[5].endswith(f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/model-metrics?workflowType=machine_learning")


def test_saved_state_holds_what_the_design_names(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    state = torch.load(directory / "checkpoint_6.pt", weights_only=True)
    assert set(state) >= {
        "format", "step", "tokens_seen", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
        "scaler_state_dict", "rng", "data_position", "loss", "config",
    }  # fmt: skip
    assert set(state["model_state_dict"]) == {"embed.weight", "encoder", "encoder_v", "decoder", "lm_head"}
    assert (state["step"], state["tokens_seen"]) == (6, 6 * 2 * 8)


def test_missing_data_is_prepared_from_the_source_and_said_so(store: MlflowClient, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a line of text\n" * 5000)
    result = train(tiny, "dataset.source=book.txt")
    assert result.exit_code == 0, result.output
    assert "text is empty: preparing it from book.txt" in result.output
    assert "prepared 64 documents, 0.1 MB of text" in result.output


def test_debug_shows_the_first_window_as_text_and_never_waits(store: MlflowClient, text: Path, tiny: Path) -> None:
    result = train(tiny, "training.debug=true", "training.max_iters=1")
    assert result.exit_code == 0
    assert "first window of (2, 9):\n" in result.output
    assert not torch.is_anomaly_enabled()


@pytest.mark.slow  # the same losses with loader processes, which take seconds to start
def test_loop_can_be_fed_by_workers(store: MlflowClient, text: Path, tiny: Path) -> None:
    plain = train(tiny, "tracking.experiment=a")
    fed = train(tiny, "tracking.experiment=b", "dataloader.num_workers=1", "dataloader.prefetch_factor=3")
    assert (plain.exit_code, fed.exit_code) == (0, 0)
    losses = [history(store, only_run(store, name).info.run_id, "train/loss") for name in "ab"]
    assert losses[0] == losses[1]


def test_settings_arrive_as_mlflow_run_passes_them(tiny: Path) -> None:
    result = run_cli("config", "show", "--config", str(tiny), "--training.max_iters", "9", "--model.dropout=0", "--set", "training.seed=5")
    assert "  max_iters: 9\n" in result.output
    assert "  dropout: 0.0\n" in result.output
    assert "  seed: 5\n" in result.output


@pytest.mark.parametrize("word", ["--confg", "stray"])
def test_word_that_is_no_setting_is_a_usage_error(tiny: Path, word: str) -> None:
    result = run_cli("train", word, "x")
    assert result.exit_code == 2
    assert f"No such option: {word}." in result.output
    assert ("Did you mean --config?" in result.output) == (word == "--confg")


def test_config_check_says_what_would_run(tiny: Path) -> None:
    result = run_cli("config", "check", "--config", str(tiny))
    assert result.output == f"{tiny}: sound. 0.01 M parameters, 16 tokens a step, 6 steps\n"
    assert tiny_config().model.n_embd == 16


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown key": (("training.learning_rat=1",), "training.learning_rat: unknown key; did you mean `learning_rate`?"),
    "type": (("training.batch_size=many",), 'training.batch_size: found the text "many"; accepted: whole number >= 1'),
    "range": (("model.dropout=1.5",), "model.dropout: found 1.5; accepted: number >= 0 and < 1"),
    "several": (("model.dropout=1.5", "training.seed=x", "low_precision.use_fp8=true"), "3 problems"),
    "divide": (("model.n_head=3",), "model.mlp_internal_dim_multiplier: 4 * n_embd 16 is not a multiple of 2 * n_head 3"),
    "fp8": (
        ("low_precision.use_fp8=true", "model.n_embd=32"),
        "low_precision.use_fp8: true (hybrid, amax max of 1024 steps) needs CUDA capability 8.9",
    ),
    "4-bit optimizer": (
        ("low_precision.use_4bit_optimizer=true", "low_precision.optimizer_bits=8"),
        "optimizer_bits: 8 cannot be combined with low_precision",
    ),
    "no data": (("dataset.parquet_dir=nowhere",), "nowhere: no such folder (dataset.parquet_dir). Set dataset.source"),
    "empty data": (("dataset.parquet_dir=hollow",), "hollow: no parquet files in it"),
    "column": (("dataset.text_column=body",), "text/part-0.parquet: no column `body`; it has text. Set dataset.text_column"),
    "corrupt": (("dataset.parquet_dir=corrupt",), "corrupt/part-1.parquet: not a readable parquet file"),
    "block_size": (("training.block_size=100000",), "block_size 100000"),
    "folder": (("training.checkpoint_dir=tiny.yaml/x",), "cannot be created or written:"),
    "source": (("dataset.parquet_dir=new", "dataset.source=nowhere.txt"), "nowhere.txt: no such file or folder"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_gets_one_clear_error_and_nothing_is_written(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, case: str
) -> None:
    (tmp_path / "hollow").mkdir()
    shutil.copytree(text, tmp_path / "corrupt")
    (tmp_path / "corrupt" / "part-1.parquet").write_bytes(b"PAR1 not really")
    before = listing(tmp_path)
    settings, message = BAD[case]
    result = train(tiny, *settings)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("Error: ") == 1
    assert "Traceback" not in result.output
    assert listing(tmp_path) == before
    assert store.get_experiment_by_name("bdh") is None


def test_missing_config_file_is_an_input_error() -> None:
    result = run_cli("train", "--config", "configs/nothing.yaml")
    assert result.exit_code == 2
    assert "configs/nothing.yaml: no such file" in result.output


def test_yaml_that_does_not_parse_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  n_layer: [\n")
    result = run_cli("config", "check", "--config", "bad.yaml")
    assert result.exit_code == 2
    assert "bad.yaml, line 3, column 1: not valid YAML" in result.output


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
    def broken(self: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(start.Trainer, "_log", broken)
    with pytest.raises(RuntimeError):
        train(tiny)
    run = only_run(store)
    assert run.info.status == "FAILED"
    assert (run.data.tags["bdh.stop_reason"], run.data.tags["bdh.stop_message"]) == ("RuntimeError", "out of memory")
    assert not Path("checkpoints").exists()


@pytest.mark.slow  # a damaged row group met in the middle of a training
def test_data_that_breaks_on_the_way_stops_the_run_with_a_checkpoint(store: MlflowClient, tiny: Path, tmp_path: Path) -> None:
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


def test_checkpoints_are_listed_and_verified(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    output = run_cli("checkpoints", "list").output
    assert f"{directory}/checkpoint_3.pt" in output
    assert output.count(" best") == 1
    result = run_cli("checkpoints", "verify", str(directory))
    assert result.exit_code == 0
    assert result.output.endswith("2 whole, 0 not\n")
    (directory / "checkpoint_6.pt").write_bytes(b"x" * (directory / "checkpoint_6.pt").stat().st_size)
    result = run_cli("checkpoints", "verify")
    assert result.exit_code == 1
    assert "checkpoint_6.pt: damaged (sha256 " in result.output
    assert result.output.endswith("1 whole, 1 not\n")
    assert run_cli("checkpoints", "list", "nowhere").exit_code == 2


def test_generate_and_evaluate_answer_for_a_run(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    run = only_run(store)
    options = ("--config", str(tiny))
    first, second = (
        run_cli("generate", "latest", "--prompt", "def é", "--max-new-tokens", "20", "--seed", "3", *options).output for _ in range(2)
    )
    assert first == second
    assert first.startswith("def é")
    assert len(first) > 8
    output = run_cli("evaluate", run.info.run_id, "--batches", "2", *options).output
    logged = dict(history(store, run.info.run_id, "val/loss"))[6]
    assert f"val/loss {logged:.4f} nats per byte" in output


def test_prompts_are_continued_together_to_their_stop(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny, "training.max_iters=1")
    options = ("--config", str(tiny), "--temperature", "0", "--max-new-tokens", "9")
    alone = [run_cli("generate", "latest", "--prompt", prompt, *options).output.rstrip("\n") for prompt in ("def ", "x")]
    assert run_cli("generate", "latest", "--prompt", "def ", "--prompt", "x", *options).output == f"{alone[0]}\n\n{alone[1]}\n\n"
    stop = alone[0][5]
    assert (
        run_cli("generate", "latest", "--prompt", "def ", "--stop", stop, *options).output == alone[0][: alone[0].index(stop, 4) + 1] + "\n"
    )


@pytest.mark.parametrize("wrong", [("--top-p", "nan"), ("--temperature", "nan"), ("--prompt", "-", "--prompt", "-")], ids=str)
def test_generation_that_makes_no_sense_is_refused(wrong: tuple[str, ...], tiny: Path) -> None:
    assert run_cli("generate", "latest", *wrong, "--config", str(tiny)).exit_code == 2


def test_prompt_that_is_too_long_is_refused(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny, "training.max_iters=1")
    result = run_cli("generate", "latest", "--prompt", "x" * 100_000, "--config", str(tiny))
    assert result.exit_code == 2
    assert "prompt of 100,000 bytes; at most 65,536 are taken" in result.output


def test_data_is_prepared_and_inspected(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a line of text\n" * 5000)
    result = run_cli("data", "prepare", "book.txt", "out")
    assert result.exit_code == 0
    assert "out: 64 documents, 0.1 MB of text in 1 files" in result.output
    output = run_cli("data", "inspect", "out").output
    assert re.search(r"documents\s+│ 64 ", output)
    assert "a line of text" in output


def test_version_and_help_answer_without_heavy_imports() -> None:
    assert run_cli("--version").output.startswith("bdh-mlflow, version ")
    assert "verify" in run_cli("checkpoints", "--help").output


def test_checkpoints_of_the_mirror_are_listed_and_verified(store: MlflowClient, text: Path, tiny: Path) -> None:
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
    whole = run_cli("checkpoints", "verify", f"runs:/{run_id}", "--config", str(tiny))
    assert (whole.exit_code, "2 whole, 0 not" in whole.output) == (0, True)
    content = bytearray((mirror / "checkpoint_3.pt").read_bytes())
    content[100] ^= 1
    (mirror / "checkpoint_3.pt").unlink()
    (mirror / "checkpoint_3.pt").write_bytes(content)
    damaged = run_cli("checkpoints", "verify", run_id, "--config", str(tiny))
    assert (damaged.exit_code, "1 whole, 1 not" in damaged.output) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sync", "text"), "text: no journal.jsonl in this folder; name a run directory"),
        (("checkpoints", "list", "f" * 32), "not found at"),
        (("checkpoints", "verify", "f" * 32), "not found at"),
        (("checkpoints", "list", "--all-runs"), "experiment bdh: not found at"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, tuple) else None,
)
def test_unknown_targets_are_one_clear_error(store: MlflowClient, text: Path, tiny: Path, words: tuple[str, ...], message: str) -> None:
    result = run_cli(*words, "--config", str(tiny))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_lines_of_a_conversation_are_prompts(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    words = ["generate", "latest", "--interactive", "--max-new-tokens", "5", "--temperature", "0", "--config", str(tiny)]
    alone = [run_cli(*words[:2], *words[3:], "--prompt", prompt).output for prompt in ("def ", "x")]
    result = CliRunner().invoke(cli, words, input="def \nx\n")
    assert result.exit_code == 0
    assert result.stdout == "".join(alone)
    piped = CliRunner().invoke(cli, [*words[:2], *words[3:]], input="def ")
    assert piped.stdout == alone[0]
    assert run_cli(*words, "--prompt", "x").exit_code == 2


def test_evaluation_is_logged_to_the_run_it_is_of(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    result = run_cli("evaluate", "latest", "--no-log", "--config", str(tiny))
    run_id = only_run(store).info.run_id
    assert f"val/loss {history(store, run_id, 'val/loss')[-1][1]:.4f}" in result.output, "on the batches that the training takes"
    assert not [key for key in only_run(store).data.metrics if key.startswith("eval/")]
    result = run_cli("evaluate", run_id, "--data", str(text), "--config", str(tiny))
    assert f"Logged to run {run_id} as eval/text_loss and eval/text_bpb" in result.output
    ((step, loss),) = history(store, run_id, "eval/text_loss")
    assert step == 6
    assert f"val/loss {loss:.4f}" in result.output
    assert only_run(store).info.status == "FINISHED"
    contexts = {tag.value for i in only_run(store).inputs.dataset_inputs for tag in i.tags}
    assert "evaluation" in contexts


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


def test_prompt_that_is_too_long_is_refused_before_anything_is_written(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    result = run_cli("generate", "latest", "--prompt", "x" * 70_000, "--config", str(tiny))
    assert (result.exit_code, result.output) == (2, "Error: prompt of 70,000 bytes; at most 65,536 are taken\n")


def test_time_to_go_is_that_of_the_steps_and_not_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1010.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    shown = console.PlainLines(out, 100)
    shown.advance(41, 3.0, 1.0)
    shown.point({"train/loss": 3.0}, 41)
    shown.advance(51, 3.0, 1.0)
    shown.point({"train/loss": 3.0}, 51)
    assert [line.split("ETA ")[1] for line in out.getvalue().splitlines()] == ["-", "0:00:49"]
