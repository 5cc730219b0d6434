"""The files of one run in its artifact store, asked directly: MLflow's client would ask for the run before each file."""

import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from bdh_mlflow.tracking import routes, store
from bdh_mlflow.tracking.mlflow_internals import fetch_file
from bdh_mlflow.tracking.routes import RoutedRepository
from bdh_mlflow.tracking.store import on_this_machine


class Artifacts:
    """Files under one artifact URI. Paths are from there on, with `/`. Calls raise whatever the store does: each raises its own kinds.

    folder: where they lie, if the store is a folder of this machine.
    """

    def __init__(self, artifact_uri: str, tracking_uri: str) -> None:
        self.folder = store.local_path(artifact_uri)
        self.uri = artifact_uri
        self._repository = get_artifact_repository(artifact_uri, tracking_uri=tracking_uri)

    @property
    def server(self) -> routes.Server | None:
        """The server through which files go; None where this machine reaches the store itself."""
        return routes.server_at(self._repository.server) if isinstance(self._repository, RoutedRepository) else None

    def put(self, file: Path, folder: str) -> None:
        """Upload a file under its own name."""
        self._repository.log_artifact(str(file), folder or None)  # type: ignore[no-untyped-call]

    def shares_this_machine(self, file: Path) -> bool:
        """Whether the server that receives and writes this file, in one request, takes its processor time from here."""
        repository = self._repository
        return isinstance(repository, RoutedRepository) and repository.is_single_request(file) and on_this_machine(repository.server)

    def put_content(self, content: IO[bytes], path: str) -> None:
        """Upload through the server, which `shares_this_machine`, from an open file."""
        assert isinstance(self._repository, RoutedRepository)
        self._repository.put(path, content)

    def put_text(self, text: str, path: str) -> None:
        """Write a text file."""
        place = PurePosixPath(path)
        with tempfile.TemporaryDirectory(prefix="artifact-") as folder:
            file = Path(folder) / place.name
            file.write_text(text, encoding="utf-8")
            self.put(file, str(place.parent) if place.parent.name else "")

    def sizes(self, folder: str = "") -> dict[str, int | None]:
        """Names in a folder and their sizes in bytes, None for folders and where the store does not tell."""
        found = self._repository.list_artifacts(folder or None)
        return {PurePosixPath(f.path).name: None if f.is_dir else f.file_size for f in found}

    def read(self, path: str) -> bytes:
        """The contents of a small file."""
        with tempfile.TemporaryDirectory(prefix="artifact-") as folder:
            return self.fetch(path, Path(folder)).read_bytes()

    def fetch(self, path: str, folder: Path) -> Path:
        """Download one file into a folder, under its own name."""
        target = folder / PurePosixPath(path).name
        fetch_file(self._repository, path, target)
        return target

    def delete(self, path: str) -> None:
        """Remove a file. Not every store lets files be removed."""
        self._repository.delete_artifacts(path)  # type: ignore[no-untyped-call]


def try_artifacts(artifact_uri: str, tracking_uri: str) -> None:
    """Write a small file at the top of an artifact root, read it back and remove it.   Raises whatever the store does."""
    artifacts, name = Artifacts(artifact_uri, tracking_uri), f"bdh-doctor-{os.urandom(8).hex()}.txt"
    artifacts.put_text(name, name)
    try:
        if artifacts.read(name).decode() != name:
            raise OSError(f"{name} is not what was written")
    finally:
        artifacts.delete(name)
