"""Where things are: every path and store URI of a configuration, made absolute once, against the folder in which the command was started.

What a user has typed is expanded, `~` and `${NAME}`, or refused, so that no folder of that name is made; what exists under the name as
it is written is meant as it is written. What is made and what is looked for later (by `sync`, by a resumed run started elsewhere) is the
same place then. A place in full stays as it is. Knows nothing of MLflow beyond the form of its URIs.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bdh_mlflow.config.settings import Place

BUILT_IN = {"python-stdlib", "auto"}
"""Sources of text that are words."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
ACCEPTED = "http://HOST:PORT, https://..., sqlite:///FILE, postgresql://..., mysql://..., mssql://..., databricks or file:///FOLDER"
BUCKETS = "s3://BUCKET/PREFIX, gs://..., abfs://... or another URI that pyarrow opens"
_BUCKET = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_BRACED = re.compile(r"\$\{([^}]*)\}")
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_URI = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def absolute(text: str, base: Path, kind: Place = Place.PATH, *, expand: bool = True) -> str:
    """A place in full.   base: what relative ones are relative to.   expand: the text is as a user typed it.

    Raises ValueError with a reason.
    """
    if kind is Place.STORE:
        return store_uri(text, base, expand=expand)
    if kind is Place.SOURCE and text in BUILT_IN:
        return text
    if kind in (Place.DATA, Place.SOURCE) and is_bucket(text):
        return bucket_uri(text, expand=expand)
    if _URI.match(text):
        if not text.startswith("file:///"):
            raise ValueError(f"{text.partition(':')[0]}: is not a place on this machine; accepted: a path")
        return unquote(text.removeprefix("file://"))
    return str(base / (expanded(text, base) if expand else text))


def is_bucket(text: str) -> bool:
    """Whether a text names a place in a bucket, or at another store that pyarrow opens by a URI."""
    return _BUCKET.match(text) is not None and not text.lower().startswith("file:")


def bucket_uri(text: str, *, expand: bool = True) -> str:
    """The URI of a place in a bucket: `${NAME}` replaced, no slash at its end.   Raises ValueError for one that cannot be."""
    scheme, _, rest = (_filled(text.strip(), _BRACED) if expand else text.strip()).partition("://")
    rest = rest.rstrip("/")
    if scheme.lower() in ("http", "https", "ftp"):
        raise ValueError(f"{scheme}: no folder can be listed there; accepted: a path, or {BUCKETS}")
    if not rest.partition("?")[0]:
        raise ValueError(f"{scheme}:// names no bucket; accepted: a path, or {BUCKETS}")
    if scheme.lower() not in ("abfs", "abfss", "hf") and "@" in rest.partition("/")[0]:  # there `@` is no password
        raise ValueError(f"{scheme}://***: credentials in a URI would be logged; give them by the environment (AWS_ACCESS_KEY_ID, ...)")
    return f"{scheme}://{rest}"


def expanded(text: str, base: Path) -> str:
    """A path as a user typed it: `~`, `~user`, `$NAME` and `${NAME}` replaced by what they stand for, unless it exists as it is written.

    Raises ValueError for what stands for nothing.
    """
    if "\0" in text:
        raise ValueError("the character NUL has no place in a path")
    if os.path.lexists(base / text):
        return text
    filled = _filled(text, _VARIABLE)
    if not filled.startswith("~"):
        return filled
    try:
        return str(Path(filled).expanduser())
    except RuntimeError:
        user = filled.partition("/")[0]
        raise ValueError(f"{user} stands for no home folder; write the path in full (a folder of that name: ./{filled})") from None


def store_uri(text: str, base: Path, *, expand: bool = True) -> str:
    """The URI of a tracking store in full: no blanks around it, and no file relative to whoever reads it.   Raises ValueError.

    expand: replace `${NAME}`; a password may hold a dollar sign, so `$NAME` stays.
    """
    uri = _filled(text.strip(), _BRACED) if expand else text.strip()
    if uri in ("databricks", "databricks-uc"):
        return uri
    scheme, kind = _SCHEME.match(uri), scheme_of(uri)
    if kind == "file":
        rest = uri[len("file:") :]
        return uri if rest.startswith("/") and not rest.startswith("//~") else (base / expanded(rest.removeprefix("//"), base)).as_uri()
    try:
        of_a_server = kind not in ("http", "https") or (urlsplit(uri).hostname and urlsplit(uri).port != 0 and not re.search(r"\s", uri))
    except ValueError:
        of_a_server = False
    needs_slashes = kind in ("http", "https", *DATABASES)
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        raise ValueError(f"`{uri}` is no URI of a tracking store; did you mean http://{uri}?")
    if not scheme or not of_a_server or (needs_slashes and not uri[scheme.end() :].startswith("//")):
        found = f"`{scheme[0]}...`" if scheme else f"`{uri}`"  # behind a scheme there may be a password
        hint = f"; a folder is written {(base / uri).as_uri()}" if not scheme and uri else ""
        raise ValueError(f"{found} is no URI of a tracking store; accepted: {ACCEPTED}{hint}")
    return _sqlite(uri, base, expand=expand) if kind == "sqlite" else uri


def scheme_of(uri: str) -> str:
    """Scheme of a URI without the driver of a database, in lower case; empty if there is none."""
    found = _SCHEME.match(uri)
    return found[0][:-1].lower().partition("+")[0] if found else ""


def _filled(text: str, variables: re.Pattern[str]) -> str:
    def variable(found: re.Match[str]) -> str:
        name = next((group for group in found.groups() if group), "")
        if not name:
            raise ValueError(f"{found[0]} names no variable")
        if not (value := os.environ.get(name)):
            raise ValueError(f"{found[0]} stands for nothing: the environment has no variable {name}")
        return value

    return variables.sub(variable, text)


def _sqlite(uri: str, base: Path, *, expand: bool) -> str:
    head, slashes, rest = uri.partition(":///")
    file, mark, query = rest.partition("?")
    if not slashes or not file or file == ":memory:":
        raise ValueError(f"`{uri}` names no file: a database in memory is gone with its process; accepted: sqlite:///FILE")
    if file.startswith("/"):
        return f"{head}:///{_quoted(unquote(file))}{mark}{query}"  # one spelling, whoever has quoted more of it
    if expand and file.startswith("~"):
        return f"{head}:///{_quoted(expanded(file, base))}{mark}{query}"
    return f"{head}:///{_quoted(str(base))}/{file}{mark}{query}"


def _quoted(file: str) -> str:
    """SQLAlchemy decodes `%`, and ends the path at `?`."""
    return file.replace("%", "%25").replace("?", "%3F")
