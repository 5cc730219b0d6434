"""One run read back: settings, curves on their axes, files."""

import json
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.studies import compare, curves, report
from bdh_mlflow.tracking.mlflow_internals import MetricPoint
from tests.studies.runs import BEGAN_MS, made_run


def test_axes_are_steps_tokens_and_the_time_in_training(store: MlflowClient) -> None:
    """Three hours of work, then a gap from 2 h 30 min to 3 h 30 min."""
    run_id = made_run(store, "broken", [3.0, 2.0, 1.5, 1.25], {"bdh.segment": "2"})
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


def test_metrics_with_steps_of_their_own_are_placed_on_the_axes_that_fit(store: MlflowClient) -> None:
    run_id = made_run(store, "one", [3.0, 2.0])
    own = [
        Metric("by_tokens/val_loss", 1.0, BEGAN_MS, 4),
        Metric("by_bytes/val_bpb", 1.0, BEGAN_MS, 6),
        Metric("system/cpu", 1.0, BEGAN_MS, 7),
    ]
    store.log_batch(run_id, own, tags=[RunTag("bdh.bytes_per_token", "3.0")])
    comparison = compare.read([run_id], TrackingConfig(), ("by_tokens/val_loss", "by_bytes/val_bpb", "system/cpu"))
    (run,) = comparison.runs
    assert report.axes(comparison) == ("step", "tokens", "bytes of text", "active hours")

    def places(metric: str) -> list[list[float] | None]:
        found = [run.axis(axis, metric) for axis in ("step", "tokens", "bytes of text")]
        return [None if place is None else place.tolist() for place in found]

    assert places("train/loss") == [[1, 2], [16, 32], [48, 96]]
    assert places("by_tokens/val_loss") == [None, [4000], [12000]]
    assert places("by_bytes/val_bpb") == [None, [2000], [6000]]
    assert places("system/cpu") == [None, None, None]
    assert len(report.plots(compare.read([run_id], TrackingConfig(), ("system/cpu",)))) == 2


@pytest.mark.parametrize(
    ("tags", "params", "expected"),
    [
        ({}, {}, 1.0),
        ({}, {"tokenizer__type": "huggingface"}, 0.0),
        ({"bdh.bytes_per_token": "many"}, {}, 0.0),
        ({"bdh.bytes_per_token": "nan"}, {}, 0.0),
    ],
    ids=["before vocabularies", "not told", "no number", "not finite"],
)
def test_bytes_of_a_token_are_what_the_run_says(store: MlflowClient, tags: dict[str, str], params: dict[str, Any], expected: float) -> None:
    run_id = made_run(store, "one", [3.0, 2.0], tags, **params)
    ((run,)) = compare.read([run_id], TrackingConfig()).runs
    assert run.bytes_per_token == expected
    assert (run.axis("bytes of text", "train/loss") is None) is (expected == 0.0)


@pytest.mark.parametrize("table", ["{", '{"data": 3}', '{"columns": [], "data": [["<script>", "p", "w"]]}', "[]", "null"])
def test_malformed_files_of_a_run_count_as_absent(store: MlflowClient, table: str) -> None:
    tags = {"bdh.segment": "2", "mlflow.loggedArtifacts": '[{"path": "samples.json", "type": "table"}]'}
    run_id = made_run(store, "odd $x$ [/b]", [3.0, float("nan"), 2.0], tags, training__batch_size="many")
    for name in ("samples.json", "segments.json"):
        store.log_text(run_id, table, name)
    comparison = compare.read([run_id], TrackingConfig())
    assert comparison.runs[0].samples == {}
    assert comparison.runs[0].tokens_per_step == 0
    assert "<script>" not in report.page(comparison, report.plots(comparison))
    assert comparison.runs[0].curves["train/loss"].lowest() == (3, 2.0)


def test_of_several_points_at_one_step_the_latest_counts() -> None:
    points = [MetricPoint(2, 20, 5.0), MetricPoint(1, 10, 3.0), MetricPoint(2, 30, 4.0)]
    curve = curves.Curve.of(points)
    assert (curve.steps.tolist(), curve.values.tolist(), curve.at_ms.tolist()) == ([1, 2], [3.0, 4.0], [10, 30])


def test_curve_without_finite_values_has_no_lowest_point() -> None:
    assert curves.Curve.of([]).lowest() is None
    assert curves.Curve.of([MetricPoint(1, 0, float("nan")), MetricPoint(2, 0, float("inf"))]).lowest() is None


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.learning_rate", "3e-4", 0.0003),
        ("training.learning_rate", "<b>", "<b>"),
        ("training.max_iters", "10", 10),
        ("training.compile", "auto", "auto"),
        ("training.compile", "False", False),
        ("low_precision.optimizer_bits", "8", 8),
        ("low_precision.optimizer_bits", "null", None),
        ("dataset.text_column", "2024_01", "2024_01"),
        ("tracking.tags.team.name", "7", "7"),
        ("training.seed.x", "7", 7),
        ("training.gone", "1e3", 1000),
        ("other.setting", "[1, 2", "[1, 2"),
        ("other.setting", "nan", "nan"),
    ],
)
def test_setting_is_read_by_its_declared_type_else_as_yaml(key: str, text: str, value: Any) -> None:
    found = curves.setting(key, text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text", ["2024-13-45", "1" * 5000, "[" * 3000, "&a [*a]", '"\\UFFFFFFFF"', "!!python/name:os.system", "{a: ", "*x"]
)
def test_a_param_of_another_program_is_text_whatever_it_looks_like(text: str) -> None:
    assert curves.setting("data.date", text) == text
