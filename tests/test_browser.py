"""The pages of MLflow that users look at, in a real browser on a real server."""

import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import expect

from scripts import browser
from scripts.servers import serving
from tests.conftest import run_cli, train
from tests.track.test_loops import STACKS, last_run, run_loop


@pytest.mark.slow  # a server and a browser: MLflow's pages really show what we log
@pytest.mark.skipif(browser.chromium() is None, reason="no chromium (Debian: apt-get install --no-install-recommends chromium)")
def test_pages_show_runs_curves_samples_comparison_and_model(
    empty_store: Path, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(empty_store, tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        assert train(tiny, "tracking.run_name=one", "tracking.analyze_freq=3").exit_code == 0
        assert train(tiny, "tracking.run_name=two", "training.learning_rate=0.01").exit_code == 0
        assert run_cli("compare", "one", "two", "--config", str(tiny)).exit_code == 0
        assert run_cli("checkpoints", "register", "latest:3", "--name", "text", "--alias", "champion", "--config", str(tiny)).exit_code == 0
        experiment = server.client.get_experiment_by_name("bdh").experiment_id
        (one,) = [run.info.run_id for run in server.client.search_runs([experiment]) if run.info.run_name == "one"]
        _check_pages(server.uri, one, server.client)


@pytest.mark.slow  # three loops, a server and a browser: runs of `track` have the pages that ours have
@pytest.mark.skipif(browser.chromium() is None, reason="no chromium (Debian: apt-get install --no-install-recommends chromium)")
def test_pages_show_the_runs_of_other_loops(empty_store: Path, tmp_path: Path) -> None:
    with serving(empty_store, tmp_path / "server") as server:
        for stack in STACKS:
            assert run_loop(stack, "none", server.uri).returncode == 0
            run = last_run(server.client, stack)
            folder = run.data.tags["bdh.run_dir"]
            with browser.touring(server.uri, run.info.run_id) as tour:
                page = tour.page
                tour.runs()
                expect(page.get_by_role("link", name=run.info.run_name, exact=True)).to_be_visible()
                tour.charts()  # with curves in them
                tour.artifact("checkpoints", folder, "checkpoint_40.json")
                expect(page.get_by_text('"kind": "snapshot"').first).to_be_visible()
                expect(page.get_by_text("checkpoint_40", exact=True)).to_be_visible()
                for tab in ("Overview", "Model metrics", "System metrics", "Artifacts"):
                    expect(page.get_by_role("tab", name=tab)).to_be_visible()


def _check_pages(uri: str, run_id: str, client: MlflowClient) -> None:
    with browser.touring(uri, run_id) as tour:
        page = tour.page
        tour.runs()
        for name in ("one", "two"):
            expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
        expect(page.get_by_text("2 matching runs")).to_be_visible()

        tour.charts()
        prefixes = {key.rpartition("/")[0] for key in client.get_run(run_id).data.metrics}
        assert {"train", "val", "bdh", "perf"} <= prefixes
        for prefix in prefixes:
            expect(page.get_by_text(re.compile(rf"^{prefix}$")).first).to_be_attached()
        expect(page.get_by_text("active_x_l0", exact=True).first).to_be_visible()

        tour.samples()
        expect(page.get_by_text("View as table")).to_be_visible()
        for head in ("step", "prompt", "written"):
            expect(page.get_by_text(head, exact=True)).to_have_count(1)
        expect(page.get_by_text("3", exact=True)).to_have_count(3)

        picture = tour.analysis("activity", 6)
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("image => image.naturalWidth") > 100, "a figure is shown, not a broken picture"

        report = tour.compare()
        expect(report.get_by_role("row", name="training.learning_rate 0.001 0.01")).to_be_visible()
        pictures = 3 + 3  # curves, and the analyses of the one run that has some
        expect(report.locator("img")).to_have_count(pictures)
        for number in range(pictures):
            expect(report.locator("img").nth(number)).to_have_js_property("complete", True)
        widths = report.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
        assert min(widths[:3]) > 1000, "pictures with something in them"
        assert min(widths[3:]) > 100

        tour.model("text")
        expect(page.get_by_text("Version 1")).to_be_visible()
        expect(page.get_by_text("champion")).to_be_visible()
        expect(page.get_by_text(re.compile(r"step 3 of run two, val/loss \d"))).to_be_visible()
