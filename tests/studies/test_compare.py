"""Runs read back and put side by side; some from real trainings, most made by hand."""

import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.studies import compare, report
from tests.conftest import run_cli, train
from tests.studies.runs import BEGAN_MS, made_run


def test_trainings_are_compared_in_a_page_that_loads_nothing(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    train(tiny, "tracking.run_name=one")
    train(tiny, "tracking.run_name=two", "training.learning_rate=0.5", "training.max_iters=3")
    result = run_cli("compare", "one two", "--config", str(tiny), "--out", "report.html")
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["training.learning_rate"] == ["0.001", "0.5"]
    assert by_name["last progress/tokens_seen"] == ["96", "48"]
    assert by_name["best checkpoint"][1] == "checkpoint_3.pt"
    assert "model.n_embd" not in by_name
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]*", "", page)
    assert "<th>step 3</th>" in page
    assert "<th>step 6</th>" not in page, "samples at steps that both have"
    assert [p.name for p in sorted(tmp_path.glob("report_*.png"))] == ["report_train_loss.png", "report_val_bpb.png", "report_val_loss.png"]
    (one,) = [r for r in store.search_runs([store.get_experiment_by_name("bdh").experiment_id]) if r.info.run_name == "one"]
    assert "compare/report.html" in [f.path for f in store.list_artifacts(one.info.run_id, "compare")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b"], ["b"]),
        (["latest"], ["c"]),
        (["bdh"], ["c", "b", "a"]),
        (["params.`training.learning_rate` = '2'"], ["b"]),
        (["metrics.`train/loss` < 2.5", "b"], ["a", "b"]),
        (["b", "latest", "bdh"], ["b", "c", "a"]),
    ],
)
def test_runs_are_named_in_many_ways(store: MlflowClient, names: list[str], expected: list[str]) -> None:
    for i, name in enumerate("abc"):
        made_run(store, name, [4.0, 2.0 + i], late_ms=i, training__learning_rate=i + 1)
    comparison = compare.read(names, TrackingConfig())
    found = [r.run.info.run_name for r in comparison.runs]
    assert sorted(found) == sorted(expected)
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("basline", "did you mean baseline?"),
        ("metrics.`train/loss` < 0", "no run of experiment bdh matches"),
        ("metrics.train/loss << 1", "no run has this name, and MLflow rejects it as a filter"),
        ("twin", "2 runs have this name, give an id"),
        ("zzzzzz", "experiment bdh has "),
    ],
)
def test_name_without_a_run_is_refused_with_the_nearest_known(store: MlflowClient, name: str, message: str) -> None:
    for own in ("baseline", "twin", "twin"):
        made_run(store, own, [1.0])
    with pytest.raises(InputError) as refusal:
        compare.read([name], TrackingConfig())
    assert message in str(refusal.value)


def test_comparing_in_an_empty_store_is_one_clear_error(store: MlflowClient, tiny: Path) -> None:
    result = run_cli("compare", "latest", "--config", str(tiny))
    assert result.exit_code == 2
    assert "latest: no run, experiment or filter; experiment bdh has no runs" in result.output


def test_runs_that_differ_in_the_seed_are_one_family(store: MlflowClient) -> None:
    ids = [made_run(store, f"s{seed}", [3.0 - seed, 2.0], training__seed=seed) for seed in range(2)]
    other = made_run(store, "other", [1.0], training__learning_rate=7)
    comparison = compare.read([*ids, other], TrackingConfig())
    assert [[r.run.info.run_name for r in family] for family in comparison.families] == [["s0", "s1"], ["other"]]
    assert list(report.plots(comparison)) == ["train/loss"], "a metric that no run has is not plotted"
    assert comparison.differing == ("training.seed", "training.learning_rate")


def test_forks_are_not_of_the_family_they_came_from(store: MlflowClient) -> None:
    made_run(store, "a", [1.0], training__resume_from_checkpoint="null")
    made_run(store, "b", [1.0], training__resume_from_checkpoint="runs:/x", training__seed=1)
    assert len(compare.read(["bdh"], TrackingConfig()).families) == 2


def test_settings_changed_on_resume_are_shown_and_a_step_logged_twice_counts_once(store: MlflowClient) -> None:
    run_id = made_run(store, "drifted", [3.0, 2.0], {"drift.training.max_iters": "2 -> 9"})
    store.log_metric(run_id, "train/loss", 1.0, timestamp=BEGAN_MS + 10**8, step=2)
    comparison = compare.read([run_id], TrackingConfig())
    assert comparison.runs[0].curves["train/loss"].values.tolist() == [3.0, 1.0]
    assert ["changed on resume", "training.max_iters: 2 -> 9"] in compare.rows(comparison)


def test_segments_of_a_run_are_not_compared_as_runs_and_a_name_may_look_like_a_filter(store: MlflowClient) -> None:
    made_run(store, "lr=0.1", [1.0])
    made_run(store, "segment 2", [], {"bdh.continues": "x"}, late_ms=5)
    for name in ("latest", "lr=0.1", "bdh"):
        assert [r.run.info.run_name for r in compare.read([name], TrackingConfig()).runs] == ["lr=0.1"]


