"""Records and messages through JSON, of this version, of the one before, and of one to come."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bdh_mlflow.text import Evaluation, LoggedPoint
from bdh_mlflow.tracking import records
from bdh_mlflow.tracking.records import (
    Alive,
    ArtifactSaved,
    Attached,
    CheckpointSaved,
    End,
    Finished,
    Input,
    JournalRecord,
    Message,
    Note,
    Params,
    Points,
    Probed,
    Progress,
    Refused,
    RunIdentity,
    SnapshotSaved,
    Tags,
    Text,
    Unknown,
)
from bdh_mlflow.tracking.status import KnownRun, StoreStatus
from tests.tracking.tracked import entries, segment

VERSION_1 = Path(__file__).parents[1] / "resources" / "version1"
ROW = {"step": 1, "prompt": "a", "written": "b"}
RECORDS: list[JournalRecord] = [
    segment(),
    Points(values={"train/loss": 1.5}, step=3),
    Params(params={"training.seed": "1"}),
    Tags(tags={"a": "b"}),
    Input(name="text", digest="d", source="{}", profile="{}", context="training"),
    Text(artifact="samples/step_1.txt", text="t", rows=[ROW]),
    CheckpointSaved(path="/c.pt", evaluation=Evaluation(3, 1.5, 7)),
    CheckpointSaved(path="/c.pt", evaluation=None),
    SnapshotSaved(path="/checkpoint_3", points=(LoggedPoint("loss", 1.5, 2, 7),)),
    ArtifactSaved(path="artifacts/a", artifact="a"),
    End(status="FINISHED", tags={}, step=None),
    Unknown(kind="hologram", fields={"depth": 3}),
]
IDENTITY = RunIdentity(run_id="r", name="n", experiment_id="1", experiment="bdh", tracking_uri="u", artifact_uri="a", continued=False)
MESSAGES: list[Message] = [
    Note(text="t"),
    Attached(run=IDENTITY),
    Probed(status=StoreStatus("u", True, KnownRun({"a": "b"}, 2, 7))),
    Probed(status=StoreStatus("u", False, None)),
    Refused(reason="r"),
    Progress(delivered=3, lost=0),
    Alive(),
    Finished(undelivered=1, lost=0),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_record_comes_back_from_its_line(record: JournalRecord) -> None:
    line = json.loads(json.dumps(records.to_line(record, 5)))
    assert list(line)[:3] == ["kind", "v", "at_ms"]
    assert records.from_line(line) == (record, 5)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_message_comes_back_from_its_line(message: Message) -> None:
    assert records.message_from_json(json.loads(json.dumps(records.message_to_json(message)))) == message


@pytest.mark.parametrize("printed", [None, 3, "note", [], {}, {"kind": "note"}, {"kind": "hologram", "v": 9}, {"kind": ["note"]}])
def test_what_is_no_message_is_none(printed: object) -> None:
    assert records.message_from_json(printed) is None


@pytest.mark.parametrize("record", RECORDS[:-1], ids=lambda record: record.kind)
def test_field_of_a_newer_version_is_kept_and_skipped(record: JournalRecord) -> None:
    assert not isinstance(record, Unknown)
    line = {**records.to_line(record, 5), "v": 9, "colour": "blue"}
    read, _ = records.from_line(line)
    assert read == replace(record, unknown_fields={"colour": "blue"})
    assert records.to_line(read, 5) == {**line, "v": records.FORMAT}


def test_message_of_a_newer_version_is_read_as_far_as_it_is_known() -> None:
    message = records.message_from_json({"kind": "note", "v": 9, "text": "t", "level": "debug"})
    assert message == Note(text="t", unknown_fields={"level": "debug"})


@pytest.mark.parametrize("line", [{}, {"kind": "points"}, {"kind": "points", "at_ms": 1}, {"at_ms": 1, "values": {}}])
def test_line_without_what_a_record_needs_is_none(line: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        records.from_line(line)


def test_every_line_of_the_version_before_is_a_known_record() -> None:
    journals = sorted(VERSION_1.rglob("journal.jsonl"))
    assert len(journals) == 7
    for path in journals:
        found = entries(path.parent)
        assert len(found) == len(path.read_text().splitlines())
        assert not [entry for entry in found if isinstance(entry.record, Unknown) or getattr(entry.record, "unknown_fields", {})]
    losses = [e.record.step for e in entries(path.parent) if isinstance(e.record, Points) and "train/loss" in e.record.values]
    assert losses == [1, 2, 3, 4, 5, 6]
    evaluations = [e.record.evaluation for e in entries(path.parent) if isinstance(e.record, CheckpointSaved)]
    assert evaluations[-1] is not None
    assert evaluations[-1].step == 6


@pytest.mark.parametrize("record", [r for r in RECORDS if not isinstance(r, Unknown)], ids=lambda r: r.kind)
def test_a_record_with_a_value_of_another_type_is_none(record: JournalRecord) -> None:
    """It would be taken for an outage of the store, and retried for ever."""
    tree = records.to_line(record, 1)
    for name in [name for name in tree if name not in ("kind", "v", "evaluation")]:
        for wrong in (object(), {"a": object()}, [object()] if name not in ("rows", "audit") else {}):
            with pytest.raises((TypeError, ValueError, KeyError)):
                records.from_line({**tree, name: wrong})
