"""What holds for every command: errors, exit codes, help."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.conftest import run_cli, train


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "mlflow.db" not in p.name)


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown key": (("training.learning_rat=1",), "training.learning_rat: unknown key; did you mean `learning_rate`?"),
    "type": (("training.batch_size=many",), 'training.batch_size: found the text "many"; accepted: whole number >= 1'),
    "range": (("model.dropout=1.5",), "model.dropout: found 1.5; accepted: number >= 0 and < 1"),
    "several": (("model.dropout=1.5", "training.seed=x", "low_precision.use_fp8=true"), "3 problems"),
    "divide": (("model.n_head=3",), "model.mlp_internal_dim_multiplier: 4 * n_embd 16 is not a multiple of 2 * n_head 3"),
    "fp8": (
        ("low_precision.use_fp8=true", "model.n_embd=32"),
        "low_precision.use_fp8: true (hybrid, amax max of 1024 steps) needs CUDA capability 8.9",
    ),
    "4-bit optimizer": (
        ("low_precision.use_4bit_optimizer=true", "low_precision.optimizer_bits=8"),
        "optimizer_bits: 8 cannot be combined with low_precision",
    ),
    "no data": (("dataset.parquet_dir=nowhere",), "nowhere: no such folder (dataset.parquet_dir). Set dataset.source"),
    "misspelt": (("dataset.parquet_dir=txt",), "txt: no such folder; did you mean text? (dataset.parquet_dir)"),
    "misspelt, with a source": (
        ("dataset.parquet_dir=txt", "dataset.source=python-stdlib"),
        "txt: no such folder (dataset.parquet_dir); did you mean text? To build txt beside it, run: bdh-mlflow data prepare python-st",
    ),
    "default source": (("dataset.parquet_dir=nowhere", "dataset.source=auto"), "nowhere: no such folder (dataset.parquet_dir)"),
    "other files": (
        ("dataset.parquet_dir=jsonl", "dataset.source=python-stdlib"),
        "jsonl: no parquet files in it (dataset.parquet_dir), but a.jsonl",
    ),
    "NUL": (("dataset.parquet_dir=a\0b",), "the character NUL has no place in it"),
    "empty data": (("dataset.parquet_dir=hollow",), "hollow: no parquet files in it"),
    "column": (("dataset.text_column=body",), "text/part-0.parquet: no column `body`; it has text. Set dataset.text_column"),
    "corrupt": (("dataset.parquet_dir=corrupt",), "corrupt/part-1.parquet: not a readable parquet file"),
    "block_size": (("training.block_size=100000",), "block_size 100000"),
    "folder": (("training.checkpoint_dir=tiny.yaml/x",), "cannot be created or written:"),
    "source": (("dataset.parquet_dir=new", "dataset.source=nowhere.txt"), "nowhere.txt: no such file or folder"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_gets_one_clear_error_and_nothing_is_written(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, case: str
) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "a.jsonl").touch()
    shutil.copytree(text, tmp_path / "corrupt")
    (tmp_path / "corrupt" / "part-1.parquet").write_bytes(b"PAR1 not really")
    before = listing(tmp_path)
    settings, message = BAD[case]
    result = train(tiny, *settings)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("Error: ") == 1
    assert "Traceback" not in result.output
    assert listing(tmp_path) == before
    assert store.get_experiment_by_name("bdh") is None


@pytest.mark.parametrize("word", ["--confg", "stray"])
def test_unknown_option_is_a_usage_error(tiny: Path, word: str) -> None:
    result = run_cli("train", word, "x")
    assert result.exit_code == 2
    assert f"No such option: {word}." in result.output
    assert ("Did you mean --config?" in result.output) == (word == "--confg")


def test_missing_config_file_is_an_input_error() -> None:
    result = run_cli("train", "--config", "configs/nothing.yaml")
    assert result.exit_code == 2
    assert "configs/nothing.yaml: no such file" in result.output


def test_yaml_that_does_not_parse_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  n_layer: [\n")
    result = run_cli("config", "check", "--config", "bad.yaml")
    assert result.exit_code == 2
    assert "bad.yaml, line 3, column 1: not valid YAML" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sync", "text"), "text: no journal.jsonl in this folder; name a run directory"),
        (("checkpoints", "list", "f" * 32), "not found at"),
        (("checkpoints", "verify", "f" * 32), "not found at"),
        (("checkpoints", "list", "--all-runs"), "experiment bdh: not found at"),
        (("compare", ""), "no run is named"),
        (("compare", " ", ""), "no run is named"),
        (("generate", "", "--prompt", "a"), "empty text names no checkpoint"),
        (("generate", "x" * 300, "--prompt", "a"), "names no checkpoint; accepted: latest, a path"),
        (("generate", "x" * 300 + "/y", "--prompt", "a"), "names no checkpoint"),
        (("evaluate", "${NOT_SET}/run"), "NOT_SET"),
        (("evaluate", "~nobody-here/run"), "~nobody-here stands for no home folder"),
        (("checkpoints", "list", "x" * 300), "not found at"),
        (("checkpoints", "verify", "x" * 300), "not found at"),
        (("checkpoints", "pull", "x" * 5000), "names no checkpoint"),
        (("compare", "a", "--out", "x" * 300 + "/r.html"), "File name too long"),
        (("compare", "a", "--out", "text"), "File 'text' is a directory"),
        (("compare", "a", "--out", ""), "--out '': a folder, or no name"),
        (("train", "--resume", ""), "--resume names nothing; accepted: none for a new run"),
        (("train", "--resume", " "), "--resume names nothing"),
        (("train", "--set", "training.resume_from_checkpoint= "), "empty text names no checkpoint"),
        (("train", "--set", "training.checkpoint_dir=s3://bucket/x"), "is not a place on this machine"),
        (("checkpoints", "list"), "checkpoints: no checkpoints here"),
        (("checkpoints", "verify"), "checkpoints: no checkpoints here"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, tuple) else None,
)
def test_unknown_targets_are_one_clear_error(store: MlflowClient, text: Path, tiny: Path, words: tuple[str, ...], message: str) -> None:
    result = run_cli(*words, "--config", str(tiny))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_version_and_help_answer_without_heavy_imports(tiny: Path) -> None:
    assert imported_by("--version")[0].startswith("bdh-mlflow, version ")
    for words in (["--help"], ["checkpoints", "--help"], ["config", "show", "--config", str(tiny)]):
        output, heavy = imported_by(*words)
        assert output
        assert heavy == [], f"{' '.join(words)} imports {', '.join(heavy)}"


def imported_by(*words: str) -> tuple[str, list[str]]:
    """What a command prints in a process of its own, and which heavy libraries it imports."""
    code = "import sys; from bdh_mlflow.cli.main import cli; cli(standalone_mode=False)"
    code += "; print(' '.join(n for n in ('torch', 'mlflow', 'pyarrow') if n in sys.modules), file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return process.stdout, process.stderr.split()


def started(*words: str, **given: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a process.   given: environment variables in capitals, other arguments of subprocess.run."""
    environment = {**os.environ, **{name: value for name, value in given.items() if name.isupper()}}
    arguments = {"stderr": subprocess.PIPE, **{name: value for name, value in given.items() if not name.isupper()}}
    command = [sys.executable, "-m", "bdh_mlflow", *words]
    return subprocess.run(command, env=environment, encoding="utf-8", errors="replace", timeout=120, check=False, **arguments)