def test_any_metric_is_plotted_and_an_unknown_one_refused(store: MlflowClient, tiny: Path, tmp_path: Path) -> None:
    run_id = made_run(store, "one", [3.0, 2.0])
    store.log_metric(run_id, "optim/lr", 0.5, step=1)
    result = run_cli("compare", "one", "--metric", "optim/lr", "--config", str(tiny), "--no-log")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.glob("*.png")} == {"compare_train_loss.png", "compare_optim_lr.png"}
    result = run_cli("compare", "one", "--metric", "optim/rl", "--config", str(tiny), "--no-log")
    assert (result.exit_code, "metric optim/rl: none of these runs has it; did you mean optim/lr?" in result.output) == (2, True)
    result = run_cli("compare", "--config", str(tiny))
    assert (result.exit_code, "Missing argument 'RUNS...'" in result.output) == (2, True)


def test_report_for_a_folder_that_is_not_there_is_one_clear_error(store: MlflowClient, tiny: Path) -> None:
    made_run(store, "odd [/b]", [1.0])
    assert run_cli("compare", "latest", "--config", str(tiny)).exit_code == 0
    result = run_cli("compare", "latest", "--out", "nowhere/x.html", "--config", str(tiny))
    assert result.exit_code == 2
    assert "--out nowhere/x.html: there is no folder nowhere" in result.output


def test_settings_are_compared_by_value_and_not_by_spelling(store: MlflowClient) -> None:
    """`mlflow run -P` logs a setting as it was typed, the command line as JSON."""
    typed: dict[str, Any] = {
        "training__learning_rate": "3e-4", "training__compile": "True", "scheduler__decay_steps": "~", "model__n_layer": "6",
        "training__keep_checkpoints": "null", "dataset__parquet_dir": "007", "other__list": "[1,2]", "other__rate": "1e-3",
    }  # fmt: skip
    logged: dict[str, Any] = {
        "training__learning_rate": "0.0003", "training__compile": "true", "scheduler__decay_steps": "null", "model__n_layer": "6",
        "training__keep_checkpoints": "3", "dataset__parquet_dir": "7", "other__list": "[1, 2]", "other__rate": "0.001",
    }  # fmt: skip
    made_run(store, "typed", [1.0], **typed)
    made_run(store, "logged", [1.0], late_ms=-1, **logged)
    comparison = compare.read(["bdh"], TrackingConfig())
    assert set(comparison.differing) == {"training.keep_checkpoints", "dataset.parquet_dir"}
    table = {row[0]: row[1:] for row in compare.rows(comparison)}
    assert table["training.keep_checkpoints"] == ["null", "3"]
    assert table["dataset.parquet_dir"] == ["007", "7"], "text is not a number"


def test_seeds_are_one_family_however_their_settings_were_typed(store: MlflowClient) -> None:
    made_run(store, "a", [1.0], training__learning_rate="3e-4", low_precision__use_4bit="true")
    made_run(store, "b", [1.0], training__learning_rate="0.0003", low_precision__use_4bit="True", training__seed=1)
    assert len(compare.read(["bdh"], TrackingConfig()).families) == 1


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1.7976931348623157e308, -1e308])
def test_values_that_are_no_numbers_or_huge_are_a_gap_and_not_the_end(store: MlflowClient, tmp_path: Path, value: float) -> None:
    """Databases store infinity as the largest number, which matplotlib cannot draw."""
    made_run(store, "a", [4.0, value, 2.0])
    made_run(store, "b", [value, value, value], training__seed=1)
    comparison = compare.read(["a", "b"], TrackingConfig())
    files = report.write(comparison, tmp_path / "report.html")
    assert [f.name for f in files] == ["report.html", "report_train_loss.png"]
    (row,) = [row for row in compare.rows(comparison) if row[0] == "last train/loss"]
    assert row[1] == "2"
    assert (row[2] == "not finite") == (not abs(value) < 1.7e308)


@pytest.mark.parametrize(
    "tags",
    [
        {"bdh.segment": "many", "bdh.best_checkpoint": "", "drift.": "x"},
        {"bdh.segment": "9" * 40, "mlflow.loggedArtifacts": "garbage", "bdh.run_dir": "../.."},
        {"mlflow.loggedArtifacts": '[{"path": "samples.json"}]', "bdh.best_val_loss": "low"},
    ],
)
def test_tags_that_somebody_has_set_by_hand_end_nothing(store: MlflowClient, tmp_path: Path, tags: dict[str, str]) -> None:
    run_id = made_run(store, "a", [4.0, 2.0], tags={"bdh.training": "t", **tags})
    comparison = compare.read([run_id], TrackingConfig())
    assert compare.rows(comparison)
    report.write(comparison, tmp_path / "report.html")
    result = run_cli("checkpoints", "list", run_id)
    assert (result.exit_code, "no mirrored checkpoints" in result.output) == (2, True)
    resumed = run_cli("generate", run_id, "--prompt", "a")
    assert (resumed.exit_code, "no checkpoint that verifies" in resumed.output) == (2, True)
