"""What may be said of a run, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from bdh_mlflow.errors import InputError
from bdh_mlflow.track import Settings
from bdh_mlflow.track.settings import flat, settings_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "track.Settings: keep is 0: Input should be greater than or equal to 1"),
        ({"keep": "3"}, "track.Settings: keep is '3': Input should be a valid integer"),
        ({"experiment": ""}, "track.Settings: experiment is '': String should have at least 1 character"),
        ({"experiment": 7}, "track.Settings: experiment is 7: Input should be a valid string"),
        ({"experiment": "x" * 501}, "String should have at most 500 characters"),
        ({"name": "x" * 251}, "String should have at most 250 characters"),
        ({"tags": {"a": 1}}, "track.Settings: tags is {'a': 1}: Input should be a valid string"),
        ({"tags": {"a,b": "1"}}, "tag 'a,b': names are made of letters"),
        ({"folder": 3}, "track.Settings: folder is 3"),
        ({"signals": "yes"}, "track.Settings: signals is 'yes': Input should be a valid boolean"),
        ({"experiment": " "}, "track.Settings: experiment is ' '"),
        ({"name": "a\0b"}, "track.Settings: run_name is 'a\\x00b'"),
        ({"best": ""}, "track.Settings: best is ''"),
        ({"tracking_uri": ""}, "track.Settings: tracking_uri is ''"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings(**fields)
    assert message in str(caught.value)


def test_a_name_alone_is_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of("mine") == Settings("mine")
    assert settings_of(None).config().experiment == "Default"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from outside")
    assert (settings_of(None).config().experiment, settings_of("mine").config().experiment) == ("from outside", "mine")
    wrong: Any = 3
    with pytest.raises(InputError, match=r"settings: 3 is neither the name of an experiment nor track\.Settings"):
        settings_of(wrong)


def test_params_are_flattened_and_stored_as_text_where_they_are_no_plain_values() -> None:
    given = {"lr": 1e-3, "net": {"width": 8, "layers": (1, 2), "act": {}}, "path": Path("/x"), "none": None, "long": "x" * 7000}
    found = flat(given)
    assert found | {"long": ""} == {
        "lr": 1e-3, "net.width": 8, "net.layers": "[1, 2]", "net.act": "{}", "path": "/x", "none": None, "long": "",
    }  # fmt: skip
    assert (len(found["long"]), found["long"][-25:]) == (6000, "xxx... (7,000 characters)")
    assert flat({"a": {"b": 1}}, joint="/") == {"a/b": 1}
    for wrong, message in (([1], "params: [1] is no mapping"), ({"a\n": 1}, "param 'a\\n': names")):
        with pytest.raises(InputError) as caught:
            flat(wrong)
        assert message in str(caught.value)
