"""Where things are: every path and store URI of a configuration, made absolute once, against the folder in which the command was started.

`~` and `${NAME}` are expanded; what cannot be is refused, so that no folder of that name is made. What is made and what is looked for later
(by `sync`, by a resumed run started elsewhere) is thereby the same place. Knows nothing of MLflow beyond the form of its URIs.
"""

import os
import re
from pathlib import Path

from bdh_mlflow.config.settings import Place

BUILT_IN = {"python-stdlib", "auto"}
"""Sources of text that are words, not places."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
ACCEPTED = "http://HOST:PORT, https://..., sqlite:///FILE, postgresql://..., mysql://..., mssql://... or databricks"
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_URI = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def absolute(text: str, base: Path, kind: Place = Place.PATH) -> str:
    """A place in full.   base: what relative ones are relative to.   Raises ValueError with a reason."""
    if kind is Place.STORE:
        return store_uri(text, base)
    if text in BUILT_IN or _URI.match(text):
        return text
    return str(base / expanded(text))


def path(text: str) -> Path:
    """A path as a user writes it.   Raises ValueError with a reason."""
    return Path(expanded(text))


def expanded(text: str) -> str:
    """`~`, `~user`, `$NAME` and `${NAME}` replaced by what they stand for.   Raises ValueError for one that stands for nothing."""

    def variable(found: re.Match[str]) -> str:
        name = found[1] if found[1] is not None else found[2]
        if not (value := os.environ.get(name)):
            raise ValueError(f"{found[0]} stands for nothing: the environment has no variable {name or 'without a name'}")
        return value

    filled = _VARIABLE.sub(variable, text)
    if "\0" in filled:
        raise ValueError("the character NUL has no place in a path")
    if not filled.startswith("~"):
        return filled
    try:
        return str(Path(filled).expanduser())
    except RuntimeError:
        user = filled.partition("/")[0]
        raise ValueError(f"{user} stands for no home folder; write the path in full (a folder of that name: ./{filled})") from None


def store_uri(text: str, base: Path) -> str:
    """The URI of a tracking store in full: no blanks around it, and no file relative to whoever reads it.   Raises ValueError."""
    uri = _VARIABLE.sub(lambda found: expanded(found[0]), text.strip())
    if uri in ("databricks", "databricks-uc"):
        return uri
    scheme = _SCHEME.match(uri)
    kind = scheme[0][:-1].lower().partition("+")[0] if scheme else ""
    if kind == "file":
        rest = uri[len("file:") :]
        return uri if rest.startswith("/") and not rest.startswith("//~") else (base / expanded(rest.removeprefix("//"))).as_uri()
    if not scheme or not uri[scheme.end() :].startswith("//"):
        host = re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri)
        hint = f"; did you mean http://{uri}?" if host else ""
        raise ValueError(f"`{uri}` is no URI of a tracking store{hint}; accepted: {ACCEPTED}")
    return _sqlite(uri, base) if kind == "sqlite" else uri


def sqlite_uri(database: Path) -> str:
    """The URI of a database file; SQLAlchemy decodes `%` in it and ends the path at `?`."""
    return f"sqlite:///{_quoted(str(database))}"


def _sqlite(uri: str, base: Path) -> str:
    head, slashes, rest = uri.partition(":///")
    file, mark, query = rest.partition("?")
    if not slashes or not file or file == ":memory:":
        raise ValueError(f"`{uri}` names no file: a database in memory is gone with its process; accepted: sqlite:///FILE")
    if file.startswith("/"):
        return uri
    file = expanded(file) if file.startswith("~") else f"{_quoted(str(base))}/{file}"
    return f"{head}:///{file}{mark}{query}"


def _quoted(file: str) -> str:
    return file.replace("%", "%25").replace("?", "%3F")
