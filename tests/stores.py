"""What marks tests that need a team's stores (fixture `stores`)."""

import pytest

from scripts import team

needs_stores = [
    pytest.mark.slow,  # the stores start once for all tests of a worker that use them
    pytest.mark.skipif(team.missing() is not None, reason=f"a team's stores are not installed: {team.missing()}"),
]
