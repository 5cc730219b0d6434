"""The machine and the checkout that a run comes from: commit and uncommitted changes, C++ compiler, installed packages, signals.

Knows nothing of runs: everything is returned as text. Nothing here raises: a run is not refused because git or a package is broken, and
what cannot be found out is called unknown.
"""

import contextlib
import functools
import gc
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, NoReturn

from bdh_mlflow import __version__

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What ends a training run with a checkpoint: Ctrl-C, a scheduler's end and its warnings, a closed terminal, a used-up limit of CPU time.
They may be sent to every process of a run; only the one that trains obeys them."""

SOURCES = {".py", ".cpp", ".yaml", ".yml", ".toml", ".sh", ".md"}
LARGEST_SOURCE_BYTES = 200_000
"""Untracked files with these suffixes and up to this size are part of the patch."""
PATCH_BYTES = 1_000_000
"""A patch holds whole files up to this size in all; the others are named."""
LARGEST_COMPARED_BYTES = 16 * 2**20
"""Changed files over this size are only named: git compares two versions in memory."""
MOST_NAMED = 100
GIT_TIMEOUT_S = 20.0
"""For all git processes together."""


class SourceState(NamedTuple):
    """The checkout that code comes from.

    commit: None if unknown or if there is none.   dirty: whether files differ from the commit, None if unknown.   patch: the difference,
    for `git apply` on the commit; what it leaves out is named in its first lines, which begin with `#`.
    """

    commit: str | None
    dirty: bool | None
    patch: str


UNKNOWN = SourceState(None, None, "")


def source_state(folder: Path) -> SourceState:
    """Commit of the checkout that `folder` is in, whether its files differ from the commit, and the difference as a patch.

    UNKNOWN without git, a checkout or a commit, for a checkout that git does not open (another owner's), and where git does not track the
    folder: a package installed inside somebody's repository does not come from it. `dirty` alone is None if git fails or takes too long
    after that. Untracked files that git does not ignore are part of the patch if they are sources, and only named in it otherwise.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="git-index-") as scratch:
            git = _Git(Path(scratch) / "index", time.monotonic() + GIT_TIMEOUT_S)
            try:
                found = _checkout(git, folder)
            except _GitError:
                return UNKNOWN
            return _difference(git, *found) if found else UNKNOWN
    except OSError:  # no room for the copy of the index, or the folder went away
        return UNKNOWN


