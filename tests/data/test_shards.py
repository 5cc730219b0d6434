"""Parquet files with tokens: the same bytes from any number of processes, and from a preparation that was killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bdh_mlflow.data import prepare, shards
from bdh_mlflow.data.columns import TOKENIZER_KEY
from bdh_mlflow.data.shards import Tokenizing
from bdh_mlflow.errors import DataError
from bdh_mlflow.vocabulary import of_content
from tests.conftest import documents
from tests.vocabulary import made


def source(tmp_path: Path, count: int = 200) -> str:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(count)))
    return str(file)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES_WITH_TOKENS", 3000)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_files_hold_text_and_tokens_and_say_whose_they_are(tmp_path: Path) -> None:
    own, told = made.of_bpe(), list[tuple[int, float]]()
    done = prepare.prepare(
        source(tmp_path), tmp_path / "out", "text", lambda written, share: told.append((written.tokens, share)), Tokenizing(own)
    )
    tables = [pq.read_table(tmp_path / "out" / name) for name in contents(tmp_path / "out")]
    assert len(tables) == done.written.files > 1
    for table in tables:
        assert table.schema.metadata[TOKENIZER_KEY].decode() == own.digest
        assert [own.decode(ids) for ids in table["tokens"].to_pylist()] == table["text"].to_pylist()
    assert done.written.tokens == sum(len(ids) for table in tables for ids in table["tokens"].to_pylist())
    assert told == sorted(told)
    assert told[-1] == (done.written.tokens, 1.0)


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_files(tmp_path: Path) -> None:
    for processes in (1, 2, 3):
        prepare.prepare(source(tmp_path), tmp_path / str(processes), "text", tokenizing=Tokenizing(made.of_bpe(), processes))
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


class Stopped(KeyboardInterrupt):
    """Ctrl-C."""


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "empty folder"])
def test_an_interrupted_preparation_goes_on_behind_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    straight = tmp_path / "straight"
    prepare.prepare(source(tmp_path), straight, "text", tokenizing=Tokenizing(made.of_bpe()))
    if there:
        (tmp_path / "out").mkdir()

    def stop(written: shards.Written, share: float) -> None:
        if written.files == 2:
            raise Stopped

    with pytest.raises(Stopped):
        prepare.prepare(source(tmp_path), tmp_path / "out", "text", stop, Tokenizing(made.of_bpe()))
    made_again: list[int] = []
    prepare.prepare(
        source(tmp_path), tmp_path / "out", "text", lambda written, share: made_again.append(written.files), Tokenizing(made.of_bpe())
    )
    assert made_again[0] == 2, "the two finished files are not made again"
    assert contents(tmp_path / "out") == contents(straight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out", "straight"]


def test_other_text_than_before_is_refused_and_another_tokenizer_begins_again(tmp_path: Path) -> None:
    def stop(written: shards.Written, share: float) -> None:
        if written.files == 2:
            raise Stopped

    def prepared(tokenizing: Tokenizing, on_progress: Any = lambda written, share: None) -> None:
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text", on_progress, tokenizing)

    file = Path(source(tmp_path))
    with pytest.raises(Stopped):
        prepared(Tokenizing(made.of_bpe()), stop)
    file.write_text(file.read_text().replace("return", "yields", 1))
    with pytest.raises(DataError, match=r"a.jsonl: no longer the text of which .* holds the beginning; remove that folder"):
        prepared(Tokenizing(made.of_bpe()))
    source(tmp_path)
    with pytest.raises(Stopped):
        prepared(Tokenizing(made.of_bpe()), stop)
    other = of_content("huggingface", made.bpe(270), None, "x")
    prepared(Tokenizing(other))
    assert {pq.read_schema(f).metadata[TOKENIZER_KEY].decode() for f in (tmp_path / "out").iterdir()} == {other.digest}


def test_documents_that_are_not_given_back_are_refused_or_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("def", "two  spaces", "x  y")))
    own = of_content("sentencepiece", made.sentencepiece_model(remove_extra_whitespaces=True), None, "x")
    with pytest.raises(DataError, match=r"among documents 1 to 3: 2 that the tokenizer does not give back, the first: for 'two  spaces'"):
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text", tokenizing=Tokenizing(own))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    done = prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text", tokenizing=Tokenizing(own, lossy=True))
    assert (done.written.documents, done.written.lossy) == (3, 2)


def test_the_column_of_tokens_is_not_that_of_the_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column tokens: the tokens go into a column of that name"):
        prepare.prepare(source(tmp_path), tmp_path / "out", "tokens", tokenizing=Tokenizing(made.of_bpe()))


SCRIPT = """
import sys, time
from pathlib import Path
from bdh_mlflow.data import prepare, shards
from bdh_mlflow.vocabulary.find import of_file

if __name__ == "__main__":
    shards.ROW_GROUP_BYTES, shards.SHARD_BYTES_WITH_TOKENS = 1000, 3000
    def slowly(written, share):
        print(written.files, flush=True)
        time.sleep(0.05)
    prepare.prepare("a.jsonl", Path("out"), "text", slowly, shards.Tokenizing(of_file(Path("t.json")), 2))
"""


@pytest.mark.slow  # a real SIGKILL of the process that writes, while others make tokens for it
def test_a_killed_preparation_leaves_no_process_and_goes_on_to_the_same_files(tmp_path: Path) -> None:
    source(tmp_path, 400)
    (tmp_path / "t.json").write_bytes(made.bpe())
    (tmp_path / "script.py").write_text(SCRIPT)
    running = subprocess.Popen([sys.executable, "script.py"], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.strip() == "2":
            break
    others = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True, check=True).stdout.split()
    with pytest.raises(DataError, match="another preparation is writing here"):
        prepare.prepare("a.jsonl", tmp_path / "out", "text", tokenizing=Tokenizing(made.of_bpe()))
    running.send_signal(signal.SIGKILL)
    running.communicate()
    end = time.monotonic() + 20
    while (left := [pid for pid in others if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []
    (partial,) = tmp_path.glob(".out.*.partial")
    finished = len(list(partial.glob("*.parquet")))
    assert finished >= 2
    again: list[int] = []
    prepare.prepare("a.jsonl", tmp_path / "out", "text", lambda written, share: again.append(written.files), Tokenizing(made.of_bpe()))
    assert again[0] >= 2
    prepare.prepare("a.jsonl", tmp_path / "straight", "text", tokenizing=Tokenizing(made.of_bpe()))
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.slow  # a process that makes tokens is killed, as the system does for lack of memory
def test_a_killed_helper_ends_the_preparation_and_what_is_finished_stays(tmp_path: Path) -> None:
    source(tmp_path, 400)
    (tmp_path / "t.json").write_bytes(made.bpe())
    (tmp_path / "script.py").write_text(SCRIPT)
    running = subprocess.Popen([sys.executable, "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.strip() == "2":
            break
    found = subprocess.run(["pgrep", "-P", str(running.pid), "-f", "spawn_main"], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "a process that makes tokens was killed (by lack of memory?); what is finished stays: give fewer --processes" in said
    (partial,) = tmp_path.glob(".out.*.partial")
    assert len(list(partial.glob("*.parquet"))) >= 2
