"""A tiny run for every test: 2 layers, D = 16, H = 2, T = 8, two small parquet shards, a real MLflow store in tmp_path."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two training runs on two cores wait for each other otherwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from bdh_mlflow.cli.main import cli
from bdh_mlflow.config import Config
from bdh_mlflow.host import ENDING_SIGNALS
from bdh_mlflow.tracking.lane import Patience
from bdh_mlflow.tracking.records import OnMessage
from bdh_mlflow.tracking.sender import ThreadSender
from bdh_mlflow.training import build
from scripts import team
from scripts.team import Team

pytest_plugins = ["tests.watchdog"]

TINY: dict[str, Any] = {
    "model": {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 4, "dropout": 0.1},
    "training": {
        "block_size": 8,
        "batch_size": 2,
        "max_iters": 6,
        "log_freq": 1,
        "test_freq": 3,
        "test_iters": 2,
        "checkpoint_freq": 3,
    },
    "dataset": {"parquet_dir": "text", "source": None, "val_fraction": 0.2},
    "low_precision": {"compute_dtype": "float32", "use_4bit": False},
    "tracking": {"log_system_metrics": False},
}


def documents(count: int, seed: int = 0) -> list[str]:
    """Made-up text: words of a few letters."""
    draw = np.random.default_rng(seed)
    words = ["def", "return", "self", "x", "y", "in", "for", "if", "=", "+", "(", ")", "\n"]
    return [" ".join(draw.choice(words, size=draw.integers(3, 30))) for _ in range(count)]


def write_shards(folder: Path, texts: list[str], shards: int = 2, row_group_size: int = 16, column: str = "text") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        pq.write_table(
            pa.table({column: pa.array(texts[i::shards], pa.string())}), folder / f"part-{i}.parquet", row_group_size=row_group_size
        )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database to copy: migrating takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No MLflow settings from outside, one's own working folder, seeds and signal handlers put back."""
    for name in [n for n in os.environ if n.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "SAMPLE_TOKENS", 4)  # a sample of full length takes longer than the evaluation it belongs to
    torch.manual_seed(0)
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # the command line sets it for what it starts
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A real store: SQLite and a local artifact folder."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


@pytest.fixture(scope="session")
def stores() -> Iterator[Team]:
    """PostgreSQL and an S3 store, once for each worker that needs them."""
    with tempfile.TemporaryDirectory(prefix="team-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user
        with team.stores(folder) as started:
            yield started


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_shards(tmp_path / "text", documents(80))
    return tmp_path / "text"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Path of the tiny configuration."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def tiny_config(**sections: dict[str, Any]) -> Config:
    return Config.from_dict({name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}})


def thread_sender(folder: Callable[[], Path], uri: str, on_message: OnMessage) -> ThreadSender:
    """A sender that hurries, in this process: a process for each of hundreds of trainings would take an hour."""
    return ThreadSender(folder, uri, on_message, Patience(batch_interval_s=0.05))


def run_cli(*words: str) -> Result:
    """The command line in this process; unexpected exceptions fail the test with their traceback."""
    result = CliRunner().invoke(cli, list(words), obj=thread_sender)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(tiny: Path, *settings: str, resume: str = "none", fork: bool = False) -> Result:
    words = [word for setting in settings for word in ("--set", setting)]
    return run_cli("train", "--config", str(tiny), "--resume", resume, *words, *["--fork"] * fork)


def wait_for(found: Callable[[], Any], limit_s: float = 60.0, said: Callable[[], object] = lambda: "waited too long") -> None:
    """Until something is so.   Fails with what `said` returns if it takes too long."""
    end = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < end, said()
        time.sleep(0.05)


def only_run(store: MlflowClient, experiment: str = "bdh") -> Any:
    found = store.get_experiment_by_name(experiment)
    assert found is not None
    runs = store.search_runs([found.experiment_id])
    assert len(runs) == 1, [run.info.run_name for run in runs]
    return runs[0]


def history(store: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in store.get_metric_history(run_id, key))
