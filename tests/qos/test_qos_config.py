"""The configuration: LMDeploy's documented file, what each mistake in a file is answered, and the faults it once had.

Mutants seen to fail: `account` preferring the first default; duplicates not looked for; lines counted from 0.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.qos.config import QosConfig
from router.qos.file import load_qos_config, make_qos_config
from router.qos.source import parse_source
from workers.api.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "qos"


def of(text: str, *, as_json: bool = False) -> QosConfig:
    return make_qos_config(parse_source(text, "f", as_json=as_json))


def refused(text: str, *, as_json: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        of(text, as_json=as_json)
    return str(caught.value).splitlines()


def test_the_documented_sample() -> None:
    config = load_qos_config(CONFIGS / "tiers.json")
    assert [t.name for t in config.tiers] == ["Platinum", "Gold", "Silver", "Bronze"]
    assert config.account("user_id0").key == ("Platinum", "user_id0")
    assert (config.account("user_id3").tier.name, config.account("user_id3").quota) == ("Silver", 5)
    assert config.account("user_id6").quota == 40


def test_json_and_yaml_say_the_same() -> None:
    text = (CONFIGS / "tiers.json").read_text()
    assert of(text, as_json=True).accounts == of(text).accounts


def test_the_shipped_yaml() -> None:
    config = load_qos_config(CONFIGS / "floors.yaml")
    bronze = config.tiers[1]
    assert (bronze.min_share, bronze.max_wait, bronze.max_queued_per_user) == (0.02, 30, 100)


def test_fault_4_and_6_the_unlisted_belong_to_the_last_default_and_no_group_needs_one() -> None:
    config = load_qos_config(CONFIGS / "tiers.json")
    for user in ("nobody", "default", ""):
        assert config.account(user).key == ("Bronze", "default")
    assert config.account("nobody", tier="Silver").key == ("Silver", "default")
    assert config.account("nobody", tier="Silver").quota == 95
    assert config.account("nobody", tier="Gold").quota == 0  # Gold lists no default: what the others leave
    assert config.account("user_id1", tier="Platinum").tier.name == "Gold"  # an own line counts
    none = of("user_groups: [A, B]\nuser_group_map: {A: [{id: x, quota_pct: 0}]}")
    assert (none.account("nobody").tier.name, none.account("nobody").quota) == ("B", 0)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("user_groups: [A]\nusers: 3", 2, "users is not a setting"),
        ("enable_user_qos: true", 1, "user_groups is missing"),
        ("user_groups: []", 1, "at least 1 item"),
        ("user_groups:\n- A\n- B\n- A", 4, "listed twice"),
        ("user_groups: [A]\nuser_group_map:\n  A: []\n  B: []", 4, "'B' is not one of user_groups (A)"),
        ("user_groups: [A]\ntiers:\n  a: {}", 3, "'a' is not one of user_groups (A)"),
        ("user_groups: [A]\nuser_group_map:\n  A:\n  - id: x\n    quota_pct: -1", 5, "greater than or equal to 0"),
        ("user_groups: [A]\nuser_group_map:\n  A:\n  - id: x\n    quota_pct: .nan", 5, "finite"),
        ("user_groups: [A]\nuser_group_map:\n  A:\n  - id: x\n    quota_pct: '5'", 5, "valid number, found '5'"),
        ("user_groups: [A]\nuser_group_map:\n  A:\n  - id: x\n    quota_pct: true", 5, "valid number"),
        ("user_groups: [A]\nuser_group_map:\n  A:\n  - quota_pct: 5", 4, "id is missing"),
        ("user_groups: [A]\nuser_group_map:\n  A:\n  - id: ''\n    quota_pct: 5", 4, "at least 1 character"),
        (
            "user_groups: [A, B]\nuser_group_map:\n  A:\n  - {id: x, quota_pct: 1}\n  B:\n  - {id: x, quota_pct: 1}",
            6,
            "'x' is in A already: a user has one tier",
        ),
        ("user_groups: [A]\nuser_group_map:\n  A:\n  - {id: x, quota_pct: 1}\n  - {id: x, quota_pct: 2}", 5, "twice"),
        ("user_groups: [A]\ntiers:\n  A:\n    min_share: 0.6", 4, "less than or equal to 0.5"),
        ("user_groups: [A, B]\ntiers:\n  A: {min_share: 0.4}\n  B: {min_share: 0.2}", 2, "sums to 0.6"),
        ("user_groups: [A]\ntiers:\n  A:\n    max_wait: 0", 4, "greater than 0"),
        ("user_groups: [A]\ntiers:\n  A:\n    max_queued_per_user: 0", 4, "greater than or equal to 1"),
        ("user_groups: [A, B]\ntau: -1", 2, "greater than or equal to 0"),
        ("user_groups: [A, B]\n\ntau: 11", 3, "less than or equal to 10"),
        ("user_groups: [A, B]\ntau: 18ms", 2, "valid number, found '18ms'"),
        ("user_groups: [A, B]\ntau: .inf", 2, "finite"),
        ("user_groups: [A]\ntau: 0.01", 2, "'A' is the only tier"),
        ("user_groups: [A, B]\ntiers:\n  A:\n    itl_target: 0", 4, "greater than 0"),
        ("user_groups: [A, B]\ntiers:\n  A: {}\n  B:\n    itl_target: 0.1", 5, "nobody is below 'B'"),
        ("user_groups: [A]\ntiers:\n  A: {}\nuser_groups: [B]", 4, "stands on line 1 already"),
        ("user_groups: [A\n", 2, "not YAML"),
        ("user_groups: &a [A]\nuser_group_map: *a", 1, "alias"),
        ("[1, 2]", 1, "the file"),
        ("", 1, "the file"),
    ],
)
def test_each_mistake_has_its_line_and_says_what_to_do(text: str, line: int, says: str) -> None:
    problems = refused(text)
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"f:{line}: ")
    assert says in problems[0]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"user_groups": ["A"],\n}', 2, "not JSON"),
        ('{"user_groups": ["A"],\n\t"user_groups": ["B"]}', 2, "stands on line 1 already"),
        ('{"user_groups": ["A"],\n\t"user_group_map": {"A":\n\t[{"id": "x", "quota_pct": -1}]}}', 3, "quota_pct"),
        ('{"user_groups": ["A"], "user_group_map": {"A": [{"id": "x", "quota_pct": NaN}]}}', 1, "NaN"),
        ('{"user_groups": ["A"], "user_group_map": {"A": [{"id": "x", "quota_pct": 1e999}]}}', 1, "finite"),
        ("[" * 100_000, 1, "too deep"),
        ("[" * 50 + "]" * 50, 1, "too deep"),
    ],
)
def test_json_too(text: str, line: int, says: str) -> None:
    problems = refused(text, as_json=True)
    assert problems[0].startswith(f"f:{line}: ")
    assert says in problems[0]


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    text = "user_groups: [A]\nx: 1\nuser_group_map:\n  A:\n  - {id: a}\n  - {quota_pct: 1}\ny: 2"
    assert [int(p.split(":")[1]) for p in refused(text)] == [2, 5, 6, 7]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_qos_config(tmp_path / "none.json")
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"user_groups: [A]\n# \xff")
    with pytest.raises(ConfigError, match=r"bad.yaml:2: byte 19 is not UTF-8"):
        load_qos_config(bad)
    bad.write_bytes(b" " * (5 << 20))
    with pytest.raises(ConfigError, match="MiB"):
        load_qos_config(bad)


def test_it_can_be_explained() -> None:
    text = "\n".join(load_qos_config(CONFIGS / "tiers.json").explain())
    assert "Gold: after Platinum" in text
    assert "user_id3: 5.0%" in text
    assert "users without a line, together: what the others leave (all unlisted users)" in text
    assert "at least 2.0%" in "\n".join(load_qos_config(CONFIGS / "floors.yaml").explain())
    assert of("user_groups: [A]\nenable_user_qos: false").explain() == [
        "enable_user_qos is false: first come, first served"
    ]


def test_what_lower_tiers_may_add_to_a_step() -> None:
    assert load_qos_config(CONFIGS / "tiers.json").tau == 0.018
    config = of("user_groups: [A, B, C]\ntau: 0.01\ntiers: {B: {itl_target: 0.04}}")
    assert (config.tau, [t.itl_target for t in config.tiers]) == (0.01, [None, 0.04, None])
    top, middle, _ = config.tiers
    assert top.spare(0.03) == float("inf")
    assert middle.spare(0.02) == pytest.approx(0.016)  # up to a tenth below the target
    assert middle.spare(0.1) == pytest.approx(0.03)  # or, where it is beyond it by itself, 30 % more
    lines = config.explain()
    assert lines[0] == "lower tiers add at most 10 ms to a step in which a higher one has work"
    assert [line for line in lines if "its steps are filled up to 36 ms" in line] == [lines[2]]
    assert "at most 18 ms" in load_qos_config(CONFIGS / "tiers.json").explain()[0]


LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=8)
JSON = st.recursive(LEAVES, lambda c: st.lists(c) | st.dictionaries(st.text(max_size=8), c), max_leaves=12)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.fixed_dictionaries({"user_groups": JSON | st.just(["A"])}, optional={"user_group_map": JSON, "tiers": JSON}))
def test_whatever_the_file_says_it_is_taken_or_refused_with_lines(value: object) -> None:
    try:
        of(json.dumps(value, indent=1), as_json=True)
        problems = []
    except ConfigError as e:
        problems = str(e).splitlines()
    assert all(p.startswith("f:") for p in problems)
