"""The page of a comparison and its plots."""

import json

import numpy as np
import pytest
from mlflow import MlflowClient

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.studies import compare, report
from tests.studies.runs import made_run


def test_text_of_a_run_cannot_break_the_page(store: MlflowClient) -> None:
    made_run(store, "<script>alert(1)</script>", [1.0], training__learning_rate="<b>")
    made_run(store, "b", [1.0], training__learning_rate="2")
    comparison = compare.read(["bdh"], TrackingConfig())
    page = report.page(comparison, report.plots(comparison))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_long_curves_are_averaged_for_the_plot() -> None:
    steps = np.arange(10_000, dtype=float)
    x, y = report.averaged(steps, steps * 2)
    assert len(x) <= report.PLOTTED_POINTS
    assert y == pytest.approx(x * 2)
    assert x[0] == pytest.approx(np.mean(steps[:13]))
    assert x[-1] == pytest.approx(np.mean(steps[len(steps) // 13 * 13 :]))


def test_elements_escape_whatever_is_not_html_yet() -> None:
    cell = report.element("td", "a < b", report.element("b", "<i>"), class_='"wide"')
    assert cell == '<td class="&quot;wide&quot;">a &lt; b<b>&lt;i&gt;</b></td>'
    assert report.element("img", alt="x") == '<img alt="x">'


def test_samples_stand_side_by_side_with_the_generated_part_marked(store: MlflowClient) -> None:
    tags = {"mlflow.loggedArtifacts": '[{"path": "samples.json", "type": "table"}]'}
    for name in "ab":
        run_id = made_run(store, name, [1.0], tags)
        store.log_text(run_id, json.dumps({"data": [[1, "def ", f"<{name}>"], [2, "x", "y"]][: 2 - (name == "b")]}), "samples.json")
    page = report.page(compare.read(["bdh"], TrackingConfig()), {})
    assert page.count("<pre>def <b>&lt;") == 2
    assert "<th>step 2</th>" not in page, "only one of two runs has it"