def leave(exit_code: int) -> NoReturn:
    """End this process now, with what it has printed written.

    An interpreter that ends by itself takes thousands of modules apart for more than a second, waits for threads of pools, also for one
    that hangs in a request, and with threads of gloo in a group of four it aborts about every tenth time (torch 2.13.0).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            exit_code = exit_code or 1
        except OSError as error:
            exit_code = exit_code or 1
            with contextlib.suppress(OSError):
                os.write(2, f"Error: the output cannot be written: {error.strerror}\n".encode())
        except ValueError:  # closed
            pass
    os._exit(exit_code)


def loading() -> None:
    """Collect no garbage until `loaded`: while torch and MLflow are imported, looking for it takes a quarter of the time and finds none."""
    gc.disable()


def loaded() -> None:
    """End `loading`, if it has begun: from now on garbage is collected, and what was imported is no longer looked through for it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def disown(descriptor: int) -> None:
    """In a forked process, give up a file that it shares with its parent; the number stays taken, so that nothing else gets it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package in a process of its own, which is to call `loaded`.

    Neither the current folder nor that of the package is searched for anything else: a file `random.py` or `mlflow.py` of the user's there
    must not be run.
    """
    start = (
        "import gc, runpy, sys; gc.disable(); sys.path.insert(0, sys.argv.pop(1)); import bdh_mlflow; del sys.path[0]; "
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-P", "-c", start, str(Path(__file__).parents[1]), module, *arguments]


def compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use on a CPU; None without one."""
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None)


@functools.cache  # reading the metadata of two hundred packages takes 0.15 s, and a sweep or a test trains many times
def environment() -> str:
    """Installed packages as `name==version` lines; those with unreadable metadata as comments with their folder."""
    found = set()
    with contextlib.suppress(Exception):  # a finder of another package may raise anything
        for package in metadata.distributions():
            found.add(_described(package))
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def version_of(package: str) -> str | None:
    """Version of an installed package; None if it is not installed or its metadata cannot be read."""
    try:
        version = metadata.version(package)
    except Exception:  # missing, not UTF-8, no permission, no version, and what later versions of Python add
        return None
    return version if isinstance(version, str) and version else None


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    names = ("torch", "mlflow", "bitsandbytes", "torchao", "pyarrow", "numpy")
    found = {"bdh-mlflow": __version__, "python": platform.python_version()}
    return found | {name: version for name in names if (version := version_of(name))}


def _described(package: metadata.Distribution) -> str:
    with contextlib.suppress(Exception):  # as in `version_of`
        if (name := package.metadata["Name"]) and (version := package.version):
            return "==".join("".join(word.split()) for word in (name, version))
    folder = getattr(package, "_path", None) or package.locate_file("")  # the public name is that of the folder around it
    return f"# {folder}: metadata cannot be read".encode("ascii", "backslashreplace").decode().replace("\n", "\\n")


class _GitError(Exception):
    """git is missing, failed or took too long."""


_KEPT = {
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM",
    "GIT_CONFIG_NOSYSTEM",
    "GIT_EXEC_PATH",
    "GIT_CEILING_DIRECTORIES",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
}
"""Which configuration is the user's (trusted folders, line endings, ignored files) and how to run git. Any other variable, GIT_DIR first of
all, may belong to another repository."""

_SETTINGS = {  # only what has no option of `git diff-index` below, runs programs, or writes beside the index
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.quotePath": "true",  # names in ASCII, whatever their bytes
    "core.splitIndex": "false",
    "diff.relative": "false",
    "diff.suppressBlankEmpty": "false",
}
# `diff-index` rather than `diff`, which reads what a user set for reading diffs and fails at a value that it does not know.
_DIFF = ("diff-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", f"-O{os.devnull}")
_PATCH = ("--binary", "--full-index", "--unified=3", "--inter-hunk-context=0", "--src-prefix=a/", "--dst-prefix=b/", "--word-diff=none")


@dataclass(frozen=True)
class _Git:
    """git without the user's taste in output.   index: of a copy that git may refresh.   deadline: of `time.monotonic`."""

    index: Path
    deadline: float

    def lines(self, folder: Path, *arguments: str) -> Iterator[bytes]:
        """What a command prints, as it comes.   Raises _GitError, possibly after some lines."""
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _KEPT}
        env |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
        if self.index.exists():
            env["GIT_INDEX_FILE"] = str(self.index)
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise _GitError
        try:
            process = subprocess.Popen(
                ["git", "--no-pager", *settings, *arguments],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a filter that git started must not hold the pipe open after a timeout
            )
        except OSError as error:
            raise _GitError from error
        assert process.stdout is not None
        timer = threading.Timer(left, _kill, [process])
        timer.daemon = True
        timer.start()
        try:
            yield from process.stdout
            if process.wait() != 0:
                raise _GitError
        finally:
            timer.cancel()
            _kill(process)
            process.stdout.close()
            process.wait()

    def names(self, folder: Path, *arguments: str) -> list[bytes]:
        """What a command with -z prints.   Raises _GitError."""
        return [name for name in b"".join(self.lines(folder, *arguments)).split(b"\0") if name]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _checkout(git: _Git, folder: Path) -> tuple[Path, str] | None:
    """Root and commit of the checkout that tracks `folder`, whose index is copied; None if there is none.   Raises _GitError, OSError."""
    answer = b"".join(git.lines(folder, "rev-parse", "--git-path", "index", "HEAD", "--show-toplevel"))
    index, commit, root = answer.removesuffix(b"\n").split(b"\n", 2)
    if not git.names(folder, "ls-files", "-z", "--", "."):
        try:
            next(git.lines(folder, "check-ignore", "."))
        except (_GitError, StopIteration):
            ignored = False
        else:
            ignored = True
        if ignored or git.names(folder, "ls-files", "-z", "--others", "--directory", "--no-empty-directory", "--", "."):
            return None
    with contextlib.suppress(FileNotFoundError):
        # With its date: git compares contents where a file is as new as the index.
        shutil.copy2(folder / os.fsdecode(index), git.index)
    return Path(os.fsdecode(root)), commit.decode()


def _difference(git: _Git, root: Path, commit: str) -> SourceState:
    """The state of a checkout at `commit`."""
    changed = untracked = None
    with contextlib.suppress(_GitError):  # the exit code is 1 where files differ
        git.names(root, "update-index", "-q", "--refresh")  # a file with a new date and the old contents has not changed
    with contextlib.suppress(_GitError):
        changed = git.names(root, *_DIFF, "--raw", "-z", "--ignore-submodules=none", "HEAD", "--")
    with contextlib.suppress(_GitError):
        untracked = git.names(root, "ls-files", "--others", "--exclude-standard", "-z")
    if not changed and not untracked:
        return SourceState(commit, None if changed is None or untracked is None else False, "")
    patch = _Patch()
    if changed is None:
        patch.left_out.append("changes of tracked files: git failed or took too long to list them")
    elif changed:
        _add_changed(git, root, changed, patch)
    if untracked is None:
        patch.left_out.append("files not in the repository: git failed or took too long to list them")
    for name in untracked or ():
        _add_untracked(root, os.fsdecode(name), patch)
    return SourceState(commit, True, patch.text(commit))


