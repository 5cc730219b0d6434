"""Downloads from the mirror, by several processes at once and beside others that read what is there."""

import fcntl
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bdh_mlflow import checkpoint
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.files import try_lock
from bdh_mlflow.tracking import fetch
from bdh_mlflow.tracking.locate import Locator
from bdh_mlflow.tracking.mirrored import MirrorReader
from tests.conftest import run_cli
from tests.tracking.test_locate import CHECKPOINTS, replaced, run_dir
from tests.tracking.test_locate import half as half  # the fixture


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is downloaded."""
    uris, real = list[str](), MirrorReader.download
    monkeypatch.setattr(MirrorReader, "download", lambda self, uri, folder: (uris.append(uri), real(self, uri, folder))[1])
    return uris


def test_what_is_intact_is_left_as_it_is_for_those_who_read_it(tiny: Path, half: Any, asked: list[str]) -> None:
    state = run_dir() / "checkpoint_3.pt"
    manifest, before = checkpoint.describe(state).manifest, state.stat()
    mirror = f"file://{half.info.artifact_uri}"
    uris = [f"{mirror}/{manifest.artifact_path}", f"{mirror}/checkpoints"]
    for uri in uris:
        assert run_cli("checkpoints", "pull", uri, "--config", str(tiny)).output.strip() == str(state.absolute())
        assert (state.stat().st_ino, state.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert asked == [uris[0].removesuffix(".pt") + ".json", uris[1]], "of a single one the manifest says enough"
    replaced(state, state.read_bytes()[:-1] + b"!")
    assert run_cli("checkpoints", "pull", uris[0], "--config", str(tiny)).exit_code == 0
    checkpoint.verify(checkpoint.describe(state))


def test_processes_that_want_the_same_checkpoint_download_it_once(
    half: Any, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, aside = run_dir(), tmp_path / "aside"
    shutil.move(directory, aside)
    first = os.open(CHECKPOINTS, os.O_RDONLY)  # of another process, which downloads
    fcntl.flock(first, fcntl.LOCK_EX)
    waits = threading.Event()
    monkeypatch.setattr(fetch, "try_lock", lambda *given, **named: (waits.set(), try_lock(*given, **named))[1])
    with ThreadPoolExecutor() as pool:
        found = pool.submit(Locator(CHECKPOINTS.absolute(), TrackingConfig()).locate, half.info.run_id)
        assert waits.wait(60)
        assert asked == []
        shutil.move(aside, directory)
        os.close(first)
        assert found.result(60).found == checkpoint.describe(directory.absolute() / "checkpoint_3.pt")
    assert [uri.rpartition("/")[2] for uri in asked] == ["checkpoint_3.json"]
