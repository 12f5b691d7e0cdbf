"""Profiles of hypothesis: `--hypothesis-profile=full` is for the tests that set no number of examples themselves."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("full", max_examples=2000)
