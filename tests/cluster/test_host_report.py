"""What of several hosts does not go together, and how it is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster.doctor import Finding
from cluster.edge import EdgeSettings
from cluster.host_report import HostReport, digest, doubts_of, faults_of, report_of_this_host

VERSIONS = {"python": "3.11.7", "echelon": "0.1.0", "ray": "2.60.0", "torch": "2.11.0", "transformers": "5.1.0"}


def host(number: int, **changes: object) -> HostReport:
    report = HostReport(f"10.0.0.{number}", VERSIONS, (Finding(True, "well"),), clock=0.0, token=True, edge=digest("s"))
    return dataclasses.replace(report, **changes)


def test_equal_hosts_have_no_fault() -> None:
    assert faults_of([host(1), host(2), host(3)]) == []
    assert faults_of([host(1), host(2, versions=VERSIONS | {"torch": "2.11.1", "python": "3.11.9"})]) == []
    assert doubts_of([host(1), host(2, skew=4.0)]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"versions": VERSIONS | {"ray": "2.60.1"}},
            "not the same ray everywhere: 2.60.0 on 10.0.0.1 10.0.0.3, 2.60.1",
        ),
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "2.11 on 10.0.0.1 10.0.0.3, 2.12 on 10.0.0.2"),
        ({"versions": VERSIONS | {"python": "3.12.1"}}, "not the same python"),
        ({"findings": (Finding(False, "/dev/shm is small"),)}, "10.0.0.2: /dev/shm is small"),
        ({"token": False}, "asks for no token on 10.0.0.2"),
        ({"edge": ""}, "10.0.0.2 not at all"),
        ({"edge": digest("another token")}, "not every host was made ready"),
    ],
    ids=["ray", "torch", "python", "finding", "token", "edge", "other-token"],
)
def test_what_differs_is_named_with_its_host(changes: dict[str, object], said: str) -> None:
    (fault,) = faults_of([host(1), host(2, **changes), host(3)])
    assert said in fault


def test_a_clock_that_is_off_is_a_doubt() -> None:
    (doubt,) = doubts_of([host(1), host(2, skew=-90.0)])
    assert "10.0.0.2 is 90 s behind" in doubt


def test_a_host_shows_a_digest_of_its_edge_and_never_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ECHELON_EDGE", raising=False)
    assert report_of_this_host("here").edge == ""
    path = tmp_path / "edge.json"
    monkeypatch.setenv("ECHELON_EDGE", str(path))
    assert report_of_this_host("here").edge == ""
    EdgeSettings("the secret", "0.0.0.0", 1, 1, 1.0, 1.0, 1.0, 1.0).write(path)
    report = report_of_this_host("here")
    assert report.edge == digest("the secret")
    assert "the secret" not in str(dataclasses.asdict(report))
    assert set(report.versions) == set(VERSIONS)
