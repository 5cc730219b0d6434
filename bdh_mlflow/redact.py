"""Masking of secrets in text that leaves the process: journal, tags, artifacts, messages. Imports no other module of the package."""

import re

_USER_INFO = re.compile(r"(?<=://)([^\s/@:]*)(:(?:[^\s/\"']*|(?!\d+/)[^\s@\"']*))?@")
"""A password may hold `@`, and `/` where it cannot begin with a port."""
_SECRET_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|password|signature|credential|sig)[\w.-]*=)[^&\s\"']+")


def masked(text: str) -> str:
    """The text with the secrets of every URI in it replaced by stars: passwords, bare access tokens, signed query parameters."""

    def user_info(found: re.Match[str]) -> str:
        user, password = found[1], found[2]
        if password is not None:
            return f"{user}:***@"
        return found[0] if user in ("", "git") else "***@"

    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub(user_info, text))
