"""Which way a file goes; against real stores: test_team.py."""

from pathlib import Path
from typing import Any

import pytest
import requests

from bdh_mlflow.tracking.mlflow_internals import ServerRepository, fetch_file
from bdh_mlflow.tracking.routes import RoutedRepository, server_at

SMALL, LARGE = 10, 200_000_000


class Ways:
    """A repository whose requests are noted instead of made.

    signed_only, offers: what the server says.   broken: signed addresses fail.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, signed_only: bool = False, offers: bool = True, broken: bool = False
    ):
        self.went: list[str] = []
        self.repository = RoutedRepository("mlflow-artifacts:/1/r/artifacts", tracking_uri=f"http://server.invalid/{folder.name}")
        server_at(self.repository.server).note = self.went.append
        self._folder = folder

        def info(own: ServerRepository) -> dict[str, Any]:
            self.went.append("info")
            return {"artifacts_presigned_only": signed_only, "multipart_uploads_enabled": offers}

        def through(name: str) -> Any:
            def act(own: ServerRepository, *args: Any) -> None:
                self.went.append(name)
                if signed_only:
                    answer = requests.Response()
                    answer.status_code = 403
                    raise requests.HTTPError("403", response=answer)

            return act

        def signed(name: str) -> Any:
            def act(own: ServerRepository, *args: Any) -> None:
                self.went.append(name)
                if broken:
                    raise ConnectionRefusedError("nobody listens")

            return act

        monkeypatch.setattr(ServerRepository, "info", info)
        for name in ("put", "get"):
            monkeypatch.setattr(ServerRepository, name, through(name))
            monkeypatch.setattr(ServerRepository, f"{name}_signed", signed(f"{name}_signed"))

    def upload(self, size: int) -> list[str]:
        file = self._folder / "file.pt"
        with file.open("wb") as content:
            content.truncate(size)
        self.went.clear()
        self.repository.log_artifact(str(file), "checkpoints")
        return self.went

    def download(self) -> list[str]:
        self.went.clear()
        fetch_file(self.repository, "checkpoints/file.pt", self._folder / "file.pt")
        return self.went


def test_small_files_go_through_the_server_and_large_ones_to_its_store_where_it_offers_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(monkeypatch, tmp_path)
    assert ways.upload(SMALL) == ["put"]
    assert ways.upload(LARGE) == ["info", "put_signed"]
    assert ways.upload(LARGE) == ["put_signed"]
    assert ways.download() == ["get"]


def test_server_that_offers_nothing_gets_large_files_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, tmp_path, offers=False)
    assert ways.upload(LARGE) == ["info", "put"]
    assert ways.upload(LARGE) == ["put"]


def test_store_that_cannot_be_reached_is_said_once_and_tried_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, tmp_path, broken=True)
    info, signed, note, put = ways.upload(LARGE)
    assert (info, signed, put) == ("info", "put_signed", "put")
    assert "cannot be used from here (nobody listens): files go through the server" in note
    assert ways.upload(LARGE) == ["put"]


def test_server_that_refuses_everything_else_is_asked_once_and_then_gets_signed_transfers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(monkeypatch, tmp_path, signed_only=True)
    assert ways.upload(SMALL) == ["put", "info", "put_signed"]
    assert ways.upload(SMALL) == ["put_signed"]
    assert ways.download() == ["get_signed"]


def test_variables_of_mlflow_overrule_what_the_server_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, tmp_path)
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    assert ways.upload(LARGE) == ["put"]
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "5")
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "true")
    assert ways.upload(SMALL) == ["put_signed"]
    assert ways.download() == ["get_signed"]
