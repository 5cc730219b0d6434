"""Which way files go to and from the artifact store behind an MLflow server.

Through the server, which every client that reaches it can use; or straight to the store, at addresses that the server signs: large uploads
where the server offers it, and everything where it takes nothing else (`--artifacts-presigned-only`, MLflow 3.18). A server may offer
addresses that this machine cannot reach: that is noticed once, said once, and files go through the server from then on. MLflow's own
variables (MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD, ..._DOWNLOAD, MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE) overrule what is found out.
Once `install` was called, all of MLflow's code in this process goes these ways.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from mlflow.environment_variables import (
    MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD,
    MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD,
    MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE,
)
from requests import HTTPError

from bdh_mlflow.files import first_line
from bdh_mlflow.tracking.mlflow_internals import ServerRepository, chosen_by_user, use_for_servers

LARGE_UPLOAD_BYTES = 100_000_000
"""From here on an upload goes to the store in parts, where the server offers it: a proxy before the server need not take it whole."""


@dataclass
class Server:
    """What is known of one server.   note: called with a line for the user."""

    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
    offers_uploads: bool | None = None
    signed_only: bool = False
    unreachable: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_SERVERS: dict[str, Server] = {}


def server_at(address: str) -> Server:
    """What this process knows of the server at an address."""
    return _SERVERS.setdefault(address, Server())


class RoutedRepository(ServerRepository):
    """Artifacts behind an MLflow server, each file by the way that is open for it."""

    def is_single_request(self, file: Path) -> bool:
        """Whether an upload of this file would go through the server, in one request."""
        known = server_at(self.server)
        return not (known.signed_only or self._in_parts(file.stat().st_size, known))

    def log_artifact(self, local_file: str | Path, artifact_path: str | None = None) -> None:
        """Upload a file.   artifact_path: the folder among the artifacts.   Raises whatever the last open way does."""
        file, known = Path(local_file), server_at(self.server)
        if known.signed_only or self._in_parts(file.stat().st_size, known):
            try:
                self.put_signed(file, artifact_path)
                return
            except FileNotFoundError:
                raise
            except Exception as error:  # MLflow's own, requests' and OS errors
                if known.signed_only:
                    raise
                self._give_up(known, error)
        with file.open("rb") as content:
            if self._taken_through(lambda: self.put("/".join(filter(None, (artifact_path, file.name))), content), known):
                return
        self.put_signed(file, artifact_path)

    def _download_file(self, remote_file_path: str, local_path: str | Path) -> None:
        target, known = Path(local_path), server_at(self.server)
        wanted = chosen_by_user(MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD) and not known.unreachable
        if known.signed_only or wanted:
            try:
                self.get_signed(remote_file_path, target)
                return
            except Exception as error:  # as above
                if known.signed_only:
                    raise
                self._give_up(known, error)
        if not self._taken_through(lambda: self.get(remote_file_path, target), known):
            self.get_signed(remote_file_path, target)

    def _taken_through(self, act: Callable[[], None], known: Server) -> bool:
        """Move a file through the server.   Returns whether the server takes files this way."""
        try:
            act()
        except HTTPError as error:
            refused = error.response is not None and error.response.status_code == HTTPStatus.FORBIDDEN
            if not refused or not self.info().get("artifacts_presigned_only"):
                raise
            known.signed_only = True
            return False
        return True

    def _in_parts(self, size: int, known: Server) -> bool:
        least = chosen_by_user(MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE)
        if known.unreachable or size < (LARGE_UPLOAD_BYTES if least is None else least):
            return False
        if (chosen := chosen_by_user(MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD)) is not None:
            return bool(chosen)
        if known.offers_uploads is None:
            known.offers_uploads = bool(self.info().get("multipart_uploads_enabled"))
        return known.offers_uploads

    def _give_up(self, known: Server, error: Exception) -> None:
        """From now on files go through the server."""
        with known.lock:
            said, known.unreachable = known.unreachable, True
        if not said and not isinstance(error, NotImplementedError):
            known.note(
                f"tracking: the artifact store behind {self.server} cannot be used from here ({first_line(error)}): files go through the "
                f"server"
            )


def install() -> None:
    """Move artifacts of MLflow servers by these ways, in this process."""
    use_for_servers(RoutedRepository)
