"""Runs side by side: from real trainings, and from histories made by hand where numbers are to be known."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.studies import compare
from tests.conftest import run_cli, train

SIZES = {"training.batch_size": 2, "training.block_size": 8, "training.gradient_accumulation_steps": 1}
BEGAN_MS = 1_700_000_000_000


def made(
    store: MlflowClient, name: str, losses: list[float], tags: dict[str, str] | None = None, *, late_ms: int = 0, **params: Any
) -> str:
    """A run with a train/loss a step, one an hour.   late_ms: when it began."""
    found = store.get_experiment_by_name("bdh")
    run = store.create_run(found.experiment_id if found else store.create_experiment("bdh"), run_name=name, start_time=BEGAN_MS + late_ms)
    given = {**SIZES, "training.seed": 0, **{key.replace("__", "."): value for key, value in params.items()}}
    points = [Metric("train/loss", value, BEGAN_MS + 3_600_000 * (i + 1), i + 1) for i, value in enumerate(losses)]
    labels = [RunTag(key, value) for key, value in (tags or {}).items()]
    store.log_batch(run.info.run_id, points, [Param(key, str(value)) for key, value in given.items()], labels)
    return str(run.info.run_id)


def shown(comparison: compare.Comparison) -> str:
    return compare.page(comparison, compare.pictures(comparison))


def test_trainings_are_compared_in_a_page_that_needs_nothing_else(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
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
        made(store, name, [4.0, 2.0 + i], late_ms=i, training__learning_rate=i + 1)
    comparison = compare.read(names, TrackingConfig())
    found = [r.run.info.run_name for r in comparison.runs]
    assert sorted(found) == sorted(expected)
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("basline", "did you mean baseline?"),
        ("metrics.`train/loss` < 0", "no run of experiment bdh is like this"),
        ("metrics.train/loss << 1", "no run has this name, and MLflow takes no such filter"),
        ("twin", "2 runs have this name, give an id"),
        ("zzzzzz", "experiment bdh has "),
    ],
)
def test_what_stands_for_nothing_is_refused_with_what_is_near(store: MlflowClient, name: str, message: str) -> None:
    for own in ("baseline", "twin", "twin"):
        made(store, own, [1.0])
    with pytest.raises(InputError) as refusal:
        compare.read([name], TrackingConfig())
    assert message in str(refusal.value)


def test_comparing_in_an_empty_store_is_one_clear_error(store: MlflowClient, tiny: Path) -> None:
    result = run_cli("compare", "latest", "--config", str(tiny))
    assert result.exit_code == 2
    assert "latest: no run, experiment or filter; experiment bdh has no runs" in result.output


def test_axes_are_steps_tokens_and_the_time_in_which_a_process_worked(store: MlflowClient) -> None:
    """Three hours of work, then a gap from 2 h 30 min to 3 h 30 min."""
    run_id = made(store, "broken", [3.0, 2.0, 1.5, 1.25], {"bdh.segment": "2"})
    spans = ((0, 2.5, 0.0), (3.5, None, 3600.0))
    segments = [
        {
            "segment": i + 1,
            "host": "here",
            "started_at_ms": BEGAN_MS + int(3.6e6 * start),
            "ended_at_ms": BEGAN_MS + int(3.6e6 * end) if end else None,
            "last_seen_ms": BEGAN_MS,
            "downtime_s": down,
        }
        for i, (start, end, down) in enumerate(spans)
    ]
    store.log_text(run_id, json.dumps(segments), "segments.json")
    ((r,)) = compare.read([run_id], TrackingConfig()).runs
    assert r.axis("step", "train/loss").tolist() == [1, 2, 3, 4]
    assert r.axis("tokens", "train/loss").tolist() == [16, 32, 48, 64]
    assert r.axis("active hours", "train/loss").tolist() == pytest.approx([1, 2, 2.5, 3])
    assert ["segments", "2 (here), 1.00 h between them"] in compare.rows(compare.read([run_id], TrackingConfig()))


def test_runs_that_differ_in_the_seed_are_one_family(store: MlflowClient) -> None:
    ids = [made(store, f"s{seed}", [3.0 - seed, 2.0], training__seed=seed) for seed in range(2)]
    other = made(store, "other", [1.0], training__learning_rate=7)
    comparison = compare.read([*ids, other], TrackingConfig())
    assert [[r.run.info.run_name for r in family] for family in comparison.families] == [["s0", "s1"], ["other"]]
    assert list(compare.pictures(comparison)) == ["train/loss"], "what no run has is not drawn"
    assert comparison.differing == ("training.seed", "training.learning_rate")


def test_drift_is_told_and_a_step_logged_twice_counts_once(store: MlflowClient) -> None:
    run_id = made(store, "drifted", [3.0, 2.0], {"drift.training.max_iters": "2 -> 9"})
    store.log_metric(run_id, "train/loss", 1.0, timestamp=BEGAN_MS + 10**8, step=2)
    comparison = compare.read([run_id], TrackingConfig())
    assert comparison.runs[0].curves["train/loss"].values.tolist() == [3.0, 1.0]
    assert ["changed on resume", "training.max_iters: 2 -> 9"] in compare.rows(comparison)


def test_text_of_a_run_cannot_break_the_page(store: MlflowClient) -> None:
    made(store, "<script>alert(1)</script>", [1.0], training__learning_rate="<b>")
    made(store, "b", [1.0], training__learning_rate="2")
    page = shown(compare.read(["bdh"], TrackingConfig()))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_segments_of_a_run_are_no_runs_and_a_name_may_look_like_a_filter(store: MlflowClient) -> None:
    made(store, "lr=0.1", [1.0])
    made(store, "segment 2", [], {"bdh.continues": "x"}, late_ms=5)
    for name in ("latest", "lr=0.1", "bdh"):
        assert [r.run.info.run_name for r in compare.read([name], TrackingConfig()).runs] == ["lr=0.1"]


def test_forks_and_other_data_are_no_seeds_of_a_configuration(store: MlflowClient) -> None:
    made(store, "a", [1.0], training__resume_from_checkpoint="null")
    made(store, "b", [1.0], training__resume_from_checkpoint="runs:/x", training__seed=1)
    assert len(compare.read(["bdh"], TrackingConfig()).families) == 2


def test_any_metric_is_drawn_and_an_unknown_one_named(store: MlflowClient, tiny: Path, tmp_path: Path) -> None:
    run_id = made(store, "one", [3.0, 2.0])
    store.log_metric(run_id, "optim/lr", 0.5, step=1)
    result = run_cli("compare", "one", "--metric", "optim/lr", "--config", str(tiny), "--no-log")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.glob("*.png")} == {"compare_train_loss.png", "compare_optim_lr.png"}
    result = run_cli("compare", "one", "--metric", "optim/rl", "--config", str(tiny), "--no-log")
    assert (result.exit_code, "metric optim/rl: none of these runs has it; did you mean optim/lr?" in result.output) == (2, True)
    result = run_cli("compare", "--config", str(tiny))
    assert (result.exit_code, "Missing argument 'RUNS...'" in result.output) == (2, True)


def test_curves_with_a_count_of_their_own_lie_where_they_belong(store: MlflowClient) -> None:
    run_id = made(store, "one", [3.0, 2.0])
    store.log_batch(run_id, [Metric("by_tokens/val_loss", 1.0, BEGAN_MS, 4), Metric("system/cpu", 1.0, BEGAN_MS, 7)])
    (run,) = compare.read([run_id], TrackingConfig(), ("by_tokens/val_loss", "system/cpu")).runs

    def places(metric: str) -> list[list[float] | None]:
        found = [run.axis(axis, metric) for axis in ("step", "tokens")]
        return [None if place is None else place.tolist() for place in found]

    assert places("train/loss") == [[1, 2], [16, 32]]
    assert places("by_tokens/val_loss") == [None, [4000]]
    assert places("system/cpu") == [None, None]
    assert len(compare.pictures(compare.read([run_id], TrackingConfig(), ("system/cpu",)))) == 2


def test_points_read_from_the_database_are_those_that_mlflow_gives(store: MlflowClient) -> None:
    run_id = made(store, "one", [3.0, float("nan"), 2.0, float("inf")])
    store.log_metric(run_id, "train/loss", 1.5, step=2)
    given = [(m.step, m.timestamp, m.value) for m in store.get_metric_history(run_id, "train/loss")]
    assert len(given) == 5
    ours = [tuple(point) for point in compare._histories(store, [run_id, made(store, "two", [])], "train/loss")[run_id]]
    assert sorted(map(repr, ours)) == sorted(map(repr, given))
    (curve,) = [r.curves["train/loss"] for r in compare.read([run_id], TrackingConfig()).runs]
    assert curve.values[:3].tolist() == [3.0, 1.5, 2.0], "of a step told twice, the later"


@pytest.mark.parametrize("table", ["{", '{"data": 3}', '{"columns": [], "data": [["<script>", "p", "w"]]}', "[]", "null"])
def test_odd_files_of_a_run_are_as_if_they_were_not_there(store: MlflowClient, table: str) -> None:
    tags = {"bdh.segment": "2", "mlflow.loggedArtifacts": '[{"path": "samples.json", "type": "table"}]'}
    run_id = made(store, "odd $x$ [/b]", [3.0, float("nan"), 2.0], tags, training__batch_size="8.0")
    for name in ("samples.json", "segments.json"):
        store.log_text(run_id, table, name)
    comparison = compare.read([run_id], TrackingConfig())
    assert comparison.runs[0].samples == {}
    assert comparison.runs[0].tokens_per_step == 0
    assert "<script>" not in shown(comparison)
    assert compare._best(comparison.runs[0].curves["train/loss"]) == "2.0000 at step 3"


def test_report_for_a_folder_that_is_not_there_is_one_clear_error(store: MlflowClient, tiny: Path) -> None:
    made(store, "odd [/b]", [1.0])
    assert run_cli("compare", "latest", "--config", str(tiny)).exit_code == 0
    result = run_cli("compare", "latest", "--out", "nowhere/x.html", "--config", str(tiny))
    assert result.exit_code == 2
    assert "--out nowhere/x.html: there is no folder nowhere" in result.output


def test_long_curves_are_averaged_for_the_picture_only() -> None:
    steps = np.arange(10_000, dtype=float)
    x, y = compare._thinned(steps, steps * 2)
    assert len(x) <= compare.DRAWN_POINTS
    assert y == pytest.approx(x * 2)
    assert x[0] == pytest.approx(np.mean(steps[:13]))
    assert x[-1] == pytest.approx(np.mean(steps[len(steps) // 13 * 13 :]))
