"""A registered model, served by MLflow itself over HTTP: the text is that of generation in this process."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.host import versions
from bdh_mlflow.inference import generate, load, pyfunc, registry, requests
from bdh_mlflow.inference.generate import Sampling
from scripts.servers import free_port
from tests.conftest import only_run, run_cli, train

PATIENCE_S = 120
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}
REFUSED: list[tuple[dict[str, Any] | str, str]] = [  # requests, a CSV as text, and what their answers contain
    ({"inputs": {"prompt": ["x"]}, "params": {"temperature": -1.0}}, "temperature: -1.0; accepted: 0 to inf"),
    ({"inputs": {"prompt": ["x" * 70_000]}}, "prompt of 70,000 tokens; at most 65,536 are taken"),
    ({"inputs": {"prompts": ["x"]}}, "prompt"),
    ({"inputs": {"prompt": [None]}}, "inputs.prompt[0]: null; accepted: text"),
    ({"instances": [{"prompt": "x"}, {"prompt": 5}]}, "instances[1].prompt: 5; accepted: text"),
    ({"dataframe_records": [{"prompt": "x"}, {"prompt": None}]}, "prompt[1]: missing"),
    ({"dataframe_split": {"columns": ["prompt"], "data": [[True]]}}, "prompt[0]: true; accepted: text"),
    ({"dataframe_split": {"columns": [{"a": 1}], "data": [["x"]]}}, "the request cannot be read: TypeError"),
    ({"prompt": ["x", "y"]}, "prompt[0]: ['x', 'y']; accepted: text"),
    ({"inputs": ["x"], "params": {"temperature": None}}, "temperature: null; accepted: 0 to inf"),
    ({"inputs": ["x"], "params": {"stop": "\ud800"}}, "half of a surrogate pair"),
    ({"inputs": ["x"], "params": {"max_tokens": 4}}, "max_tokens: unknown parameter; did you mean `max_new_tokens`?"),
    ("prompt\nx\nNA\n", "prompt[1]: missing"),
    ("prompt\nx, y\n", "line 2: 2 cells in a row, 1 in the first"),
    ({"inputs": {"prompt": ["x"]}, "params": {"max_new_tokens": "many"}}, "max_new_tokens"),
    ({}, "inputs"),
]


@pytest.fixture
def registered(store: MlflowClient, text: Path, tiny: Path) -> str:
    """URI of a tiny model with 4-bit weights."""
    train(tiny, "low_precision.use_4bit=true")
    result = run_cli("checkpoints", "register", "latest", "--name", "tiny", "--alias", "champion", "--config", "tiny.yaml")
    assert result.exit_code == 0, result.output
    assert "tiny, version 1: models:/tiny@champion" in result.output
    assert "mlflow models serve -m models:/tiny@champion --env-manager local" in result.output
    return "models:/tiny@champion"


def in_process(prompts: list[str], **sampling: Any) -> list[str]:
    loaded = load.load("latest", Path("checkpoints"), TrackingConfig())
    return generate.write_all(loaded, prompts, 12, Sampling(**sampling))


@pytest.mark.slow
def test_registered_model_is_small_safe_and_answers_as_generation_does(store: MlflowClient, registered: str) -> None:
    model = mlflow.pyfunc.load_model(registered)
    assert model.predict(pd.DataFrame({"prompt": ["def ", "x"]}), params=GREEDY) == in_process(["def ", "x"], temperature=0)
    seeded = {"seed": 7, "max_new_tokens": 12, "top_k": 5, "top_p": 0.9, "temperature": 1.5}
    assert model.predict(pd.DataFrame({"prompt": ["def "]}), params=seeded) == in_process(
        ["def "], seed=7, top_k=5, top_p=0.9, temperature=1.5
    )
    generated = run_cli("generate", registered, "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "12", "--config", "tiny.yaml")
    assert (generated.exit_code, generated.output) == (0, f"def {in_process(['def '], temperature=0)[0]}\n")
    evaluated = run_cli("evaluate", registered, "--batches", "2", "--config", "tiny.yaml")
    assert f"Logged to run {only_run(store).info.run_id}" in evaluated.output
    unknown = run_cli("generate", "models:/tiny@winner", "--prompt", "def ", "--config", "tiny.yaml")
    assert (unknown.exit_code, "alias winner not found" in unknown.output) == (2, True)
    folder = Path(mlflow.artifacts.download_artifacts(registered))
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in (".pkl", ".pt", ".pth")], "nothing that unpickles"
    assert [f.suffix for f in (folder / "artifacts").iterdir()] == [".safetensors"]
    assert (folder / "code" / "bdh_mlflow" / "inference" / "pyfunc.py").is_file(), "a copy of the package, not of a part of it"
    needed = (folder / "requirements.txt").read_text().split()
    assert all("==" in line for line in needed)
    assert not {line.split("==")[0] for line in needed} & {"pyarrow", "torchao", "matplotlib", "rich"}


@pytest.mark.slow
def test_registering_leaves_the_run_as_it_was_and_names_where_the_model_comes_from(store: MlflowClient, registered: str) -> None:
    run = only_run(store)
    assert run.info.status == "FINISHED"
    version = store.get_model_version_by_alias("tiny", "champion")
    assert version.run_id == run.info.run_id
    again = run_cli("checkpoints", "register", "latest", "--name", "tiny", "--format", "safetensors", "--config", "tiny.yaml")
    assert "tiny, version 2: models:/tiny/2" in again.output
    assert str(store.get_model_version_by_alias("tiny", "champion").version) == "1"


@pytest.mark.slow
def test_served_model_answers_many_at_once_and_refuses_with_a_reason(registered: str, tmp_path: Path) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        registered,
        "--env-manager",
        "local",
        "-p",
        str(port),
        "-h",
        "127.0.0.1",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "PATH": path})
    try:
        _await(port, server, tmp_path / "log")
        expected = in_process(["def ", "x"], temperature=0)
        status, answer = _ask(port, {"inputs": {"prompt": ["def ", "x"]}, "params": GREEDY})
        assert (status, answer["predictions"]) == (200, expected)
        for same in (
            {"inputs": ["def ", "x"]},
            {"instances": [{"prompt": "def "}, {"prompt": "x"}]},
            {"dataframe_records": [{"prompt": "def "}, {"prompt": "x"}]},
        ):
            assert _ask(port, {**same, "params": GREEDY}) == (200, {"predictions": expected})
        assert _ask(port, {"prompt": "def ", **GREEDY}) == (200, expected[:1])
        status, answer = _ask(port, 'prompt,x\n007,1\n"def , None",2\n')
        assert (status, len(answer["predictions"])) == (200, 2)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            request = {"dataframe_split": {"columns": ["prompt"], "data": [["def "]]}, "params": GREEDY}
            answers = list(pool.map(lambda _: _ask(port, request), range(16)))
        assert answers == 16 * [(200, {"predictions": expected[:1]})]
        for wrong, reason in REFUSED:
            status, answer = _ask(port, wrong)
            assert 400 <= status < 500, (wrong, answer)
            assert reason in json.dumps(answer), (wrong, answer)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _await(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        else:
            return


def _ask(port: int, body: dict[str, Any] | str) -> tuple[int, Any]:
    """Status and answer to a JSON body, or to a CSV given as text."""
    content, kind = (body, "text/csv") if isinstance(body, str) else (json.dumps(body), "application/json")
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", content.encode(), {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0; accepted: whole numbers, 1 to 65536"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"seed": -2}, "seed: -2"),
        ({"top_k": -1}, "top_k: -1"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message):
        pyfunc.parse_parameters(params)


def test_parameters_of_the_signature_are_those_of_a_request() -> None:
    schema = registry.signature().params
    assert schema is not None
    assert {p.name: p.default for p in schema.params} == requests.DEFAULTS
    assert pyfunc.parse_parameters({}) == (256, Sampling())


@pytest.mark.parametrize("version", [None, ValueError("bad"), PackageNotFoundError("psutil")])
def test_requirements_without_a_version_are_refused(version: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> str | None:
        if name == "psutil" and isinstance(version, Exception):
            raise version
        return None if name == "psutil" else "1.0+cpu"

    monkeypatch.setattr(metadata, "version", broken)
    with pytest.raises(InputError, match=r"no version found of: psutil; .*pip install --force-reinstall psutil"):
        registry.requirements(four_bit=True)
    assert "psutil" not in versions()


def test_what_cannot_be_registered_is_refused(store: MlflowClient, text: Path, tiny: Path) -> None:
    options = ("--config", str(tiny))
    assert run_cli("checkpoints", "register", "latest", "--name", "x", *options).exit_code == 2, "no run"
    train(tiny)
    for words, message in (
        (("--name", "a/b"), "--name a/b"),
        (("--name", "x", "--alias", "latest"), "--alias latest"),
        (("--name", "x", "--alias", "v1"), "--alias v1"),
    ):
        result = run_cli("checkpoints", "register", "latest", *words, *options)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "Traceback" not in result.output
    assert store.search_registered_models() == []
