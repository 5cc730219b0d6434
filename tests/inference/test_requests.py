"""What a served model is asked: texts are continued as they were sent, anything else is refused with the reason."""

import json
import math
from typing import Any

import pandas as pd
import pytest

from bdh_mlflow.errors import InputError
from bdh_mlflow.inference import requests

JSON = "application/json; charset=utf-8"


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": {"prompt": ["def ", ""]}},
        {"inputs": {"prompt": "def "}},
        {"inputs": {"prompt": []}},
        {"inputs": {"prompt": ["None", "nan", "5", "a\0b", "\U0001f600"], "other": [1, None, 2.5, "x", []]}},
        {"inputs": ["def "], "params": {"max_new_tokens": 4, "stop": "."}},
        {"inputs": ["def "], "params": None, "client_request_id": "7"},
        {"instances": ["def "]},
        {"instances": [{"prompt": "def "}, {"prompt": "x", "other": None}]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["def "]]}},
        {"dataframe_records": [{"prompt": "def "}]},
        {"prompt": "def ", "max_new_tokens": 4},
    ],
)
def test_ordinary_requests_pass(request_: dict[str, Any]) -> None:
    requests.check(json.dumps(request_).encode(), JSON)


@pytest.mark.parametrize("form", ["inputs", "instances"])
@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (None, "null"),
        (5, "5"),
        (0.5, "0.5"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (True, "true"),
        (False, "false"),
        (["a"], "['a']"),
        ([], "[]"),
        ("\ud800", "half of a surrogate pair"),
        ("a\0", "ends in NUL"),
    ],
)
def test_what_the_server_would_turn_into_other_text_is_refused(form: str, prompt: object, shown: str) -> None:
    for value, place in (
        (["a", prompt], f"{form}[1]"),
        ([prompt], f"{form}[0]"),
        ({"prompt": [prompt, "a"]}, f"{form}.prompt[0]"),
        ([{"prompt": "a"}, {"prompt": prompt}], f"{form}[1].prompt"),
    ):
        with pytest.raises(InputError) as refused:
            requests.check(json.dumps({form: value}), JSON)
        assert str(refused.value).startswith(f"{place}: ")
        assert shown in str(refused.value)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"instances": [{"prompt": "a"}, {"x": 1}]}, "instances[1]: has no prompt"),
        ({"inputs": {"prompt": {"0": "a"}}}, "inputs.prompt: {'0': 'a'}; accepted: a list of texts"),
        ({"inputs": {"prompt": None}}, "inputs.prompt: null; accepted: a list of texts"),
        ({"inputs": ["a"], "params": {"max_tokens": 4}}, "max_tokens: unknown parameter; did you mean `max_new_tokens`?"),
        ({"inputs": ["a"], "top_k": 4}, 'top_k: belongs under params: {"inputs": ..., "params": {"top_k": ...}}'),
        ({"prompt": "a", "max_tokens": 4}, "max_tokens: unknown parameter; did you mean `max_new_tokens`?"),
    ],
)
def test_what_the_server_would_drop_is_refused(request_: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as refused:
        requests.check(json.dumps(request_), JSON)
    assert str(refused.value) == reason


@pytest.mark.parametrize("body", [b"", b"[1]", b"def ", b"\xff", b"[" * 100_000, b'{"inputs": ' + b"9" * 5_000 + b"}"])
def test_what_is_no_request_is_left_to_the_server(body: bytes) -> None:
    requests.check(body, JSON)
    requests.check(body, "text/csv")
    requests.check(body, "application/vnd.apache.parquet")
    with pytest.raises(InputError, match="no Content-Type; accepted: application/json"):
        requests.check(body, None)


def test_csv_rows_longer_than_the_header_are_refused() -> None:
    requests.check(b'prompt,x\n"a, b",1\n\n"c\nd",2\ne\n', "text/csv")
    with pytest.raises(InputError) as refused:
        requests.check(b"prompt\na\nb, c\n", "text/csv")
    assert str(refused.value) == "line 3: 2 cells in a row, 1 in the first; a text with commas goes in double quotes"


@pytest.mark.parametrize("missing", [None, math.nan, pd.NA, pd.NaT])
def test_missing_cells_are_no_prompts(missing: object) -> None:
    assert requests.texts(pd.Series(["a", "None", "nan", ""])) == ["a", "None", "nan", ""]
    for column in (["a", missing], pd.Series(["a", missing]), pd.Series(["a", missing], dtype=object)):
        with pytest.raises(InputError, match=r"prompt\[1\]: missing \(null, NaN"):
            requests.texts(column)


@pytest.mark.parametrize("value", [5, 0.5, True, ["a"], {"a": 1}, b"a", "\udcff", pd.Timestamp(0)])
def test_other_cells_are_no_prompts(value: object) -> None:
    with pytest.raises(InputError, match=r"prompt\[0\]: .*accepted: text"):
        requests.texts([value])


@pytest.mark.parametrize("name", requests.DEFAULTS)
@pytest.mark.parametrize("value", [None, True, "1" + chr(0xD800), [1], math.nan, {}])
def test_parameters_of_another_type_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name}: .*; accepted: "):
        requests.in_range({name: value})


def test_whole_numbers_are_asked_for_where_only_they_make_sense() -> None:
    assert requests.in_range({"temperature": 0, "top_p": 1})["temperature"] == 0
    for name in ("max_new_tokens", "top_k", "seed"):
        with pytest.raises(InputError, match=f"{name}: 4.0; accepted: whole numbers"):
            requests.in_range({name: 4.0})
