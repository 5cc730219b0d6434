"""What is to be told, on disk before anyone is told: a line per record, appended, never changed.

The trainer appends and never waits; whoever delivers (see `delivery`) reads on from the offset it has acknowledged. A record is with the
operating system when `append` returns, so a killed process loses none. A folder holds one journal: `journal.jsonl`, and beside it
`journal.json`, what has been delivered. The folder waits under `checkpoints/.pending/` and becomes the run directory with the first
checkpoint; readers hold the folder itself, so they do not notice the move. Knows nothing of MLflow, and is told no secrets: see `masked`.
"""

import re

_USER_INFO = re.compile(r"(?<=://)([^\s/@:]*)(:[^\s/@]*)?@")
_SECRET_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|password|signature|credential|sig)[\w.-]*=)[^&\s\"']+")


def masked(text: str) -> str:
    """The text with the secrets of every URI in it replaced by stars: passwords, bare access tokens, signed query parameters."""

    def user_info(found: re.Match[str]) -> str:
        user, password = found[1], found[2]
        if password is not None:
            return f"{user}:***@"
        return found[0] if user in ("", "git") else "***@"

    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub(user_info, text))
