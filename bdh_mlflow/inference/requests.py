"""What a served model accepts: prompts that are text, and known parameters within their range.

MLflow's scoring server converts a request before the model sees it: in `inputs` and `instances` null becomes the text "None" and 5 the text
"5", an unknown parameter is dropped, and a CSV row with a comma too many loses what stands before it. So a request is looked
at twice: as it was sent (`check`), and what became of it (`texts`, `in_range`). Knows nothing of MLflow.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from bdh_mlflow.errors import InputError
from bdh_mlflow.files import nearest

PROMPT = "prompt"
MOST_NEW_TOKENS = 65_536
UNSET_SEED, UNRESTRICTED = -1, 0
"""Parameters of a served model have one type each: these stand for None."""
DEFAULTS: dict[str, Any] = {"max_new_tokens": 256, "temperature": 0.8, "top_k": 50, "top_p": 0.0, "seed": UNSET_SEED, "stop": ""}
"""Parameters of a request; top_k 0 and top_p 0 do not restrict, seed -1 is new randomness each time."""
LIMITS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, MOST_NEW_TOKENS),
    "temperature": (0, float("inf")),
    "top_k": (UNRESTRICTED, float("inf")),
    "top_p": (0, 1),
    "seed": (UNSET_SEED, 2**63 - 1),
}
SHOWN = 60  # characters of a value in a message


def check(body: bytes | str, content_type: str | None) -> None:
    """Refuse what the server would convert into another request.   body, content_type: as they were sent; None for no Content-Type.

    Raises InputError. What the server refuses itself, with its reason, is left to it: no JSON, no form that it knows, missing columns.
    """
    if not content_type:
        raise InputError("no Content-Type; accepted: application/json, text/csv, application/vnd.apache.parquet")
    kind = content_type.partition(";")[0].strip()
    if kind == "text/csv":
        _check_csv(body)
    elif kind == "application/json":
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return
        if isinstance(request, dict):
            _check_json(request)


def texts(values: Iterable[object]) -> list[str]:
    """The prompts in a column.   Raises InputError for one that is no text."""
    prompts = []
    for i, value in enumerate(values):
        if _is_missing(value):
            raise InputError(f"{PROMPT}[{i}]: missing (null, NaN, no such key, or in a CSV an empty cell or one like NA); accepted: text")
        prompts.append(_text(value, f"{PROMPT}[{i}]"))
    return prompts


def in_range(params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a request; those not given have DEFAULTS.   Raises InputError for one of another type or out of its range."""
    given = {**DEFAULTS, **params}
    for name, default in DEFAULTS.items():
        value = given[name]
        if isinstance(default, str):
            _text(value, name)
            continue
        least, most = LIMITS[name]
        accepted = int if isinstance(default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted) or not least <= value <= most:  # the last is false for NaN
            whole = "whole numbers, " if isinstance(default, int) else ""
            raise InputError(f"{name}: {_shown(value)}; accepted: {whole}{least} to {most}")
    return given


def _check_csv(body: bytes | str) -> None:
    """Raises InputError for a row with more cells than the header: pandas takes the first ones for an index."""
    try:
        rows = csv.reader(io.StringIO(body.decode() if isinstance(body, bytes) else body, newline=""))
        names = next(rows, [])
        for row in rows:
            if len(row) > len(names):
                more = f"{len(row)} cells in a row, {len(names)} in the first; a text with commas goes in double quotes"
                raise InputError(f"line {rows.line_num}: {more}")
    except (csv.Error, UnicodeDecodeError):
        return


def _check_json(request: dict[str, Any]) -> None:
    params = request.get("params")
    if PROMPT in request:  # a request whose parameters stand beside the prompt, as the server accepts from clients of language models
        params = {name: value for name, value in request.items() if name != PROMPT}
    elif misplaced := [name for name in request if name in DEFAULTS]:
        raise InputError(f'{misplaced[0]}: belongs under params: {{"inputs": ..., "params": {{"{misplaced[0]}": ...}}}}')
    for name in params if isinstance(params, dict) else ():
        if name not in DEFAULTS:
            raise InputError(f"{name}: unknown parameter{nearest(name, DEFAULTS)}")
    for form in ("inputs", "instances"):
        if form in request:
            _check_prompts(request[form], form)


def _check_prompts(value: object, form: str) -> None:
    where = f"{form}.{PROMPT}" if isinstance(value, dict) else form
    if isinstance(value, dict):
        value = value.get(PROMPT, "")
    elif not isinstance(value, list):
        return
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise InputError(f"{where}: {_shown(value)}; accepted: a list of texts")
    for i, prompt in enumerate(value):
        place = f"{where}[{i}]"
        if isinstance(prompt, dict) and where == form:
            if PROMPT not in prompt:
                raise InputError(f"{place}: has no {PROMPT}")
            place, prompt = f"{place}.{PROMPT}", prompt[PROMPT]
        if _text(prompt, place).endswith("\0"):
            raise InputError(f"{place}: ends in NUL, which MLflow cuts off {form}; accepted: the same in dataframe_split")


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {_shown(value)}; accepted: text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: holds {value[error.start]!a}, half of a surrogate pair; accepted: text that UTF-8 can hold") from None
    return value


def _is_missing(value: object) -> bool:
    """Whether a value is null for JSON or pandas."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")


def _shown(value: object) -> str:
    """A value as in JSON if it is short."""
    words = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}..."
