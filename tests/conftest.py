"""Profiles of hypothesis, and loggers as a new process has them.

`--hypothesis-profile=full` is for the tests that set no number of examples themselves.
"""

from __future__ import annotations

import logging

import pytest
from hypothesis import settings

settings.register_profile("full", max_examples=2000)


@pytest.fixture(autouse=True)
def plain_loggers() -> None:
    """Servers and pipelines that an earlier test ran in this process set up our loggers: `caplog` would see nothing."""
    ours = logging.getLogger("echelon")
    ours.handlers.clear()
    ours.setLevel(logging.NOTSET)
    ours.propagate = True