@pytest.mark.slow  # processes: warnings, streams and encodings are set when an interpreter starts
def test_environment_of_the_user_changes_no_result(store: MlflowClient, text: Path, tiny: Path) -> None:
    done = started("train", "--config", str(tiny), PYTHONWARNINGS="error", FORCE_COLOR="1", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    latin = started("generate", "latest", "--config", str(tiny), "--prompt", "\u65e5", PYTHONIOENCODING="latin-1", stdout=subprocess.PIPE)
    assert (latin.returncode, latin.stdout[:6]) == (0, "\\u65e5")
    Path("input").write_bytes(b"\xff\xfe")
    with Path("input").open("rb") as prompt:
        raw = started("generate", "latest", "--config", str(tiny), "--max-new-tokens", "1", stdin=prompt, stdout=subprocess.PIPE)
    assert raw.returncode == 0, raw.stderr
    closed = started("generate", "latest", "--config", str(tiny), preexec_fn=lambda: os.close(0))
    assert (closed.returncode, "standard input is closed; give --prompt TEXT" in closed.stderr) == (2, True)
    with Path("/dev/full").open("wb") as nowhere:
        full = started("train", "--config", str(tiny), "--resume", "latest", "--set", "training.max_iters=7", stdout=nowhere)
    assert full.returncode == 0, full.stderr
