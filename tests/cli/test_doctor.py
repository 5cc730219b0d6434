"""`doctor`: what it finds, and what it says to do."""

import dataclasses
import platform
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import RunDirectory
from bdh_mlflow.cli import doctor
from bdh_mlflow.cli.doctor import examine_group, group_table
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.records import Tags
from tests.conftest import run_cli, tiny_config, train
from tests.groups import in_group


def found(what: str) -> doctor.Finding:
    (finding,) = [f for f in doctor.examine(tiny_config()) if f.what == what]
    return finding


def test_setup_without_problems_ends_with_what_to_type(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny).exit_code == 0
    result = run_cli("doctor", "--config", str(tiny))
    assert result.exit_code == 0, result.output
    assert "Next: bdh-mlflow train --config" in result.output
    assert found("tracking URI").found == f"{store.tracking_uri} (MLFLOW_TRACKING_URI)"
    assert found("checkpoints").found.endswith("checkpoints: 1 runs")
    assert "the UI on this machine shows them" in found("artifact root").found


def test_store_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    result = run_cli("doctor", "--config", str(tiny))
    assert result.exit_code == 1
    assert "Problems: tracking store" in result.output
    assert "secret" not in result.output


def test_undelivered_journal_is_named_with_the_command_that_delivers_it(store: MlflowClient) -> None:
    run = RunDirectory(Path("checkpoints/run_20251108_143022"), {})
    records = journal.Journal(run.folder)
    records.append(Tags(tags={}))
    assert "training now" in found("journal").found
    run.close()
    (folder,) = checkpoint.pending(Path("checkpoints"))
    finding = found("journal")
    assert (finding.good, finding.do) == (False, f"bdh-mlflow sync {folder}")


def test_journal_that_cannot_be_read_is_named(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(Path("checkpoints/run_20251108_143022"), {})
    journal.Journal(run.folder).append(Tags(tags={}))

    def denied(folder: Path) -> journal.JournalReader:  # tests may run as root, whom no permission stops
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(journal, "JournalReader", denied)
    finding = found("journal")
    assert (finding.good, finding.found) == (False, f"{run.folder}: cannot be read")
    run.close()


def test_artifacts_that_a_server_elsewhere_cannot_show_are_a_problem() -> None:
    from mlflow.entities import Experiment

    experiment = Experiment("1", "bdh", "file:///tmp/here", "active")
    assert not doctor.artifact_root(experiment, "http://server:5000").good
    assert doctor.artifact_root(experiment, "sqlite:////tmp/m.db").good


def test_each_process_of_a_group_says_what_it_sees_and_differences_are_marked() -> None:
    (ranks, again) = in_group(2, examine_group)
    assert ranks == again
    assert [(rank.host, rank.device, rank.torch) for rank in ranks] == [(platform.node(), "cpu", torch.__version__)] * 2
    assert all(rank.exchange_ms > 0 and rank.sum_mb_per_s > 0 for rank in ranks)
    other = dataclasses.replace(ranks[1], threads=7, code="c0ffee", host="elsewhere")
    first, second = group_table([ranks[0], other])
    assert not any("differs" in cell for cell in first)
    assert second[:6] == ["1", "elsewhere", "cpu", "7  <- differs", torch.__version__, "c0ffee  <- differs"]
    assert (ranks[1].trains_with(ranks[0]), other.trains_with(ranks[0])) == (True, False)
