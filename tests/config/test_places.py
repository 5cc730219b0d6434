"""Every place of a configuration is absolute once it is read, and no folder is named like a variable."""

import string
from pathlib import Path

import pytest
import sqlalchemy

from bdh_mlflow.config import Config
from bdh_mlflow.config.places import absolute, expanded, store_uri
from bdh_mlflow.config.settings import Place
from bdh_mlflow.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("data", "/base/data"),
        ("/data", "/data"),
        ("~/data", "/home/me/data"),
        ("~", "/home/me"),
        ("${CORPUS}/en", "/corpora/en"),
        ("$CORPUS/en", "/corpora/en"),
        ("a$", "/base/a$"),
        ("./~", "/base/~"),
        ("auto", "/base/auto"),
        ("file:///data%20en/a", "/data en/a"),
    ],
)
def test_a_path_is_made_absolute_once(monkeypatch: pytest.MonkeyPatch, written: str, place: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPUS", "/corpora")
    assert absolute(written, Path("/base")) == place
    assert absolute(place, Path("/elsewhere")) == place


@pytest.mark.parametrize(
    ("written", "reason"),
    [("${NOT_SET}/a", "no variable NOT_SET"), ("$NOT_SET", "NOT_SET"), ("${}", "names no variable"), ("~nobody-here/a", "no home")],
)
def test_what_stands_for_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, written: str, reason: str) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match=reason):
        expanded(written, Path("/base"))


@pytest.mark.parametrize("uri", ["s3://bucket/text", "https://host/a", "file://host/a", "models:/a/1"])
def test_a_uri_is_no_folder_of_that_name(uri: str) -> None:
    with pytest.raises(ValueError, match="is not a place on this machine"):
        absolute(uri, Path("/base"))


def test_a_word_that_stands_for_text_is_no_path_where_text_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert absolute("python-stdlib", Path("/base"), Place.SOURCE) == "python-stdlib"
    assert absolute("auto", Path("/base"), Place.SOURCE) == "auto"
    assert absolute("auto.txt", Path("/base"), Place.SOURCE) == "/base/auto.txt"


@pytest.mark.parametrize("name", ["a$b", "~x", "${a}", "a$"])
def test_what_exists_as_it_is_written_is_meant_and_a_place_in_full_is_not_read_again(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    full = absolute(name, tmp_path)
    assert full == str(tmp_path / name)
    assert absolute("runs", tmp_path / name, expand=False) == f"{full}/runs"
    assert absolute(f"{full}/runs", Path("/"), expand=False) == f"{full}/runs"
    config = Config.from_saved(Config.from_dict({}, base=tmp_path / name).to_dict(), "checkpoint_1.pt", "0")
    assert config.training.checkpoint_dir == f"{full}/checkpoints"


@pytest.mark.parametrize(
    ("written", "uri"),
    [
        ("sqlite:///my.db", "sqlite:////base/my.db"),
        ("sqlite:///a/../my.db?timeout=5", "sqlite:////base/a/../my.db?timeout=5"),
        ("sqlite:////data/my.db", "sqlite:////data/my.db"),
        ("sqlite:///~/my.db", "sqlite:////home/me/my.db"),
        ("sqlite+pysqlite:///my.db", "sqlite+pysqlite:////base/my.db"),
        ("sqlite:////my%20data/my.db", "sqlite:////my data/my.db"),
        ("  http://host:5000\n", "http://host:5000"),
        ("file:mlruns", "file:///base/mlruns"),
        ("file:///mlruns", "file:///mlruns"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("postgresql://me:pa$word@host/db", "postgresql://me:pa$word@host/db"),
        ("arn:aws:sagemaker:eu-west-1:1:mlflow-tracking-server/a", "arn:aws:sagemaker:eu-west-1:1:mlflow-tracking-server/a"),
        ("databricks", "databricks"),
    ],
)
def test_the_uri_of_a_store_means_the_same_from_everywhere(monkeypatch: pytest.MonkeyPatch, written: str, uri: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert store_uri(written, Path("/base")) == uri
    assert store_uri(uri, Path("/elsewhere")) == uri


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("localhost:5000", r"did you mean http://localhost:5000\?"),
        ("mlruns", "no URI of a tracking store; accepted: http.*; a folder is written file:///base/mlruns"),
        ("./mlruns", "no URI"),
        ("http:host", "no URI"),
        ("", "no URI"),
        ("http://[::1", "no URI"),
        ("http://h:99999", "no URI"),
        ("http://a b", "no URI"),
        ("http://", "no URI"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///${NOT_SET}.db", "no variable NOT_SET"),
    ],
)
def test_what_is_no_uri_of_a_store_is_refused(written: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        store_uri(written, Path("/base"))


def test_a_password_is_not_part_of_the_message() -> None:
    with pytest.raises(ValueError, match=r"`postgresql:\.\.\.` is no URI") as caught:
        store_uri("postgresql:/me:secret@host/db", Path("/base"))
    assert "secret" not in str(caught.value)


def test_a_database_is_found_in_a_folder_of_any_name(tmp_path: Path) -> None:
    """SQLAlchemy decodes its URIs: `%41` in a folder's name would be another folder."""
    for letter in string.printable.replace("/", ""):
        for name in (f"a{letter}b", f"{letter}x", f"a%{letter}1", "a%2Fb"):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            uri = store_uri("sqlite:///my.db", folder)
            assert sqlalchemy.make_url(uri).database == str(folder / "my.db"), name
            assert store_uri(uri, Path("/elsewhere"), expand=False) == uri


def test_all_places_of_a_configuration_are_absolute_and_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("tracking: {tracking_uri: sqlite:///my.db}\ndataset: {parquet_dir: text, source: books}\n")
    config = Config.from_yaml("a.yaml", ["training.checkpoint_dir=runs"])
    assert config.training.checkpoint_dir == str(tmp_path / "runs")
    assert (config.dataset.parquet_dir, config.dataset.source) == (str(tmp_path / "text"), str(tmp_path / "books"))
    assert config.tracking.tracking_uri == f"sqlite:///{tmp_path}/my.db"
    monkeypatch.chdir("/")
    assert Config.from_saved(config.to_dict(), "checkpoint_1.pt", "0") == config


def test_places_that_stand_for_nothing_are_problems_of_their_settings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {checkpoint_dir: '${NOT_SET}/a'}\ntracking: {tracking_uri: mlruns}\n")
    with pytest.raises(ConfigError, match=r"2 problems\n  training.checkpoint_dir: .*NOT_SET\n  tracking.tracking_uri: `mlruns` is no URI"):
        Config.from_yaml(tmp_path / "a.yaml")


def test_a_folder_whose_name_is_not_utf8_is_a_folder(tmp_path: Path) -> None:
    config = Config.from_dict({}, ["dataset.parquet_dir=caf\udce9", "training.checkpoint_dir=ck\udce9"], base=tmp_path)
    assert config.dataset.parquet_dir == f"{tmp_path}/caf\udce9"
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "a.yaml") == config
    with pytest.raises(ConfigError, match='found the text ""; accepted: text that is not empty'):
        Config.from_dict({}, ["dataset.parquet_dir="], base=tmp_path)
