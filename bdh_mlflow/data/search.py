"""Search in a folder of parquet files: which documents hold a pattern, how often, and what stands around it; by pyarrow's own kernels."""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import first_line, shown


class Hit(NamedTuple):
    """The first place in a document.   before, after: text around the match.   times: matches in the document."""

    file: str
    row: int
    before: str
    match: str
    after: str
    times: int


class Found(NamedTuple):
    """In one row group.   documents: searched.   matching: those that hold the pattern.   times: matches in all.   hits: the first few."""

    file: str
    documents: int
    matching: int
    times: int
    hits: list[Hit]


class Pattern(NamedTuple):
    """A regular expression (RE2).   context: bytes shown on either side of a match."""

    text: str
    ignore_case: bool
    context: int


def search(text: ParquetText, pattern: Pattern, most_hits: int) -> Iterator[Found]:
    """What each row group holds, in the order of the files.   most_hits: shown of all. Raises DataError for what is no pattern."""
    left = most_hits
    for group in text.row_groups:
        name = shown(text.files[group.file])
        documents = text.read_documents(group)
        try:
            matching = pc.fill_null(pc.match_substring_regex(documents, pattern.text, ignore_case=pattern.ignore_case), False)
            chosen = documents.filter(matching)
            counts = pc.count_substring_regex(chosen, pattern.text, ignore_case=pattern.ignore_case)
        except pa.ArrowInvalid as error:
            raise DataError(f"{pattern.text}: not a regular expression that RE2 takes: {first_line(error)}") from None
        rows = pc.indices_nonzero(matching).slice(0, left)
        each = zip(rows.to_pylist(), chosen.slice(0, left).to_pylist(), counts.slice(0, left).to_pylist(), strict=True)
        hits = [_hit(Hit(name, group.first_row + row, "", "", "", times), document, pattern) for row, document, times in each]
        left -= len(hits)
        yield Found(name, len(documents), len(chosen), pc.sum(counts).as_py() or 0, hits)


def _hit(hit: Hit, document: bytes, pattern: Pattern) -> Hit:
    """The same with the first match and what stands around it."""
    alone = pa.array([document], pa.binary())
    start = pc.find_substring_regex(alone, pattern.text, ignore_case=pattern.ignore_case)[0].as_py()
    flag = "(?i)" * pattern.ignore_case
    without = pc.replace_substring_regex(alone, f"{flag}{pattern.text}", "", max_replacements=1)[0].as_py()
    end = start + len(document) - len(without)
    before, match, after = document[max(0, start - pattern.context) : start], document[start:end], document[end : end + pattern.context]
    return hit._replace(before=_text(before), match=_text(match), after=_text(after))


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
