"""`config check` and `config show`."""

from pathlib import Path

from tests.conftest import run_cli, tiny_config


def test_settings_arrive_as_mlflow_run_passes_them(tiny: Path) -> None:
    result = run_cli("config", "show", "--config", str(tiny), "--training.max_iters", "9", "--model.dropout=0", "--set", "training.seed=5")
    assert "  max_iters: 9\n" in result.output
    assert "  dropout: 0.0\n" in result.output
    assert "  seed: 5\n" in result.output


def test_config_check_says_how_large_a_training_would_be(tiny: Path) -> None:
    result = run_cli("config", "check", "--config", str(tiny))
    assert result.output == f"{tiny}: valid. 0.01 M parameters, 16 tokens a step, 6 steps\n"
    assert tiny_config().model.n_embd == 16
