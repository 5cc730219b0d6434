"""Real tracking servers on loopback, to be stopped, killed and started again."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

PATIENCE_S = 60


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def healthy(port: int) -> bool:
    """Whether a server of MLflow's answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Server:
    """`mlflow server` with SQLite in `home` and artifacts through it."""

    def __init__(self, empty_store: Path, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(empty_store, home / "mlflow.db")
        self.port = free_port()
        self.home, self.uri = home, f"http://127.0.0.1:{self.port}"
        self.client = MlflowClient(self.uri)
        self.start()

    def start(self) -> None:
        """(Again), on the same port."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}", "--artifacts-destination", str(self.home / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + PATIENCE_S
        while not healthy(self.port):
            assert self._process.poll() is None, (self.home / "log").read_text()
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """To all its processes."""
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def pids(self) -> list[int]:
        """Of its processes."""
        found = subprocess.run(["pgrep", "-g", str(self._process.pid)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found]

    def limit_files(self, size: int) -> None:
        """No process of the server can write a larger file."""
        for pid in self.pids():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def serving(empty_store: Path, home: Path) -> Iterator[Server]:
    """A server for the time of the body."""
    server = Server(empty_store, home)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGKILL)
