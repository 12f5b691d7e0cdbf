"""A recorded trace under another configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from simulation import what_if

from workers.api.errors import ConfigError

QOS = {
    "user_groups": ["Gold", "Bronze"],
    "user_group_map": {"Gold": [{"id": "vip", "quota_pct": 100}], "Bronze": [{"id": "default", "quota_pct": 100}]},
}


def recorded(path: Path) -> Path:
    rng = random.Random(0)
    lines = []
    for i in range(40):
        user = "vip" if i % 10 == 0 else f"u{i % 3}"
        line = {"at": i * 0.01, "user": user, "prompt": rng.randint(700, 1500), "output": rng.randint(5, 20)}
        lines.append(json.dumps(line | ({"prefix": "ab12", "prefix_tokens": 512} if i % 2 else {})))
    path.write_text("\n".join(reversed(lines)) + "\n\n")
    return path


def test_tiers_come_first_and_more_replicas_are_quicker(tmp_path: Path) -> None:
    trace, qos = recorded(tmp_path / "trace.jsonl"), tmp_path / "tiers.json"
    qos.write_text(json.dumps(QOS))
    rows = what_if.run(trace, qos=qos, replicas=[1, 2], slots=8, pool=30_000)
    assert [(r.replicas, r.tier, r.requests, r.refused) for r in rows] == [
        (1, "Gold", 4, 0), (1, "Bronze", 36, 0), (2, "Gold", 4, 0), (2, "Bronze", 36, 0),
    ]  # fmt: skip
    assert rows[0].ttft < 0.3 * rows[1].ttft
    assert rows[3].ttft < rows[1].ttft
    (alone,) = what_if.run(trace, qos=None, replicas=[1], slots=8, pool=30_000)
    assert (alone.tier, alone.requests) == ("all", 40)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"at": 0, "user": "a", "prompt": 10}', "output"),
        ('{"at": 0, "user": "a", "prompt": 0, "output": 1}', "prompt"),
        ('{"at": 0, "user": "a", "prompt": 5, "output": 1, "text": "hi"}', "text"),
        ('{"at": 0, "user": "a", "prompt": 5, "output": 1, "prefix_tokens": 6}', "more than the prompt"),
        ("{", "Expecting"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at": 0, "user": "a", "prompt": 5, "output": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"trace\.jsonl:2: ") as caught:
        what_if.read(trace)
    assert said in str(caught.value)
