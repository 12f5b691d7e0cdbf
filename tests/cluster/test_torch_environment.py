"""What a rank sets before torch is loaded."""

from __future__ import annotations

import os

import pytest

from cluster.environment import prepare_torch

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "1000"}, None)],
    ids=["nothing", "a policy", "a count"],
)
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], policy: str | None
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # it is restored afterwards, whatever prepare_torch does
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_torch()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
