"""Secrets in text that leaves the process."""

import pytest

from bdh_mlflow.redact import masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see s3://k:pw@h/x and https://u:p%40q@h ok", "see s3://k:***@h/x and https://u:***@h ok"),
        ("--set tracking.tracking_uri=http://me:secret@host", "--set tracking.tracking_uri=http://me:***@host"),
        ("pkg @ git+https://ghp_abc@github.com/x", "pkg @ git+https://***@github.com/x"),
        ("git+ssh://git@github.com/x", "git+ssh://git@github.com/x"),
        ("https://h/x?sig=abc&a=1&api_key=z", "https://h/x?sig=***&a=1&api_key=***"),
        ("postgresql://u:a/b@h/db", "postgresql://u:***@h/db"),
        ("https://u:p@ss@h/x", "https://u:***@h/x"),
        ("http://127.0.0.1:5000/#/experiments/1?q=a@b", "http://127.0.0.1:5000/#/experiments/1?q=a@b"),
        ('{"a": "http://u:p@h","b": "x@y"}', '{"a": "http://u:***@h","b": "x@y"}'),
        ("no uri: a@b", "no uri: a@b"),
    ],
)
def test_secrets_of_uris_are_masked_wherever_they_stand(text: str, shown: str) -> None:
    assert masked(text) == shown
