"""A real server that is slow, refuses, cuts connections, has a full disk, is stopped or killed: no point is lost, no training run stops."""

import itertools
import json
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import load_text

from bdh_mlflow.checkpoint import Checkpoint
from bdh_mlflow.text import Sample, bits_per_byte
from bdh_mlflow.tracking import (
    mirror,
    sync,
)
from bdh_mlflow.tracking.tracker import DatasetFacts
from scripts.relay import Answer, Relay
from scripts.servers import Server, serving
from tests.conftest import history, run_cli, wait_for
from tests.tracking.tracked import HURRY, PROVENANCE, TrackedRun, quiet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(empty_store, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def relay(shared: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """In front of the shared server, with an experiment for this test."""
    relay = Relay(shared.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield relay
    relay.close()


def posting(line: str) -> bool:
    return line.startswith(("POST", "PUT", "PATCH"))


def uploading(line: str) -> bool:
    """Whether a request brings a checkpoint."""
    return line.startswith("PUT") and line.split()[1].endswith(".pt")


def first(count: int, answer: Answer, wanted: Callable[[str], bool] = posting) -> Callable[[str], Answer | None]:
    """This answer to the first requests that are wanted."""
    left = [answer] * count
    return lambda line: left.pop() if left and wanted(line) else None


def exactly_once(store: MlflowClient, run_id: str, steps: int) -> None:
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in range(1, steps + 1)]


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_server_that_answers_with_an_error_gets_everything_later(shared: Server, relay: Relay, tmp_path: Path, status: int) -> None:
    tracked = TrackedRun(tmp_path, training=f"{status}" * 8, experiment=f"answers {status}")
    run_id = tracked.run_id
    relay.trouble = first(20, Answer(status))  # more than go side by side: one must fail again
    tracked.losses(*range(1, 200))
    saved = tracked.save(199, 1.0)
    tracked.losses(200)
    assert tracked.close() == 0
    exactly_once(shared.client, run_id, 200)
    assert shared.client.get_run(run_id).data.tags["bdh.latest_checkpoint"] == saved.manifest.artifact_path
    assert any("does not answer" in note for note in tracked.notes)


def test_slow_server_gets_few_requests(shared: Server, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path, experiment="slow", patience=replace(HURRY, batch_interval_s=1.0))
    run_id = tracked.run_id
    relay.delay_s = 0.2
    relay.requests.clear()
    started = time.monotonic()
    for step in range(1, 301):
        tracked.losses(step)
        time.sleep(0.01)
    tracked.close()
    batches = [line for line in relay.requests if "log-batch" in line]
    assert len(batches) <= 3 + (time.monotonic() - started)
    exactly_once(shared.client, run_id, 300)


def test_any_request_whose_answer_is_lost_may_be_made_again(
    shared: Server, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server leaves it that is killed after the work and before the word: each request of a training run, a few at a time."""
    lost = list[str]()
    for number in itertools.count():
        before = len(lost)
        relay.trouble = losing(lost)
        tracked = TrackedRun(tmp_path / str(number), training=f"{number:032}", experiment="answers lost")
        tracked.tracker.params({"seed": 1})
        tracked.tracker.dataset(DatasetFacts(name="text (validation)", digest="d" * 32, folder="/data", profile={}, context="validation"))
        tracked.losses(1)
        tracked.tracker.samples([Sample("a", "b")], 1)
        tracked.save(1, 2.0)
        assert tracked.close() == 0, (number, tracked.notes)
        whole(shared.client, tracked, number)
        if len(lost) == before:
            break
    for request in ("runs/create", "log-batch", "log-inputs", "logged-models ", "runs/outputs", ".pt ", ".json ", "samples/step_1.txt"):
        assert any(request in line for line in lost), (request, lost)


def losing(lost: list[str]) -> Callable[[str], Answer | None]:
    """No answer to three requests that change something.   lost: those that lost theirs before, as (kind, how often in one training).

    By kind, not by place: which points share a request, and so how many requests there are, is a matter of milliseconds.
    """
    seen = Counter[str]()
    left = 3

    def trouble(line: str) -> Answer | None:
        nonlocal left
        if not posting(line):
            return None
        kind = re.sub("[0-9a-f]{32}|[0-9_]{15,}", "*", line)
        seen[kind] += 1
        if not left or (request := f"{kind} {seen[kind]}") in lost:
            return None
        left -= 1
        lost.append(request)
        return Answer(lost=True)

    return trouble


@pytest.mark.parametrize(
    ("answer", "request_", "kept"),
    [
        (Answer(lost=True), "logged-models/m-", {2}),
        (Answer(lost=True), "logged-models/search", {2}),
        (Answer(403), "logged-models/m-", {1, 2}),
    ],
)
def test_pruning_is_done_again_or_given_up_but_holds_nothing_up(
    shared: Server, relay: Relay, tmp_path: Path, answer: Answer, request_: str, kept: set[int]
) -> None:
    tracked = TrackedRun(tmp_path, experiment="prunes", training=f"{answer.status:03}{request_}".rjust(32), keep=1)
    tracked.save(1, 2.0)
    pointed = f"checkpoints/{tracked.directory.path.name}/checkpoint_1.pt"
    wait_for(lambda: shared.client.get_run(tracked.run_id).data.tags.get("bdh.latest_checkpoint") == pointed)
    relay.requests.clear()
    refuses = answer.status != 0
    relay.trouble = first(9 if refuses else 1, answer, lambda line: request_ in line and (line.startswith("DELETE") or "search" in line))
    tracked.save(2, 1.0)
    assert tracked.close() == 0, tracked.notes
    files = {Path(f.path).name for f in shared.client.list_artifacts(tracked.run_id, f"checkpoints/{tracked.directory.path.name}")}
    assert {f"checkpoint_{step}.pt" for step in kept} == {name for name in files if name.endswith(".pt")}
    assert sum("stays in the mirror" in note for note in tracked.notes) == int(refuses)


def whole(store: MlflowClient, tracked: TrackedRun, number: int) -> None:
    """The training of the test above is there, each thing once."""
    runs = store.search_runs([store.get_run(tracked.run_id).info.experiment_id], f"tags.`bdh.training` = '{number:032}'")
    assert [run.info.run_id for run in runs] == [tracked.run_id], number
    (run,) = runs
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "1"}), number
    for key, value in (("train/loss", 1.0), ("val/loss", 2.0), ("val/bpb", bits_per_byte(2.0, 1.0))):
        assert history(store, tracked.run_id, key) == [(1, value)], (number, key)
    folder = f"checkpoints/{tracked.directory.path.name}"
    assert run.data.tags["bdh.latest_checkpoint"] == run.data.tags["bdh.best_checkpoint"] == f"{folder}/checkpoint_1.pt", number
    files = {Path(f.path).name for f in store.list_artifacts(tracked.run_id, folder)}
    assert files == {"config.yaml", "checkpoint_1.json", "checkpoint_1.pt"}, number
    models = store.search_logged_models([run.info.experiment_id], f"source_run_id = '{tracked.run_id}'")
    assert [(m.name, str(m.status)) for m in models] == [("bdh-step-1", "READY")], number
    assert {(m.key, m.value) for m in models[0].metrics or []} == {("val/loss", 2.0), ("val/bpb", bits_per_byte(2.0, 1.0))}, number
    assert len(run.inputs.dataset_inputs) == 1, number
    rows = json.loads(load_text(f"runs:/{tracked.run_id}/samples.json"))["data"]
    assert [row[0] for row in rows] == [1], number


def test_upload_that_is_cut_off_is_made_again_and_verified(shared: Server, relay: Relay, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, experiment="cut")
    run_id = tracked.run_id
    relay.trouble = first(2, Answer(cut_after=200_000), uploading)
    large(tracked)
    tracked.losses(1)
    assert tracked.close() == 0
    exactly_once(shared.client, run_id, 1)
    result = run_cli("checkpoints", "verify", run_id, "--config", str(written_config(tmp_path)))
    assert (result.exit_code, "1 intact, 0 damaged" in result.output) == (0, True), result.output


def test_upload_is_not_held_back_once_training_is_over(
    shared: Server, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SAME_HOST_UPLOAD_BYTES_PER_S", 100.0)  # hours
    tracked = TrackedRun(tmp_path, experiment="paced")
    saved = large(tracked)
    pointed = "bdh.latest_checkpoint"
    wait_for(lambda: any(uploading(line) for line in relay.requests))
    time.sleep(0.5)
    assert pointed not in shared.client.get_run(tracked.run_id).data.tags
    assert tracked.close() == 0
    assert shared.client.get_run(tracked.run_id).data.tags[pointed] == saved.manifest.artifact_path


def large(tracked: TrackedRun) -> Checkpoint:
    """A checkpoint of 2 MB, handed over."""
    weights = {"encoder": torch.randn(500_000)}
    saved = tracked.directory.save({"step": 1, "tokens_seen": 1, "loss": 1.0, "model_state_dict": weights}, PROVENANCE, None)
    tracked.tracker.checkpoint(saved.path, None)
    return saved


def written_config(tmp_path: Path) -> Path:
    path = tmp_path / "any.yaml"
    path.write_text("{}")
    return path


def test_upload_that_a_proxy_refuses_is_named_with_what_helps_and_kept_for_sync(
    shared: Server, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LARGE_BYTES", 1)
    relay.trouble = lambda line: Answer(413) if uploading(line) else None
    tracked = TrackedRun(tmp_path, experiment="refuses")
    run_id = tracked.run_id
    saved = tracked.save(1)
    tracked.losses(1)
    assert tracked.close() == 1
    text = "\n".join(tracked.notes)
    assert "client_max_body_size" in text
    assert "checkpoint_1.pt was refused and stays here" in text
    assert shared.client.get_run(run_id).info.status == "FINISHED"
    assert "bdh.latest_checkpoint" not in shared.client.get_run(run_id).data.tags
    relay.trouble = lambda line: None
    assert sync.sync(tracked.directory.path, None, quiet).left == 0
    assert shared.client.get_run(run_id).data.tags["bdh.latest_checkpoint"] == saved.manifest.artifact_path


def test_server_with_a_full_disk_gets_the_checkpoint_when_there_is_room(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of its files stands for the disk: the same error at the same place in the real server."""
    with serving(empty_store, tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tracked = TrackedRun(tmp_path)
        run_id = tracked.run_id
        size = 3_000_000
        server.limit_files(size)
        tracked.directory.save({"step": 1, "tokens_seen": 1, "loss": 1.0, "model_state_dict": {"w": torch.randn(size)}}, PROVENANCE, None)
        tracked.tracker.checkpoint(tracked.directory.path / "checkpoint_1.pt", None)
        tracked.losses(*range(1, 50))
        wait_for(lambda: "does not answer" in "".join(tracked.notes))
        wait_for(lambda: len(history(server.client, run_id, "train/loss")) == 49)  # points do not wait behind the file
        server.limit_files(resource.RLIM_INFINITY)
        assert tracked.close() == 0
        exactly_once(server.client, run_id, 49)
        assert server.client.get_run(run_id).data.tags["bdh.latest_checkpoint"].endswith("checkpoint_1.pt")


def test_server_that_is_stopped_and_goes_on_misses_nothing(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(empty_store, tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tracked = TrackedRun(tmp_path)
        run_id = tracked.run_id
        tracked.losses(*range(1, 11))
        server.signal(signal.SIGSTOP)
        tracked.losses(*range(11, 21))
        time.sleep(0.5)
        server.signal(signal.SIGCONT)
        assert tracked.close() == 0
        exactly_once(server.client, run_id, 20)
