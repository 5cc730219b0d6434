"""`generate` and `evaluate`."""

import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient

from bdh_mlflow.cli.main import cli
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.tracking.mirrored import MirrorReader
from tests.conftest import history, only_run, run_cli, thread_sender, train


def test_generate_is_repeatable_and_evaluate_gives_the_logged_loss(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    run = only_run(store)
    options = ("--config", str(tiny))
    first, second = (
        run_cli("generate", "latest", "--prompt", "def é", "--max-new-tokens", "20", "--seed", "3", *options).output for _ in range(2)
    )
    assert first == second
    assert first.startswith("def é")
    assert len(first) > 8
    output = run_cli("evaluate", run.info.run_id, "--batches", "2", *options).output
    logged = dict(history(store, run.info.run_id, "val/loss"))[6]
    assert f"val/loss {logged:.4f} nats per token" in output


def test_batched_prompts_give_the_same_text_and_stop_ends_it(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny, "training.max_iters=1")
    options = ("--config", str(tiny), "--temperature", "0", "--max-new-tokens", "9")
    alone = [run_cli("generate", "latest", "--prompt", prompt, *options).output.rstrip("\n") for prompt in ("def ", "x")]
    assert run_cli("generate", "latest", "--prompt", "def ", "--prompt", "x", *options).output == f"{alone[0]}\n\n{alone[1]}\n\n"
    stop = alone[0][5]
    assert (
        run_cli("generate", "latest", "--prompt", "def ", "--stop", stop, *options).output == alone[0][: alone[0].index(stop, 4) + 1] + "\n"
    )


@pytest.mark.parametrize("wrong", [("--top-p", "nan"), ("--temperature", "nan"), ("--prompt", "-", "--prompt", "-")], ids=str)
def test_sampling_options_that_make_no_sense_are_refused(wrong: tuple[str, ...], tiny: Path) -> None:
    assert run_cli("generate", "latest", *wrong, "--config", str(tiny)).exit_code == 2


def test_prompt_that_is_too_long_is_refused_before_any_output(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    result = run_cli("generate", "latest", "--prompt", "x" * 70_000, "--config", str(tiny))
    assert (result.exit_code, result.output) == (2, "Error: prompt of 70,000 tokens; at most 65,536 are taken\n")


def test_each_line_of_an_interactive_session_is_a_prompt(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    words = ["generate", "latest", "--interactive", "--max-new-tokens", "5", "--temperature", "0", "--config", str(tiny)]
    alone = [run_cli(*words[:2], *words[3:], "--prompt", prompt).output for prompt in ("def ", "x")]
    result = CliRunner().invoke(cli, words, input="def \nx\n")
    assert result.exit_code == 0
    assert result.stdout == "".join(alone)
    piped = CliRunner().invoke(cli, [*words[:2], *words[3:]], input="def ")
    assert piped.stdout == alone[0]
    assert run_cli(*words, "--prompt", "x").exit_code == 2


def test_evaluation_is_logged_to_the_run_of_its_checkpoint(store: MlflowClient, text: Path, tiny: Path) -> None:
    train(tiny)
    result = run_cli("evaluate", "latest", "--no-log", "--config", str(tiny))
    run_id = only_run(store).info.run_id
    assert f"val/loss {history(store, run_id, 'val/loss')[-1][1]:.4f}" in result.output, "on the batches that the training takes"
    assert not [key for key in only_run(store).data.metrics if key.startswith("eval/")]
    result = run_cli("evaluate", run_id, "--data", str(text), "--config", str(tiny))
    assert f"Logged to run {run_id} as eval/text_loss and eval/text_bpb" in result.output
    ((step, loss),) = history(store, run_id, "eval/text_loss")
    assert step == 6
    assert f"val/loss {loss:.4f}" in result.output
    assert only_run(store).info.status == "FINISHED"
    contexts = {tag.value for i in only_run(store).inputs.dataset_inputs for tag in i.tags}
    assert "evaluation" in contexts


@pytest.mark.slow  # every command that reads a store
def test_store_of_the_configuration_wins_over_the_environment_in_every_command(
    empty_store: Path, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where MLflow itself would fall back to the process's own store (mlflow#6709, #14931)."""
    shutil.copy(empty_store, tmp_path / "own.db")
    store = MlflowClient(f"sqlite:///{tmp_path / 'own.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    tree = yaml.safe_load(tiny.read_text())
    tiny.write_text(yaml.safe_dump({**tree, "tracking": {**tree["tracking"], "tracking_uri": store.tracking_uri}}))
    assert train(tiny).exit_code == 0
    run_id = only_run(store).info.run_id
    shutil.rmtree("checkpoints")
    short = ("--max-new-tokens", "2")
    for words in (
        ("checkpoints", "list", run_id),
        ("checkpoints", "list", "--all-runs"),
        ("checkpoints", "verify", run_id),
        ("checkpoints", "pull", run_id),
        ("evaluate", run_id),
        ("generate", run_id, *short),
        ("compare", run_id),
        ("checkpoints", "register", run_id, "--name", "tiny", "--alias", "best"),
        ("generate", "models:/tiny@best", *short),
        ("generate", "models:/tiny/1", *short),
        ("doctor",),
        ("sync",),
    ):
        done = run_cli(*words, "--config", str(tiny))
        assert done.exit_code == 0, (words, done.output)
    shutil.rmtree("checkpoints")
    assert train(tiny, "training.max_iters=7", resume=f"runs:/{run_id}").exit_code == 0
    assert store.get_run(run_id).info.status == "FINISHED"
    mirror = MirrorReader(TrackingConfig(tracking_uri=store.tracking_uri))
    logged = store.get_model_version("tiny", "1").source
    assert logged.startswith("models:/m-")
    for number, uri in enumerate(("models:/tiny/1", "models:/tiny@best", logged, "models:/tiny/1/artifacts")):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert list(mirror.download(uri, folder).rglob("*.safetensors")), uri
    absent = train(tiny, resume="models:/absent/1")
    assert (absent.exit_code, "Registered Model with name=absent not found" in absent.output) == (2, True), absent.output


def test_sampling_is_changed_and_reset_between_prompts(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny, "training.max_iters=3", "training.ema_decay=0.5").exit_code == 0
    lines = [
        "settings temperature=0 max_new_tokens=5",
        "def ",
        "def ",
        "reset",
        "settings top_k=none stop=x seed=3",
        "settings top=1",
        "settings top_k=a",
    ]
    command = ["generate", "latest", "--interactive", "--max-new-tokens", "7", "--config", str(tiny)]
    result = CliRunner().invoke(cli, command, input="\n".join(lines) + "\n", obj=thread_sender)
    assert result.exit_code == 0, result.output
    said = result.output.splitlines()
    states = [line for line in said if line.startswith("max_new_tokens=")]
    assert states[0] == "max_new_tokens=5  temperature=0.0  top_k=50  top_p=None  seed=None  stop="
    assert states[1] == "max_new_tokens=7  temperature=0.8  top_k=50  top_p=None  seed=None  stop="
    assert states[2] == states[3] == states[4] == "max_new_tokens=7  temperature=0.8  top_k=None  top_p=None  seed=3  stop=x"
    assert [line for line in said if line.startswith("Error: ")] == [
        "Error: top=1: accepted: temperature=..., top_k=..., top_p=..., seed=..., stop=..., max_new_tokens=...",
        "Error: top_k: a; accepted: a number, or none",
    ]
    greedy = run_cli("generate", "latest", "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "5", "--config", str(tiny)).output
    assert result.output.count(greedy.removesuffix("\n")) == 2


def test_the_average_of_the_weights_is_another_model(store: MlflowClient, text: Path, tiny: Path) -> None:
    config = ("--config", str(tiny))
    assert train(tiny, "training.max_iters=3", "training.ema_decay=0.5").exit_code == 0
    run = only_run(store)
    ((_, averaged),) = history(store, run.info.run_id, "val/loss_ema")
    output = run_cli("evaluate", "latest", "--ema", *config).output
    assert f"val/loss {averaged:.4f} " in output
    assert history(store, run.info.run_id, "eval/text_loss_ema")[0][1] == averaged
    exported = run_cli(
        "checkpoints", "export", "latest", "--format", "safetensors", "-o", "mean.safetensors", "--ema", "--config", str(tiny)
    )
    assert exported.exit_code == 0, exported.output
    assert f"val/loss {averaged:.4f} " in run_cli("evaluate", "mean.safetensors", *config).output
    assert "holds one set of weights" in run_cli("evaluate", "mean.safetensors", "--ema", *config).output
    assert train(tiny, "training.max_iters=1", "tracking.experiment=other").exit_code == 0
    assert "holds no average of the weights; training.ema_decay keeps one" in run_cli("evaluate", "latest", "--ema", *config).output
