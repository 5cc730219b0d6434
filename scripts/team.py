"""A team's stores on 127.0.0.1, real ones: PostgreSQL, an S3 store (OpenStack Swift), and `mlflow server` in front of both.

`python scripts/team.py [--mode MODE] [--login]` starts them, prints the variables that a client needs, and stops them at
Ctrl-C. Tests and benchmarks start and stop, kill and freeze each by itself. Needs Debian's `postgresql`, and the virtual environment
`.venv/swift` (both are installed by `.ci/run`); mode `presigned-only` needs MLflow 3.18 in `.venv/mlflow-3.18`.
"""

import argparse
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.servers import free_port, wait_until_healthy

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 60
SWIFT = ROOT / ".venv" / "swift"
NEXT_MLFLOW = ROOT / ".venv" / "mlflow-3.18"
DATABASES = "mlflow", "mlflow_next", "mlflow_auth", "optuna"  # a newer server changes the tables for good
BUCKET, KEY_ID, SECRET = "team", "team:key", "team-secret"
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "team-password-1"}
Mode = Literal["proxied", "direct", "presigned", "presigned-only"]


def missing() -> str | None:
    """What is not installed of what the stores need, with what installs it; None if all is there."""
    if _postgres_binaries() is None:
        return "PostgreSQL: apt-get install postgresql"
    if not (SWIFT / "bin" / "swift-proxy-server").exists():
        return f"Swift: python3 -m venv {SWIFT} && {SWIFT}/bin/pip install swift setuptools"
    return None


def _postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Program:
    """Processes that belong together, each in a process group of its own.   log: what they print."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._running: list[subprocess.Popen[bytes]] = []

    def launch(
        self, command: list[str], environment: Mapping[str, str] | None = None, user: str | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start one.   user: to run as."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, user=user, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._running.append(process)
        return process

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of them; whatever ends them is waited for."""
        for process in self._running:  # with all they have started: each connection of PostgreSQL is a process in a group of its own
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            for process in self._running:
                process.wait(START_TIMEOUT_S)
            self._running.clear()

    def stop(self) -> None:
        """End all of them at once, frozen ones too."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)

    def wait_for(self, answers: Callable[[], object]) -> None:
        """Wait until it does not raise.   Fails with what the log says."""
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                answers()
            except Exception:
                ended = [process for process in self._running if process.poll() is not None]
                assert not ended, self.log.read_text()
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.05)
            else:
                return


class PostgreSQL(Program):
    """A database server with DATABASES of user team."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        super().__init__(folder / "log")
        self.port = free_port()
        self._data = folder / "data"
        self._user = None if os.getuid() else "postgres"  # it refuses to run as root
        binaries = _postgres_binaries()
        assert binaries is not None, missing()
        self._binaries = binaries
        self._data.mkdir()
        if self._user:
            shutil.chown(self._data, self._user)
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-E", "UTF8", "--locale", "C.UTF-8", "-N")
        rules = self._data / "pg_hba.conf"
        rules.write_text(rules.read_text().replace("host    all             all             127.0.0.1/32            trust", ""))
        with rules.open("a") as file:
            file.write("host all all 127.0.0.1/32 scram-sha-256\n")
        self.start()
        self._sql("create role team login password 'team'", *(f"create database {n} owner team" for n in DATABASES))

    def uri(self, database: str, password: str = "team") -> str:
        """Address of a database, with the driver that the extra `postgres` brings."""
        return f"postgresql+psycopg://team:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, the first time or again."""
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._data), "-c", "max_connections=200", "-c", "fsync=off"]
        self.launch([str(self._binaries / "postgres"), "-D", str(self._data), *options], user=self._user)
        self.wait_for(lambda: self._sql("select 1"))

    def _sql(self, *statements: str) -> None:
        commands = [word for statement in statements for word in ("-c", statement)]
        self._run("psql", "-h", str(self._data), "-p", str(self.port), "-d", "postgres", "-qAt", *commands)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._binaries / program), *arguments],
            user=self._user, cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=START_TIMEOUT_S,
        )  # fmt: skip
        if done.returncode:
            raise OSError(f"{program}: {done.stderr}")


class ObjectStore(Program):
    """Swift with its S3 interface in its smallest form: four processes, one replica, one folder. The bucket `team` is made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        super().__init__(folder / "log")
        self._folder = folder
        self.port, *self._ports = (free_port() for _ in range(4))
        _configure_swift(folder, self.port, dict(zip(("account", "container", "object"), self._ports, strict=True)))
        self.start()

    @property
    def variables(self) -> dict[str, str]:
        """What an S3 client needs."""
        uri = f"http://127.0.0.1:{self.port}"
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": uri,
            "MLFLOW_S3_ENDPOINT_URL": uri,
        }

    def start(self) -> None:
        """Start it, the first time or again."""
        for kind in ("account", "container", "object"):
            self.launch([str(SWIFT / "bin" / f"swift-{kind}-server"), str(self._folder / f"{kind}.conf")])
        self.launch([str(SWIFT / "bin" / "swift-proxy-server"), str(self._folder / "proxy.conf")])
        self.wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthcheck", timeout=5).close())
        self.wait_for(self._make_bucket)

    def client(self) -> Any:
        """A boto3 client that does not repeat what fails."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            config=Config(retries={"max_attempts": 1}, connect_timeout=5, read_timeout=20),
        )

    def _make_bucket(self) -> None:
        client = self.client()
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)