@dataclass
class _Patch:
    """Differences of whole files, up to PATCH_BYTES in all.   left_out: the other files, in words."""

    parts: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, name: str, part: bytes | None) -> None:
        """Take the difference of one file, if there is room and it is text.   name: as git quotes it.   part: None if it is too large."""
        if part is None or self.size + len(part) > PATCH_BYTES:
            self.left_out.append(f"no room in {PATCH_BYTES:,} bytes, not shown: {name}")
            return
        try:
            self.parts.append(part.decode())
        except UnicodeDecodeError:
            self.left_out.append(f"not UTF-8, not shown: {name}")
        else:
            self.size += len(part)

    def text(self, commit: str) -> str:
        """What is left out, as comments, and the differences."""
        if not self.left_out:
            return "".join(self.parts)
        head = f"Incomplete: not all that differs from commit {commit}. In the checkout, `git status` and `git diff HEAD` show the rest:"
        lines = [head, *self.left_out[:MOST_NAMED]]
        if len(self.left_out) > MOST_NAMED:
            lines.append(f"and {len(self.left_out) - MOST_NAMED:,} more")
        return "".join(f"# {line}\n" for line in lines) + "".join(self.parts)


def _add_changed(git: _Git, root: Path, raw: list[bytes], patch: _Patch) -> None:
    """Add what differs in tracked files.   raw: of `git diff --raw -z`, in turn `:modes objects status` and name."""
    leave = []
    for entry, path in zip(raw[::2], raw[1::2], strict=True):
        name = os.fsdecode(path)
        if b"160000" in entry.removeprefix(b":").split()[:2]:
            patch.left_out.append(f"submodule, not shown: {_quoted(name)}")
        elif _size(root / name) > LARGEST_COMPARED_BYTES:
            patch.left_out.append(f"larger than {LARGEST_COMPARED_BYTES:,} bytes, not shown: {_quoted(name)}")
            leave.append(f":(top,exclude,literal){name}")
    try:
        # Against a file that git cannot open, or a filter that fails, a part of the patch would look like all of it.
        found = list(_by_file(git.lines(root, *_DIFF, *_PATCH, "--ignore-submodules=all", "HEAD", "--", ":/", *leave)))
    except _GitError:
        patch.left_out.append("changes of tracked files: git failed or took too long to give them")
        return
    for quoted, part in found:
        patch.add(quoted, part)


def _by_file(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes | None]]:
    """A patch file by file: the name as git quotes it, and the part, None if it is larger than PATCH_BYTES.

    In a hunk every line begins with another character than `d` and `*`; base85 has no spaces.
    """
    name, size = "", 0
    part: list[bytes] = []
    for line in lines:
        if line.startswith(b"diff --git "):
            if name:
                yield name, b"".join(part) if size <= PATCH_BYTES else None
            both = line.removeprefix(b"diff --git ").rstrip(b"\n").decode("ascii", "replace")  # `a/NAME b/NAME`, of one length
            name, part, size = both[len(both) // 2 + 1 :].replace("b/", "", 1), [], 0
        elif line.startswith(b"* Unmerged path "):
            continue
        size += len(line)
        if size <= PATCH_BYTES:
            part.append(line)
    if name:
        yield name, b"".join(part) if size <= PATCH_BYTES else None


def _add_untracked(root: Path, name: str, patch: _Patch) -> None:
    """Add a file that is not in the repository as a new one."""
    file = root / name
    try:
        status = file.lstat()
        if file.suffix not in SOURCES or not stat.S_ISREG(status.st_mode) or status.st_size >= LARGEST_SOURCE_BYTES:
            patch.left_out.append(f"not in the repository, not shown: {_quoted(name)}")
        elif patch.size + status.st_size > PATCH_BYTES:
            patch.add(_quoted(name), None)
        else:
            patch.add(_quoted(name), _new_file(name, file.read_bytes(), bool(status.st_mode & stat.S_IXUSR)))
    except OSError as error:
        patch.left_out.append(f"not in the repository, cannot be read ({error.strerror}): {_quoted(name)}")


def _new_file(name: str, content: bytes, executable: bool) -> bytes:
    """The patch that makes a file, as git writes it."""
    before, after = _quoted(f"a/{name}").encode(), _quoted(f"b/{name}").encode()
    head = b"diff --git %s %s\nnew file mode %s\n" % (before, after, b"100755" if executable else b"100644")
    if not content:
        return head + b"index 0000000..e69de29\n"
    lines = content.removesuffix(b"\n").split(b"\n")
    count = b"1" if len(lines) == 1 else b"1,%d" % len(lines)
    end = b"" if content.endswith(b"\n") else b"\\ No newline at end of file\n"
    return head + b"--- /dev/null\n+++ %s\n@@ -0,0 +%s @@\n" % (after, count) + b"".join(b"+%s\n" % line for line in lines) + end


def _quoted(name: str) -> str:
    """A file's name as git writes it in a patch: in ASCII, in double quotes if it holds more than plain characters."""
    if name.isascii() and name.isprintable() and not set(name) & set(' "\\'):
        return name
    escaped = (chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03o}" for byte in os.fsencode(name))
    return f'"{"".join(escaped)}"'


def _size(file: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    try:
        return file.lstat().st_size
    except OSError:
        return 0
