"""Real tracking servers on 127.0.0.1, which tests and benchmarks stop, kill and start again."""

import contextlib
import os
import random
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

PORTS = range(20_000, 30_000)  # below those that systems give to connections and to whoever asks for any
START_TIMEOUT_S = 300  # `mlflow ui` starts ten processes, and the machine may be busy


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, nor gets by chance before its server starts, or while it is down."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.SystemRandom().choice(PORTS)))
            return int(free.getsockname()[1])


def healthy(port: int) -> bool:
    """Whether an MLflow server answers on this port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for an MLflow server that was just started.   Fails with what is in its log if it ends or takes too long."""
    end = time.monotonic() + START_TIMEOUT_S
    while not healthy(port):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, f"no answer on port {port}: {log.read_text()}"
        time.sleep(0.05)


class Server:
    """`mlflow server` that keeps its database and the artifacts it proxies in `home`.

    empty_store: a migrated database to copy; without one the server makes its own.   python: interpreter that has MLflow, this one by
    default.   search: folder in which it looks for modules first.
    """

    def __init__(self, empty_store: Path | None, home: Path, python: str = sys.executable, search: Path | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        if empty_store is not None:
            shutil.copy(empty_store, home / "mlflow.db")
        self._python, self._search = python, search
        self.port = free_port()
        self.home, self.uri = home, f"http://127.0.0.1:{self.port}"
        self.client = MlflowClient(self.uri)
        self.start()

    def start(self) -> None:
        """Start it, the first time or again, on the same port."""
        command = [self._python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}", "--artifacts-destination", str(self.home / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        if self._search is not None:
            environment["PYTHONPATH"] = str(self._search)
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_until_healthy(self.port, self._process, self.home / "log")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def pids(self) -> list[int]:
        """Ids of its processes."""
        found = subprocess.run(["pgrep", "-g", str(self._process.pid)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found]

    def limit_files(self, size: int) -> None:
        """Let no process of the server write a file of more than `size` bytes: a full disk."""
        for pid in self.pids():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def serving(empty_store: Path, home: Path) -> Iterator[Server]:
    """A server that lives as long as the body."""
    server = Server(empty_store, home)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGKILL)
