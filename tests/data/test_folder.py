"""What lies in a folder: every file once, through links too, and by name what cannot be read."""

import os
from pathlib import Path

import pytest

from bdh_mlflow.data.folder import REFUSED, held, kind_of, list_files, nearest_folder
from bdh_mlflow.data.remote import below
from bdh_mlflow.errors import DataError
from tests.conftest import write_shards


def found(root: Path) -> list[str]:
    return [str(below(root, p)) for p in list_files(root, lambda name: name.startswith(".")).files]


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_linked_folders_are_followed_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a", tmp_path / "disk" / "deep" / "b", tmp_path / "other" / "c")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "deep" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "chain").symlink_to("link2")
    (tmp_path / "in" / "link2").symlink_to(tmp_path / "other")
    assert found(tmp_path / "in") == ["a", "chain/c", "link/deep/b"], "what two links lead to is there once"


def test_links_upwards_and_into_the_folder_add_nothing(tmp_path: Path) -> None:
    """Text read twice would be in training and in validation."""
    touch(tmp_path / "in" / "v2" / "a", tmp_path / "outside")
    for name, target in {"latest": "v2", "self": ".", "up": "..", "v2/back": "../..", "root": "/"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    assert found(tmp_path / "in") == ["v2/a"]


def test_a_linked_root_is_read(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a")
    (tmp_path / "link").symlink_to("in")
    assert found(tmp_path / "link") == ["a"]


def test_links_to_nothing_pipes_and_loops_are_named(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    reasons = {path.name: reason for path, reason in list_files(tmp_path, lambda name: False).unreadable}
    assert reasons["gone"] == "a link to nowhere, which does not exist or leads back to itself"
    assert reasons["loop"].startswith("a link to loop")
    assert reasons["pipe"] == "a named pipe"


def test_what_the_file_system_keeps_at_the_root_of_a_disk_is_not_data(tmp_path: Path) -> None:
    """`lost+found` is readable by root only; a folder on a disk of its own would be neither readable nor empty."""
    touch(tmp_path / "lost+found" / "a", tmp_path / "b")
    assert found(tmp_path) == held(tmp_path) == ["b"]


@pytest.mark.parametrize(("path", "message"), [("a\0b", "NUL byte"), ("n" * 300, "too long")], ids=["nul", "long"])
def test_impossible_paths_are_refused(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        kind_of(Path(path))


@pytest.mark.parametrize(
    ("missing", "near"),
    [
        ("dat", "data"),
        ("Data", "data"),
        ("dta/corpus", "data/corpus"),
        ("data/corpsu", "data/corpus"),
        ("data/corpus2", None),  # another one of a series, not a misspelling
        ("data/wiki", None),
        ("hollow2/x", None),
        ("holow", None),  # nothing to train on there
    ],
)
def test_nearest_folder_is_one_with_parquet_files_that_is_spelled_alike(tmp_path: Path, missing: str, near: str | None) -> None:
    write_shards(tmp_path / "data" / "corpus", ["a"])
    (tmp_path / "hollow").mkdir()
    expected = Path(near) if near else None
    assert nearest_folder(Path(missing), REFUSED) == expected
    assert nearest_folder(tmp_path / missing, REFUSED) == (tmp_path / near if near else None)
