"""The checkout that a run comes from, as a commit and a patch, and the packages installed beside it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bdh_mlflow import host
from bdh_mlflow.host import UNKNOWN, SourceState

Git = Callable[..., str]


def run_git(folder: Path, *words: str, stdin: str | None = None) -> str:
    """git with an identity and no configuration of the user."""
    identity = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "protocol.file.allow=always"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"GIT_CONFIG_GLOBAL": os.devnull}
    given = None if stdin is None else stdin.encode()
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, input=given, env=env, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout.decode()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A checkout with one commit."""
    return repository(tmp_path / "repo")


def repository(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True)
    run_git(folder, "init", "-q")
    (folder / "a").write_text("one\n")
    (folder / "ü b.py").write_text("y = 1\n")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    run_git(folder, "add", "-A")
    run_git(folder, "commit", "-qm", "a")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files but those of git."""
    files = [file for file in folder.rglob("*") if file.is_file() and ".git" not in file.relative_to(folder).parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def applied(repo: Path, state: SourceState) -> dict[str, bytes]:
    """Files of the commit after `git apply` of the patch."""
    clone = repo.parent / "clone"
    run_git(repo.parent, "clone", "-q", str(repo), str(clone))
    run_git(clone, "checkout", "-q", str(state.commit))
    run_git(clone, "apply", "-", stdin=state.patch)
    return tree(clone)


def test_uncommitted_changes_are_a_patch(tmp_path: Path) -> None:
    assert host.source_state(tmp_path) == UNKNOWN == (None, None, "")
    repo = repository(tmp_path / "repo")
    commit = run_git(repo, "rev-parse", "HEAD").strip()
    assert host.source_state(repo) == (commit, False, "")
    (repo / "a").write_text("two\n")
    (repo / "new.py").write_text("x = 1\n")
    (repo / "data.bin").write_bytes(bytes(100))
    (repo / "sub").mkdir()
    state = host.source_state(repo / "sub")
    assert (state.commit, state.dirty) == (commit, True)
    assert "-one\n+two" in state.patch
    assert "+++ b/new.py\n@@ -0,0 +1 @@\n+x = 1" in state.patch
    assert state.patch.startswith(f"# Incomplete: not all that differs from commit {commit}.")
    assert "# not in the repository, not shown: data.bin\n" in state.patch
    assert applied(repo, state) == {name: content for name, content in tree(repo).items() if name != "data.bin"}


CONFIGURATIONS = {
    "colour": "[color]\n ui = always\n diff = always",
    "no prefixes": "[diff]\n noprefix = true",
    "other prefixes": "[diff]\n mnemonicPrefix = true\n srcPrefix = x/\n dstPrefix = y/",
    "another program": "[diff]\n external = /bin/echo",
    "few lines around": "[diff]\n context = 0\n interHunkContext = 0\n suppressBlankEmpty = true",
    "order file missing": "[diff]\n orderFile = nowhere",
    "renames": "[diff]\n renames = copies",
    "words": "[diff]\n wordRegex = .",
    "submodules in words": "[diff]\n submodule = log\n ignoreSubmodules = all",
    "relative": "[diff]\n relative = true",
    "text conversion": '[diff "upper"]\n textconv = tr a-z A-Z <\n command = /bin/echo\n[core]\n attributesFile = {attributes}',
    "no refresh": "[diff]\n autoRefreshIndex = false\n[status]\n showUntrackedFiles = no",
    "names": "[core]\n quotePath = false\n pager = false",
    "a monitor": "[core]\n fsmonitor = {hook}\n untrackedCache = true",
    "unknown values": "[diff]\n algorithm = nonsense\n[color]\n ui = purple",
    "a split index": "[core]\n splitIndex = true",
    "binary": "[core]\n attributesFile = {binary}",
    "line ends": "[core]\n autocrlf = true\n safecrlf = true",
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("place", ["global", pytest.param("local", marks=pytest.mark.slow)])  # the same settings in the other file
def test_patch_applies_whatever_the_configuration(name: str, place: str, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attributes, hook, ran = repo.parent / "attributes", repo.parent / "hook", repo.parent / "ran"
    attributes.write_text("* diff=upper\n")
    hook.write_text(f"#!/bin/sh\ntouch {ran}\n")
    hook.chmod(0o755)
    binary = repo.parent / "binary"
    binary.write_text("* binary\n")
    settings = CONFIGURATIONS[name].format(attributes=attributes, hook=hook, binary=binary) + "\n"
    if place == "local":
        with (repo / ".git" / "config").open("a") as file:
            file.write(settings)
    else:
        (repo.parent / "config").write_text(settings)
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(repo.parent / "config"))
    (repo / "a").rename(repo / "moved.py")
    (repo / "ü b.py").write_text("y = 2\n\ny = 3\n")
    (repo / "ü new.py").write_text("z = 3\n")
    before = {file: file.read_bytes() for file in (repo / ".git").rglob("*") if file.is_file()}
    state = host.source_state(repo)
    assert state.dirty
    assert not state.patch.startswith("#")
    assert not ran.exists(), "a program of the user was run"
    assert {file: file.read_bytes() for file in (repo / ".git").rglob("*") if file.is_file()} == before
    assert applied(repo, state) == tree(repo)


def test_variables_of_another_repository_are_not_followed(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repo / "a").write_text("two\n")
    expected = host.source_state(repo)
    other = repository(tmp_path / "other", third=b"3")
    for variable, value in {
        "GIT_DIR": f"{other}/.git",
        "GIT_WORK_TREE": f"{other}",
        "GIT_INDEX_FILE": f"{other}/.git/index",
        "GIT_OBJECT_DIRECTORY": f"{other}/.git/objects",
        "GIT_NAMESPACE": "x",
        "GIT_EXTERNAL_DIFF": "/bin/echo",
        "GIT_DIFF_OPTS": "-u0",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.worktree",
        "GIT_CONFIG_VALUE_0": f"{other}",
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_PAGER": "false",
    }.items():
        monkeypatch.setenv(variable, value)
        assert host.source_state(repo) == expected, variable


def test_patch_holds_every_kind_of_change(tmp_path: Path) -> None:
    lines = b"".join(b"%d\r\n" % n for n in range(50))
    repo = repository(
        tmp_path / "repo", crlf=lines, gone=b"x\n", mode=b"#!/bin/sh\n", picture=bytes(range(256)), staged=b"1\n", split=b"1\n"
    )
    (repo / "crlf").write_bytes(lines.replace(b"25", b"twenty-five"))
    (repo / "gone").unlink()
    (repo / "mode").chmod(0o755)
    (repo / "picture").write_bytes(bytes(reversed(range(256))))
    (repo / "staged").write_text("2\n")
    run_git(repo, "add", "staged")
    (repo / "intended.py").write_text("i = 1\n")
    run_git(repo, "add", "-N", "intended.py")
    (repo / "empty.py").touch()
    (repo / "no_end.py").write_text("x = 1\nx = 2")
    (repo / "crlf.py").write_bytes(b"x = 1\r\n\r\n")
    (repo / "form\x0cfeed\u2028.py").write_text("x = '\x0c\u2028'\n")
    (repo / 'a "quoted" \\ name\n.py').write_text("x = 1\n")
    (repo / "deep" / "er").mkdir(parents=True)
    (repo / "deep" / "er" / " x.py").write_text("x = 1\n")
    (repo / "run.sh").write_text("true\n")
    (repo / "run.sh").chmod(0o755)
    state = host.source_state(repo)
    assert not state.patch.startswith("#"), state.patch
    assert applied(repo, state) == tree(repo)
    assert os.access(repo.parent / "clone" / "run.sh", os.X_OK)
    assert os.access(repo.parent / "clone" / "mode", os.X_OK)


def test_what_text_cannot_hold_is_named(tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo", latin=b"caf\xe9\n", a2=b"1\n")
    (repo / "latin").write_bytes(b"th\xe9\n")
    (repo / "a2").write_text("2\n")
    (repo / "new_latin.py").write_bytes(b"# caf\xe9\n")
    Path(os.fsdecode(os.fsencode(repo) + b"/caf\xe9.bin")).touch()
    (repo / "link.py").symlink_to("nowhere")
    state = host.source_state(repo)
    state.patch.encode()
    for note in (
        "not UTF-8, not shown: latin",
        "not UTF-8, not shown: new_latin.py",
        'not in the repository, not shown: "caf\\351.bin"',
        "not in the repository, not shown: link.py",
    ):
        assert f"# {note}\n" in state.patch
    assert applied(repo, state)["a2"] == b"2\n"


def test_a_new_date_alone_is_no_change(repo: Path) -> None:
    os.utime(repo / "a", (1, 1))
    assert host.source_state(repo)[1:] == (False, "")


def test_a_change_in_the_second_of_the_commit_is_seen(repo: Path) -> None:
    status = (repo / "a").stat()
    (repo / "a").write_text("two\n")  # of the same size
    os.utime(repo / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(repo / ".git" / "index", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run_git(repo, "-c", "core.trustctime=false", "diff", "--name-only") == "a\n"
    run_git(repo, "config", "core.trustctime", "false")
    assert host.source_state(repo).dirty


def test_unmerged_files_are_part_of_the_patch(repo: Path) -> None:
    run_git(repo, "checkout", "-qb", "other")
    (repo / "a").write_text("other\n")
    run_git(repo, "commit", "-qam", "other")
    run_git(repo, "checkout", "-q", "-")
    (repo / "a").write_text("mine\n")
    run_git(repo, "commit", "-qam", "mine")
    with pytest.raises(AssertionError, match="merge"):
        run_git(repo, "merge", "-q", "other")
    assert applied(repo, host.source_state(repo)) == tree(repo)


def test_patch_is_bounded_and_says_what_it_lacks(tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo", b=b"", huge=b"", z=b"1\n")
    (repo / "b").write_text("x = 1\n" * 500_000)
    (repo / "huge").write_bytes(b"x = 1\n" * 10_000_000)
    (repo / "z").write_text("2\n")
    for n in range(3_000):
        (repo / f"n{n:04}.py").write_text("x = 1\n" * 100)
        (repo / f"n{n:04}.bin").write_bytes(b"\0")
    began = time.monotonic()
    state = host.source_state(repo)
    assert time.monotonic() - began < 10, "one process a file took 11 s for the sources alone"
    assert len(state.patch) < 1_100_000
    head = state.patch.partition("diff --git")[0]
    assert head.startswith("# Incomplete")
    assert "`git diff HEAD`" in head.splitlines()[0]
    assert "# larger than 16,777,216 bytes, not shown: huge\n" in head
    assert "# no room in 1,000,000 bytes, not shown: b\n" in head
    files = applied(repo, state)
    assert files["z"] == b"2\n", "what follows a large file is kept"
    assert 1_000 < sum(name.endswith(".py") for name in files) < 3_000
    left_out = len(tree(repo)) - len(files) + 2
    assert f"# and {left_out - host.MOST_NAMED:,} more\n" in head


def test_checkouts_that_tell_nothing_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run_git(empty, "init", "-q")
    (empty / "a.py").write_text("x = 1\n")
    assert host.source_state(empty) == UNKNOWN, "no commit"
    repo = repository(tmp_path / "repo")
    (repo / ".gitignore").write_text(".venv\n")
    (repo / "a").write_text("mine\n")
    for place in (".venv/lib/package", "venv/lib/package", "copied/package"):
        (repo / place).mkdir(parents=True)
        if "copied" not in place:
            assert host.source_state(repo / ".venv/lib/package") == UNKNOWN, "ignored"
        (repo / place / "module.py").write_text("x = 1\n")
        assert host.source_state(repo / place) == UNKNOWN, f"{place} is not the repository's"
    assert host.source_state(repo).dirty
    assert host.source_state(repo / ".git") == UNKNOWN
    assert host.source_state(tmp_path / "gone") == UNKNOWN
    if os.getuid() == 0:
        os.chown(repo, 1234, 1234)
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        assert host.source_state(repo) == UNKNOWN, "another owner"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.source_state(repo) == UNKNOWN, "no git"


def test_worktrees_and_submodules_are_checkouts_of_their_own(repo: Path, tmp_path: Path) -> None:
    commit = run_git(repo, "rev-parse", "HEAD").strip()
    run_git(repo, "worktree", "add", "-q", str(tmp_path / "worktree"))
    (tmp_path / "worktree" / "a").write_text("two\n")
    assert "+two" in host.source_state(tmp_path / "worktree").patch
    assert host.source_state(repo) == (commit, False, "")
    outer = repository(tmp_path / "outer")
    run_git(outer, "submodule", "add", "-q", str(repo), "inner")
    run_git(outer, "commit", "-qm", "inner")
    assert host.source_state(outer).dirty is False
    (outer / "inner" / "a").write_text("two\n")
    assert "+two" in host.source_state(outer / "inner").patch
    state = host.source_state(outer)
    assert state.dirty
    assert state.patch.endswith("# submodule, not shown: inner\n")


@pytest.mark.slow  # waits for the limit each time
@pytest.mark.parametrize(
    ("command", "dirty", "note"), [("rev-parse", None, ""), ("diff-index", None, ""), ("--binary", True, "took too long to give them")]
)
def test_a_git_that_hangs_is_waited_for_once(
    command: str, dirty: bool | None, note: str, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repo / "a").write_text("two\n")
    real = run_git(repo, "--exec-path").strip() + "/git"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(f'#!/bin/sh\ncase " $* " in *" {command} "*) sleep 60 & wait;; esac\nexec {real} "$@"\n')
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(host, "GIT_TIMEOUT_S", 1.0)
    began = time.monotonic()
    state = host.source_state(repo)
    assert time.monotonic() - began < 10
    assert state.dirty is dirty
    assert note in state.patch


def test_a_filter_that_fails_is_not_a_clean_checkout(repo: Path) -> None:
    (repo / ".git" / "info" / "attributes").write_text("a filter=broken\n")
    with (repo / ".git" / "config").open("a") as file:
        file.write('[filter "broken"]\n clean = false\n required = true\n')
    (repo / "a").write_text("two\n")
    assert host.source_state(repo).dirty is not False


BROKEN = {
    "no_metadata-1.0.dist-info": None,
    "empty-1.0.dist-info": b"",
    "no_name-1.0.dist-info": b"Metadata-Version: 2.1\nVersion: 1.0\n",
    "no_version-1.0.dist-info": b"Metadata-Version: 2.1\nName: no-version\n",
    "latin-1.0.dist-info": b"Metadata-Version: 2.1\nName: caf\xe9\nVersion: 1.0\n",
    "no_metadata.egg-info": None,
}


def test_broken_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, content in BROKEN.items():
        (tmp_path / folder).mkdir()
        if content is not None:
            (tmp_path / folder / "METADATA").write_bytes(content)
    (tmp_path / "fine-2.0.dist-info").mkdir()
    (tmp_path / "fine-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fine\nVersion: 2.0\n")
    (tmp_path / "file-1.0.dist-info").write_text("not a folder")
    (tmp_path / "loop-1.0.dist-info").symlink_to("loop-1.0.dist-info")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    host.environment.cache_clear()
    lines = host.environment().splitlines()
    host.environment.cache_clear()
    for folder in [*BROKEN, "file-1.0.dist-info", "loop-1.0.dist-info"]:
        assert f"# {tmp_path / folder}: metadata cannot be read" in lines
    assert "fine==2.0" in lines
    assert any(line.startswith("torch==") for line in lines)
    assert (host.version_of("fine"), host.version_of("nowhere"), host.version_of("")) == ("2.0", None, None)
    assert [host.version_of(package) for package in ("no_metadata", "empty", "no_version", "latin")] == 4 * [None]
