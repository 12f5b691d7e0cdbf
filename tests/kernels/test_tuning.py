"""Tables of tunings: look-ups, what is not in a table, and that every table that is shipped is whole."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from tuning_entries import all_entries

from kernels import tuning
from kernels.tuning import (
    TABLES,
    DecodeTuning,
    GemvTuning,
    PrefillTuning,
    Steps,
    default_decode,
    default_prefill,
    find_table,
    make_table,
    table_of,
)

SHARED_BYTES = 232_448  # that a program may have on Hopper
SMALL = {
    "decode": [
        {
            **{"bits": 16, "head_size": 128, "group": 4},
            "steps": [
                {"below": 16, "tuning": {"tile": 32, "warps": 2, "stages": 3, "tail": True, "least": 1, "programs": 8}},
                {"below": None, "tuning": {"tile": 64, "warps": 4, "stages": 2, "tail": False}, "microseconds": {}},
            ],
        }
    ],
    "prefill": [],
    "gemv": [{"outputs": 6144, "inputs": 4096, "tuning": {"rows": 2, "warps": 4}}],
}


@pytest.mark.parametrize(("programs", "tile"), [(1, 32), (15, 32), (16, 64), (100_000, 64)])
def test_a_step_reaches_up_to_its_bound(programs, tile):
    assert make_table(SMALL).decode[2, 128, 4].at(programs).tile == tile


def test_what_a_table_lacks_has_the_defaults():
    table = make_table(SMALL)
    assert table.gemv[6144, 4096] == GemvTuning(2, 4)
    assert table.gemv[4096, 4096] == GemvTuning(1, 8)
    assert table.decode[4, 128, 4] == default_decode(4, 128, 4)
    assert table.decode[2, 128, 8] == default_decode(2, 128, 8)
    assert table.prefill[2, 128, 4] is table.prefill[2, 128, 4] == default_prefill(2, 128, 4)


@pytest.mark.parametrize(
    ("programs", "wanted"),
    [
        (255, DecodeTuning(64, 4, 3, True)),
        (256, DecodeTuning(64, 4, 2, False, 8)),
        (2047, DecodeTuning(64, 4, 2, False, 8)),
        (2048, DecodeTuning(64, 4, 2, False, 8, 0)),
    ],
)
def test_default_of_decode(programs, wanted):
    assert default_decode(2, 128, 4).at(programs) == wanted


def test_default_of_prefill():
    steps = default_prefill(2, 128, 4)
    assert [steps.at(n).rows for n in (1, 1024, 1025, 8000)] == [128, 128, 256, 256]
    assert default_prefill(4, 64, 1).at(5000) == PrefillTuning(32, 32, 4, 2)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100.json"),
        ("NVIDIA H100-SXM", "h100.json"),
        ("NVIDIA H200", "h200.json"),
        ("NVIDIA H1000", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_the_table_of_a_device_is_found_by_a_word_of_its_name(tmp_path, name, found):
    for file in ("h100.json", "h200.json"):
        (tmp_path / file).write_text("{}")
    assert find_table(name, tmp_path) == (tmp_path / found if found else None)


def test_a_device_has_one_table_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU 7")
    monkeypatch.setattr(tuning, "find_table", lambda _name: tmp_path / "gpu.json")
    (tmp_path / "gpu.json").write_text(json.dumps(SMALL))
    first = table_of.__wrapped__(torch.device("cuda", 0))
    assert first.gemv[6144, 4096] == GemvTuning(2, 4)
    assert table_of(torch.device("cpu")) is table_of(torch.device("cpu"))
    assert table_of(torch.device("cpu")).gemv[6144, 4096] == GemvTuning()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DecodeTuning(48, 4, 2, True),
        lambda: DecodeTuning(64, 3, 2, True),
        lambda: DecodeTuning(64, 4, 2, True, least=0),
        lambda: PrefillTuning(8, 64, 4, 2),
        lambda: PrefillTuning(128, 64, 4, 0),
        lambda: GemvTuning(3, 8),
        lambda: Steps((16, 16), (GemvTuning(),) * 3),
        lambda: Steps((16,), (GemvTuning(),)),
        lambda: make_table({**SMALL, "decode": [{**SMALL["decode"][0], "bits": 8}]}),
        lambda: make_table({**SMALL, "decode": [{**SMALL["decode"][0], "steps": SMALL["decode"][0]["steps"][:1]}]}),
    ],
)
def test_what_cannot_be_launched_is_refused(make):
    with pytest.raises(ValueError, match="no launch"):
        make()


def shipped() -> list[str]:
    return sorted(path.name for path in TABLES.glob("*.json"))


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_table_is_whole(name):
    content = json.loads((TABLES / name).read_text())
    assert find_table(content["device"]) == TABLES / name
    assert {"torch", "triton", "ceilings"} <= content.keys()
    table = make_table(content)
    entries = all_entries()
    for operation in ("decode", "prefill", "gemv"):
        wanted = [entry for entry in entries if entry.operation == operation]
        names = list(dict.fromkeys(tuple(entry.key.values()) for entry in wanted))
        known = {tuple(one[field] for field in wanted[0].key): one for one in content[operation]}
        assert sorted(known) == sorted(names), operation
        for key, one in known.items():
            bounds = [entry.below for entry in wanted if tuple(entry.key.values()) == key]
            assert operation == "gemv" or sorted(step["below"] or 1 << 40 for step in one["steps"]) == sorted(
                below or 1 << 40 for below in bounds
            )
    for (itemsize, head_size, group), steps in table.decode.items():
        for cut in steps.tunings:
            # Keys and values of all stages but that of the block tables.
            assert 2 * itemsize * head_size * cut.tile * max(1, cut.stages - 1) <= SHARED_BYTES, (group, cut)
    for (itemsize, head_size, group), steps in table.prefill.items():
        for wide in steps.tunings:
            assert wide.rows >= group
            assert itemsize * head_size * (wide.rows + 2 * wide.tile) <= SHARED_BYTES, wide


def test_entries_reach_every_number():
    """Steps of a shape follow each other without a gap and end without a bound, from the least batch there is."""
    by_key: dict[object, list[int | None]] = {}
    for entry in all_entries():
        if entry.operation != "gemv":
            by_key.setdefault((entry.operation, *entry.key.values()), []).append(entry.below)
    assert len(by_key) == 10
    for bounds in by_key.values():
        ordered = sorted(bounds, key=lambda below: below or 1 << 40)
        assert ordered[-1] is None
        assert all(a < b for a, b in pairwise(ordered[:-1]))
