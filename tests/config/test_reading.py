"""YAML by the core schema of YAML 1.2: text stays as written, a number is what it looks like, anything else is one message."""

import re
from pathlib import Path
from typing import Any

import pytest

from bdh_mlflow.config import Config
from bdh_mlflow.config.reading import core_value, plain_values, read_yaml
from bdh_mlflow.errors import ConfigError


def read(folder: Path, content: str | bytes, *overrides: str) -> Config:
    (folder / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return Config.from_yaml(folder / "a.yaml", overrides)


def refused(folder: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, content)
    return str(caught.value)


AS_WRITTEN = [
    "007",
    "0123456",
    "12:30",
    "1.10",
    "1e5",
    "1.0e+5",
    "0x1f",
    "0o17",
    "yes",
    "on",
    "True",
    "2024_01",
    "2024-01-01",
    ".5",
    "=",
    "+1",
]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_text_is_what_stands_in_the_file(tmp_path: Path, text: str) -> None:
    config = read(tmp_path, f"tracking: {{run_name: {text}, tags: {{a: {text}, b.c: {text}}}}}\ndataset: {{text_column: {text}}}\n")
    assert config.tracking.run_name == config.dataset.text_column == text
    assert config.tracking.tags == {"a": text, "b.c": text}
    again = read(tmp_path, config.to_yaml())
    assert again == config, "what is saved reads back"


def test_keys_are_text_as_well(tmp_path: Path) -> None:
    assert read(tmp_path, "tracking: {tags: {1: a, 2024-01-01: b, 007: c}}").tracking.tags == {"1": "a", "2024-01-01": "b", "007": "c"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-7", -7), ("1e-3", 1e-3), ("1.", 1.0), ("+.5", 0.5), ("1e400", float("inf")), (".inf", float("inf")), ("~", None),
        ("", None),         ("null", None), ("true", True), ("FALSE", False), ("yes", "yes"), ("010", "010"), ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),         ("nan", "nan"), ("1e", "1e"), ("--1", "--1"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_a_plain_scalar_is_read_by_the_core_schema(text: str, value: Any) -> None:
    assert (core_value(text), type(core_value(text))) == (value, type(value))


@pytest.mark.parametrize(
    ("number", "base"), [("010", "leading zero"), ("0x10", "base 16"), ("0o10", "base 8"), ("0b1", "base 2"), ("-007", "zero")]
)
def test_a_number_in_another_base_is_refused_by_name(tmp_path: Path, number: str, base: str) -> None:
    assert base in refused(tmp_path, f"training: {{max_iters: {number}}}")
    assert base in refused(tmp_path, f"training: {{learning_rate: '{number}'}}")
    with pytest.raises(ConfigError, match=base):
        Config.from_dict({}, [f"training.max_iters={number}"])


def test_merge_keys_and_aliases_work_and_a_key_given_twice_does_not(tmp_path: Path) -> None:
    merged = "training: &t\n  <<: {max_iters: 7, batch_size: 1}\n  batch_size: 2\n"
    config = read(tmp_path, merged)
    assert (config.training.max_iters, config.training.batch_size) == (7, 2)
    earlier = read(tmp_path, "training:\n  <<: [{max_iters: 7}, {max_iters: 8, batch_size: 3}]\n").training
    assert (earlier.max_iters, earlier.batch_size) == (7, 3), "of several the first wins"
    assert "`<<` takes a mapping" in refused(tmp_path, "training: {<<: 7}")
    assert read(tmp_path, "training: {max_iters: &n 9, test_freq: *n}").training.test_freq == 9
    assert "`batch_size` is given twice" in refused(tmp_path, merged + "  batch_size: 3\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training: {max_iters: !!binary aGVsbG8=}", "line 1, column 23: not valid YAML: values of the type !!binary are not read"),
        ("tracking: {tags: !!set {a, b}}", "!!set are not read"),
        ("tracking: {tags: !!omap [a: b]}", "!!omap are not read"),
        ("model: !!python/object/apply:os.system ['true']", "!!python/object/apply:os.system are not read"),
        ("model: !mine 1", "!mine are not read"),
        ("tracking: {tags: {[a]: x}}", "column 19: not valid YAML: a key must be a plain word"),
        ("tracking: {tags: {? {a: b} : x}}", "a key must be a plain word"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "{b: " * 3000 + "}" * 3000, "nested too deeply"),
        ("model: &m {n_layer: *m}", "an alias names what it is part of"),
        ('tracking: {run_name: "\\UFFFFFFFF"}', "not valid YAML"),
        ('tracking: {tags: {"\\ud800": x}}', "the key holds bytes that are not UTF-8"),
        ('training: {"\\ud800": 1}', "unknown key"),
        ("tracking: !!map x", "its type and what it holds do not go together"),
        ("model: &m [*m]", "an alias names what it is part of"),
        ("training: {seed: " + "1" * 5000 + "}", 'training.seed: found the text "' + "1" * 80 + '..."'),
        (b"tracking: {run_name: 'a\0b'}", "not valid YAML"),
        (b"tracking: {run_name: caf\xe9}", "cannot be read as a YAML file"),
        ("tracking: {run_name: cafe}".encode("utf-16"), "cannot be read as a YAML file"),
        ('tracking: {run_name: "\\udce9"}', "bytes that are not UTF-8"),
        ('training: {checkpoint_dir: "a\\0b"}', "training.checkpoint_dir: found the text .*NUL has no place"),
        ("training: yes", 'training: expected settings below it, found the text "yes"'),
        ("yes", 'expected sections .*found the text "yes"'),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_message(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert re.search(message.replace("(", r"\(") if "!!" in message else message, refused(tmp_path, content))


def test_an_alias_of_an_alias_of_an_alias_costs_nothing(tmp_path: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 'x'}]\n" for i in range(30))  # 9^29 if each were copied
    (tmp_path / "a.yaml").write_text(levels)
    assert plain_values(read_yaml(tmp_path / "a.yaml"))["l0"] == ["x"]
    assert "l29: unknown section" in refused(tmp_path, levels)


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbftraining:\r\n  max_iters: 7\r\n").training.max_iters == 7


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("[a, b]", "tracking.tags: found a list; accepted: mapping of text to text"),
        ("text", 'tracking.tags: found the text "text"; accepted: mapping of text to text'),
        ("{a: {b: c}, d: [1]}", "tracking.tags.a: found a mapping; accepted: text\n  tracking.tags.d: found a list; accepted: text"),
        ("{a: null}", "tracking.tags.a: found null; accepted: text"),
        ("{'a#b': x}", "tracking.tags: `a#b` is no name that MLflow takes for a tag"),
        ("{a//b: x}", "`a//b` is no name"),
        ("{../a: x}", "`../a` is no name"),
        ("{bdh.latest_checkpoint: x}", "names that begin with bdh. are set by the program"),
        ("{a: " + "x" * 6001 + "}", "the value of `a` has 6,001 characters"),
    ],
)
def test_tags_that_cannot_be_set_say_which_and_why(tmp_path: Path, tags: str, message: str) -> None:
    assert message in refused(tmp_path, f"tracking: {{tags: {tags}}}")
