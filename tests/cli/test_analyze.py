"""`analyze`, from a trained run to its artifacts and a comparison."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import history, only_run, run_cli, train

SENTENCES = "first: [aa, ab, ac, ad, ae, af, ag, ah]\nsecond: [za, zb, zc, zd, ze, zf, zg, zh]\n"


def test_a_run_is_analyzed_logged_and_compared(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny, "training.block_size=32", "tracking.analyze_freq=3").exit_code == 0
    run = only_run(store)
    names = {Path(f.path).name for f in store.list_artifacts(run.info.run_id, "analysis")}
    assert names == {"activity", "repetition", "graph"}, "while it was trained"
    assert [step for step, _ in history(store, run.info.run_id, "analysis/active_x_l0")] == [3, 6]
    Path("sentences.yaml").write_text(SENTENCES)
    options = ("--config", str(tiny), "--words", "8", "--sentences", "sentences.yaml")
    result = run_cli("analyze", "latest", *options)
    assert result.exit_code == 0, result.output
    assert f"Stored in run {run.info.run_id} under analysis/" in result.output
    for name in ("activity", "repetition", "graph", "synapses_l1h0", "selectivity_l1h0"):
        assert Path(f"analysis/{name}/step_6.svg").read_text().startswith("<?xml")
        told = json.loads(Path(f"analysis/{name}/step_6.json").read_text())
        assert told["made_of"]["step"] == 6
        assert told["says"][1:] in result.output.replace("\n", "")
    assert run.info.run_id in result.output
    tags = only_run(store).data.tags
    assert {key: tags[key] for key in tags if key.startswith("bdh.analysis.")} == dict.fromkeys(
        (f"bdh.analysis.{name}" for name in ("activity", "graph", "repetition", "selectivity_l1h0", "synapses_l1h0")), "6"
    )
    assert run_cli("compare", run.info.run_id, "--config", str(tiny)).exit_code == 0
    page = Path("compare.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 5
    assert "step 6: of 64 neurons a token activates" in page
    assert run_cli("analyze", "latest:3", "--config", str(tiny), "--only", "activity").exit_code == 0
    assert only_run(store).data.tags["bdh.analysis.activity"] == "6", "a look at an earlier step is not the last one"


def test_without_a_store_all_is_made_and_it_is_said(store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tiny, "dataset.val_fraction=0").exit_code == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = run_cli("analyze", "latest", "--config", str(tiny), "--words", "8")
    assert result.exit_code == 1
    assert "no text for validation, so there is no activity and no synapses" in result.output
    assert "The figures are in analysis; --no-log asks no store" in result.output
    assert sorted(path.name for path in Path("analysis").iterdir()) == ["graph", "repetition"]
    other = run_cli("analyze", "latest", "--config", str(tiny), "--no-log", "--only", "activity", "--data", "text")
    assert other.exit_code == 0, other.output
    assert "taking 1 % of the documents of text" in other.output


def test_analyses_change_nothing_of_a_training(store: MlflowClient, text: Path, tiny: Path) -> None:
    for settings in (("tracking.analyze_freq=2",), ()):
        assert train(tiny, *settings).exit_code == 0
    runs = store.search_runs([store.get_experiment_by_name("bdh").experiment_id])
    first, second = (history(store, run.info.run_id, "train/loss") for run in runs)
    assert first == second
    assert len(first) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "activty"), "activty: no analysis of that name"),
        (("--layer", "9"), "--layer 9: this model has layers 0 to 1"),
        (("--text", "none.txt"), "--text none.txt: cannot be read as text"),
        (("--text", "short.txt", "--only", "synapses"), "a text of 2 tokens is too short"),
        (("--sentences", "none.yaml"), "none.yaml: no such file"),
        (("--only", "selectivity"), "--sentences FILE"),
        (("--out", "short.txt/x"), "cannot be written"),
        (("--out", ""), "empty text names no file or folder"),
        (("--text", ""), "--text .: cannot be read as text"),
    ],
)
def test_what_cannot_be_done_is_one_error(store: MlflowClient, text: Path, tiny: Path, words: tuple[str, ...], message: str) -> None:
    assert train(tiny, "training.max_iters=1").exit_code == 0
    Path("short.txt").write_text("ab")
    result = run_cli("analyze", "latest", "--config", str(tiny), *words)
    assert (result.exit_code, message in result.output) == (2, True), result.output
