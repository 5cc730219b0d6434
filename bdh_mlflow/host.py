"""The machine and the checkout that a run comes from: commit and uncommitted changes, C++ compiler, installed packages.

Knows nothing of runs: everything is returned as text.
"""

import functools
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

SOURCES = {".py", ".yaml", ".yml", ".toml", ".sh", ".md"}
LARGEST_SOURCE_BYTES = 200_000
"""Untracked files with these suffixes and up to this size are part of the patch."""


def source_state(folder: Path) -> tuple[str | None, bool, str]:
    """Commit of the checkout that `folder` is in, whether its files differ from the commit, and the difference as a patch.

    Untracked files that git does not ignore are part of the patch if they are sources, and only named in it otherwise. (None, False, "") if
    there is no checkout.
    """
    commit, root = _git(folder, "rev-parse", "HEAD"), (_git(folder, "rev-parse", "--show-toplevel") or "").strip()
    if commit is None or not root:
        return None, False, ""
    patch = _git(Path(root), "diff", "HEAD") or ""
    for name in (_git(Path(root), "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0"):
        file = Path(root) / name
        if name and file.suffix in SOURCES and file.is_file() and file.stat().st_size < LARGEST_SOURCE_BYTES:
            patch += _git(Path(root), "diff", "--no-index", "--", "/dev/null", name, accepted=(0, 1)) or ""
        elif name:
            patch += f"# not in the repository, not shown: {name}\n"
    return commit.strip(), bool(patch), patch


def compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use on a CPU; None without one."""
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None)


@functools.cache  # reading the metadata of two hundred packages takes 0.15 s, and a sweep or a test trains many times
def environment() -> str:
    """Installed packages as `name==version` lines."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def _git(folder: Path, *arguments: str, accepted: tuple[int, ...] = (0,)) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode in accepted else None