def _configure_swift(folder: Path, port: int, ports: Mapping[str, int]) -> None:
    (folder / "disks" / "d1").mkdir(parents=True)
    (folder / "cache").mkdir()
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = team\nswift_hash_path_suffix = stack\n[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    common = "bind_ip = 127.0.0.1\nworkers = 0\nlog_level = WARNING\nconn_timeout = 10\nnode_timeout = 60\n"
    common += f"user = {pwd.getpwuid(os.getuid()).pw_name}\nswift_dir = {folder}\n"
    stages = ("catch_errors", "healthcheck", "bulk", "slo", "dlo", "copy")
    (folder / "proxy.conf").write_text(
        f"[DEFAULT]\nbind_port = {port}\n{common}"
        "[pipeline:main]\npipeline = catch_errors healthcheck cache s3api tempauth bulk slo dlo copy proxy-server\n"
        "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nrecoverable_node_timeout = 60\n"
        "error_suppression_interval = 1\n"  # ten failures, as while the servers behind it start, would make it refuse for a minute
        "[filter:s3api]\nuse = egg:swift#s3api\nlocation = us-east-1\nauth_pipeline_check = false\n"
        f"[filter:tempauth]\nuse = egg:swift#tempauth\nuser_{KEY_ID.replace(':', '_')} = {SECRET} .admin\n"
        "[filter:cache]\nuse = egg:swift#memcache\nmemcache_servers = 127.0.0.1:1\n"
        + "".join(f"[filter:{stage}]\nuse = egg:swift#{stage}\n" for stage in stages)
    )
    builder = str(SWIFT / "bin" / "swift-ring-builder")
    for kind, at in ports.items():
        (folder / f"{kind}.conf").write_text(
            f"[DEFAULT]\nbind_port = {at}\n{common}devices = {folder / 'disks'}\nmount_check = false\nfallocate_reserve = 0\n"
            f"disable_fallocate = true\ncontainer_update_timeout = 60\n[pipeline:main]\npipeline = {kind}-server\n"
            f"[app:{kind}-server]\nuse = egg:swift#{kind}\nrecon_cache_path = {folder / 'cache'}\n"
        )
        ring = str(folder / f"{kind}.builder")
        for words in (("create", "2", "1", "1"), ("add", f"r1z1-127.0.0.1:{at}/d1", "1"), ("rebalance",)):
            done = subprocess.run([builder, ring, *words], capture_output=True, text=True)
            assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: done, with a warning about one replica


class Team(NamedTuple):
    """The stores of a team."""

    postgres: PostgreSQL
    s3: ObjectStore
    folder: Path


@contextlib.contextmanager
def stores(folder: Path) -> Iterator[Team]:
    """PostgreSQL and the S3 store, for as long as the body takes.   folder: which other users may enter, as PostgreSQL runs as one."""
    with contextlib.ExitStack() as stack:
        postgres = PostgreSQL(folder / "postgres")
        stack.callback(postgres.stop)
        s3 = ObjectStore(folder / "s3")
        stack.callback(s3.stop)
        yield Team(postgres, s3, folder)


class TeamServer(Program):
    """`mlflow server` before a team's stores.   login: users and rights (user `admin`)."""

    def __init__(self, team: Team, mode: Mode = "proxied", *, login: bool = False) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        super().__init__(team.folder / f"mlflow-{self.port}.log")
        self._team, self._mode, self._login = team, mode, login
        self.start()

    def start(self) -> None:
        """Start it, the first time or again, on the same port."""
        root = f"s3://{BUCKET}/mlflow"
        artifacts = {
            "direct": ["--no-serve-artifacts", "--default-artifact-root", root],
            "presigned-only": ["--artifacts-destination", root, "--artifacts-presigned-only"],
        }.get(self._mode, ["--artifacts-destination", root])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= self._team.s3.variables
        environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        if self._mode == "presigned":
            environment |= {"MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true", "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true"}
        if self._mode == "presigned-only":
            environment["PYTHONPATH"] = str(NEXT_MLFLOW)
        if self._login:
            rights = self._team.folder / f"auth-{self.port}.ini"
            rights.write_text(
                f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {self._team.postgres.uri('mlflow_auth')}\n"
                f"admin_username = {ADMIN['MLFLOW_TRACKING_USERNAME']}\nadmin_password = {ADMIN['MLFLOW_TRACKING_PASSWORD']}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            artifacts += ["--app-name", "basic-auth"]
            environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(rights), "MLFLOW_FLASK_SERVER_SECRET_KEY": "team"}
        database = "mlflow_next" if self._mode == "presigned-only" else "mlflow"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        process = self.launch([*command, "--backend-store-uri", self._team.postgres.uri(database), *artifacts], environment)
        wait_until_healthy(self.port, process, self.log)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mode", choices=["proxied", "direct", "presigned", "presigned-only"], default="proxied")
    options.add_argument("--login", action="store_true")
    given = options.parse_args()
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="team-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with stores(folder) as team:
            server = TeamServer(team, given.mode, login=given.login)
            for variable, value in {"MLFLOW_TRACKING_URI": server.uri, **team.s3.variables, **(ADMIN if given.login else {})}.items():
                print(f"export {variable}={value}")
            print(f"# database: {team.postgres.uri('mlflow')}; studies: {team.postgres.uri('optuna')}; bucket: s3://{BUCKET}", flush=True)
            try:
                signal.pause()
            except KeyboardInterrupt:
                server.stop()


if __name__ == "__main__":
    main()
