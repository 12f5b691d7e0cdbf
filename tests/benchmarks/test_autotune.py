"""The search for a tuning table with times that are made up: what it takes, what it leaves out, what it writes."""

from __future__ import annotations

import json
from functools import partial

import autotune
import pytest
import torch
from autotune import Found, render, search, table_of, try_some
from tuning_cases import Arena, Case, HeadShape, decode_case, gemv_case, prefill_case
from tuning_entries import Entry, all_entries, as_json

from kernels.tuning import GemvTuning, make_table

DEFAULT, FAST, FASTER, WRONG, BROKEN = (
    GemvTuning(rows, warps) for rows, warps in ((1, 8), (2, 8), (4, 8), (1, 4), (1, 1))
)
SECONDS = {DEFAULT: (1e-5, 1e-5), FAST: (8e-6, 8e-6), FASTER: (4e-6, 1.2e-5), WRONG: (1e-6, 1e-6)}


def run(value: float, tuning: GemvTuning) -> torch.Tensor:
    if tuning == BROKEN:
        raise MemoryError("shared memory\nof which there is less")
    return torch.full((1, 2), value + (tuning == WRONG))


def made_up(candidates: tuple[GemvTuning, ...]) -> Entry:
    def cases(_arena: object) -> list[Case]:
        return [Case(f"case {i}", [partial(run, i)], torch.full((1, 2), float(i)), 1e-3, 1e6) for i in range(2)]

    return Entry("gemv 6 x 4", "gemv", {"outputs": 6, "inputs": 4}, None, candidates, cases)


def measure(case: Case, tuning: GemvTuning) -> tuple[float, torch.Tensor]:
    return SECONDS[tuning][int(case.name[-1])], case.launches[-1](tuning)


def test_the_best_over_all_cases_is_taken_and_what_is_wrong_or_fails_is_not():
    entry, found = made_up((DEFAULT, WRONG, BROKEN, FASTER, FAST)), Found()
    try_some(entry, found, entry.candidates, None, measure)
    assert found.best(DEFAULT) == FASTER  # 0.4 and 1.2 against 0.8 and 0.8
    assert found.tried.keys() == {DEFAULT, FAST, FASTER}
    assert found.skipped[BROKEN] == "MemoryError: shared memory"
    assert "wrong at case 0" in found.skipped[WRONG]


def test_the_default_stays_for_what_is_hardly_faster():
    found = Found(tried={DEFAULT: [1.0], FAST: [0.985]})
    assert found.best(DEFAULT) == DEFAULT
    found.tried[FASTER] = [0.97]
    assert found.best(DEFAULT) == FASTER


def test_a_wrong_default_ends_the_search():
    with pytest.raises(RuntimeError, match="default fails"):
        try_some(made_up((WRONG, DEFAULT)), Found(), (WRONG, DEFAULT), None, measure)


def test_rounds_go_over_all_entries_and_every_write_is_a_whole_table(capsys):
    entries = [made_up((DEFAULT, FAST, FASTER)), *all_entries()]
    few = entries[:1] * 2
    written, calls = [], iter([False] * 1 + [True])

    def write(found: list[Found]) -> None:
        content = json.loads(render(table_of(entries, [*found, *(Found() for _ in entries[len(found) :])], {})))
        written.append((content, make_table(content)))

    found = search(few, None, measure, write, lambda: next(calls))
    assert [len(one.tried) for one in found] == [3, 0]
    ((content, table),) = written
    assert table.gemv[6, 4] == FASTER
    tried = next(one for one in content["gemv"] if one["outputs"] == 6)
    assert tried["microseconds"] == {"case 0": [4.0, 10.0], "case 1": [12.0, 10.0]}
    for entry in entries[1:]:  # untouched: the defaults
        if entry.operation == "gemv":
            assert table.gemv[tuple(entry.key.values())] == entry.default
        else:
            place = {"decode": table.decode, "prefill": table.prefill}[entry.operation]
            bits, *rest = entry.key.values()
            steps = place[bits // 8, *rest]
            assert steps.at((entry.below or 1 << 30) - 1) == entry.default
    assert as_json(FASTER) == {"rows": 4, "warps": 8}
    assert "0.693" in capsys.readouterr().out


def test_a_run_writes_the_table_of_what_is_asked_for(tmp_path, monkeypatch, capsys):
    entries = [made_up((DEFAULT, FAST)), *all_entries()]
    for name, value in {
        **{"DEVICE": torch.device("cpu"), "ARENA_ELEMENTS": 1, "all_entries": lambda: entries, "replayed": measure},
        "measure_ceilings": lambda: {"copy_GB_per_s": 3.4},
    }.items():
        monkeypatch.setattr(autotune, name, value)
    monkeypatch.setattr(autotune, "print_library", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100")
    compared = []
    monkeypatch.setattr(autotune.torch_attention, "compare", compared.append)
    monkeypatch.setattr("sys.argv", ["autotune.py", "--out", str(tmp_path / "h100.json"), "--only", "gemv 6 x 4"])
    autotune.main()
    content = json.loads((tmp_path / "h100.json").read_text())
    assert (content["device"], content["ceilings"]) == ("NVIDIA H100", {"copy_GB_per_s": 3})
    assert make_table(content).gemv[6, 4] == FAST
    assert len(content["gemv"]) == sum(entry.operation == "gemv" for entry in entries)
    assert len(compared) == 1
    assert "1 of 1 entries differ from their defaults" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make",
    [
        lambda arena: decode_case(arena, HeadShape(6, 2, 16), 5, 30, True),
        lambda arena: prefill_case(arena, HeadShape(6, 2, 16), 3, 20, 7, 64),
        lambda arena: gemv_case(arena, 24, 40),
    ],
)
def test_a_case_gives_what_it_expects_whatever_the_launch(make, monkeypatch):
    """On the CPU launches are references in the arena's dtype; the last one's memory is what was expected of."""
    monkeypatch.setattr("tuning_cases.COLD_BYTES", 1 << 16)
    case = make(Arena(torch.device("cpu"), 1 << 18))
    assert len(case.launches) > 1
    case.check(case.launches[-1](None))
    with pytest.raises(AssertionError):
        case.check(case.launches[0](None))
