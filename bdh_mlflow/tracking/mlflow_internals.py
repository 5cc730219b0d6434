"""Every private name of MLflow that this package leans on, one function each, and a test for each against the installed version.

A new version of MLflow is tried here first (tests/tracking/test_mlflow_internals.py).
"""

from pathlib import Path
from typing import IO

from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.utils.request_utils import augmented_raise_for_status
from mlflow.utils.rest_utils import http_request


def is_single_request(repository: ArtifactRepository, path: Path) -> bool:
    """Whether MLflow would upload this file through its server in one request, as `put` does."""
    return isinstance(repository, HttpArtifactRepository) and not repository._should_multipart_upload(path)  # type: ignore[no-untyped-call]


def put(repository: ArtifactRepository, path: str, file: IO[bytes]) -> None:
    """Upload a file through the server in one request, as `HttpArtifactRepository.log_artifact` does.

    path: of the artifact, from the run's root, with a leading slash.   Raises what requests does, with the server's answer.
    """
    assert isinstance(repository, HttpArtifactRepository)
    kind = {"Content-Type": "application/octet-stream"}
    answer = http_request(repository._host_creds, path, "PUT", data=file, extra_headers=kind)  # type: ignore[no-untyped-call]
    augmented_raise_for_status(answer)  # type: ignore[no-untyped-call]
