"""What `auto` and null become, by settings, machine and the run that is resumed."""

from typing import Any

import pytest

from bdh_mlflow.config import Config, Machine, resolve
from bdh_mlflow.errors import ConfigError

GIB = 2**30
CPU, CUDA = Machine("cpu", 8 * GIB), Machine("cuda", 80 * GIB)
FP8 = {"low_precision.use_fp8": True, "low_precision.use_4bit": False}
EMULATED = {**FP8, "fp8.emulate": True}
KEPT_GIB = 8 * 6 * 8 * 4 * 512 * 8192 * 2 / GIB  # of the default network in bfloat16


def config(**settings: Any) -> Config:
    return Config().replaced({key.replace("__", "."): value for key, value in settings.items()})


def training(settings: dict[str, Any], machine: Machine | None, continued: Config | None = None) -> tuple[Any, Any, Any]:
    settled = resolve(Config().replaced(settings), machine, continued).config.training
    return settled.layer_form, settled.compile, settled.recompute


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        ({}, CPU, ("blocked", False, True)),
        ({}, CUDA, ("reference", True, False)),
        ({}, Machine("cuda", 8 * GIB), ("reference", True, True)),
        ({}, None, ("auto", "auto", "auto")),
        ({"training.layer_form": "blocked"}, None, ("blocked", "auto", True)),
        ({"training.layer_form": "reference"}, CPU, ("reference", False, True)),
        ({"training.recompute": False}, CPU, ("reference", False, False)),
        ({"training.recompute": True}, CPU, ("blocked", False, True)),
        ({"training.recompute": True}, CUDA, ("reference", True, True)),
        ({"training.compile": True}, CPU, ("blocked", True, True)),
        ({"training.compile": True, "training.debug": True}, CUDA, ("reference", False, False)),
        (FP8, CUDA, ("reference", False, False)),
        (FP8, Machine("cuda", GIB), ("reference", False, False)),
        (FP8, None, ("reference", False, False)),
        (EMULATED, CPU, ("reference", False, True)),
        (EMULATED, CUDA, ("reference", False, False)),
    ],
)
def test_form_compilation_and_recomputation(settings: dict[str, Any], machine: Machine | None, expected: tuple[Any, Any, Any]) -> None:
    assert training(settings, machine) == expected


def test_activations_are_recomputed_where_they_would_take_over_half_of_the_free_memory() -> None:
    assert config().activation_bytes == KEPT_GIB * GIB
    enough, scarce = (Machine("cuda", int(free * KEPT_GIB * GIB)) for free in (2, 1.99))
    assert not resolve(config(), enough).config.training.recompute
    assert resolve(config(), scarce).config.training.recompute


def test_every_decision_has_its_reason_and_nothing_else_has() -> None:
    assert resolve(config(), CUDA).why == {
        "dataset.source": "auto for the default parquet_dir",
        "scheduler.decay_steps": "max_iters of the first segment",
        "low_precision.optimizer_bits": "use_4bit_optimizer is false",
        "training.layer_form": "auto on cuda, where blocked was never measured",
        "training.compile": "auto on cuda",
        "training.recompute": "auto, 12.0 GiB if kept, 80.0 GiB free",
        "training.strategy": "auto",
    }
    settled = resolve(config(), CUDA).config
    assert resolve(settled, CPU).why == {}
    assert resolve(settled, CPU).config == settled


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ({"training.debug": True}, "training.compile", "debug"),
        (EMULATED, "training.compile", "auto with FP8, whose delayed scaling is not traced"),
        (EMULATED, "training.layer_form", "auto with FP8, which only this form supports"),
        ({}, "training.recompute", "blocked always recomputes"),
        ({"low_precision.optimizer_bits": 4}, "low_precision.use_4bit_optimizer", "optimizer_bits is 4"),
    ],
)
def test_reasons(settings: dict[str, Any], key: str, reason: str) -> None:
    assert resolve(Config().replaced(settings), CPU).why[key] == reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"training.recompute": False, "training.layer_form": "blocked"},
            'layer_form: "blocked" cannot be combined with training.recompute',
        ),
        ({"training.recompute": True, **FP8}, "recompute: true cannot be combined with low_precision.use_fp8 by Transformer Engine"),
    ],
)
def test_recomputation_that_a_form_or_format_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config().replaced(settings)


def test_resumed_run_keeps_form_and_compilation_on_another_machine_but_not_recomputation() -> None:
    before = resolve(config(), CUDA).config
    assert training({}, CPU, before) == ("reference", True, True)
    assert resolve(config(), CPU, before).why["training.compile"] == "as in the resumed run"
    assert training({"training.compile": False, "training.layer_form": "blocked"}, CPU, before) == ("blocked", False, True)


def test_debug_settles_compilation_for_its_own_segment_only() -> None:
    under_debug = resolve(config(training__debug=True), CUDA).config
    assert training({}, CUDA, under_debug) == ("reference", True, False)
    assert training({"training.debug": True}, CUDA, resolve(config(), CUDA).config) == ("reference", False, False)


def test_configuration_from_before_a_setting_existed_is_settled_for_this_machine() -> None:
    tree = config(training__layer_form="reference").to_dict()
    del tree["training"]["recompute"]
    old = resolve(Config.from_dict(tree), CUDA).config  # compile was saved as "auto"
    assert (old.training.compile, old.training.recompute) == (True, False)
    assert training({}, CUDA, old) == ("reference", True, False)


def test_decay_ends_with_the_first_segment_and_is_not_bent_by_a_longer_one() -> None:
    first = resolve(config(training__max_iters=100)).config
    longer = resolve(config(training__max_iters=200), None, first).config
    assert (first.scheduler.decay_steps, longer.scheduler.decay_steps) == (100, 100)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [({}, 32), ({"use_4bit_optimizer": True}, 4), ({"optimizer_bits": 8}, 8), ({"optimizer_bits": 4}, 4), ({"optimizer_bits": 32}, 32)],
)
def test_both_names_of_the_optimizers_bits_agree(settings: dict[str, Any], bits: int) -> None:
    resolved = resolve(Config.from_dict({"low_precision": settings})).config.low_precision
    assert resolved.optimizer_bits == bits
    assert resolved.use_4bit_optimizer == (bits == 4)


@pytest.mark.parametrize(
    ("folder", "source", "expected"),
    [
        ("data/python-stdlib", "auto", "python-stdlib"),
        ("./data/python-stdlib/", "auto", "python-stdlib"),
        ("data/python-stdlb", "auto", None),
        ("data/python-stdlib", None, None),
        ("data/mine", "python-stdlib", "python-stdlib"),
        ("data/mine", "book.txt", "book.txt"),
    ],
)
def test_default_text_is_for_the_default_folder_only(folder: str, source: str | None, expected: str | None) -> None:
    """A mistyped parquet_dir was filled with the standard library's sources, and trained on."""
    settled = config(dataset__parquet_dir=folder, dataset__source=source)
    assert resolve(settled).config.dataset.source == expected
