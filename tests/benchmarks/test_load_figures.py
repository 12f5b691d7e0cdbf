"""What the load programs make of arrivals, data sets and paces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import workloads
from load.records import Record, Run, complain, figures, percentile, summary, write
from load.work import Pacing, Work, fixed_work, make_work, read_dataset


def run() -> Run:
    """Two requests of three tokens, begun together; the second one's first two tokens come in one arrival."""
    return Run(
        [Record(10, 1.0, [1.1, 1.2, 1.4], tokens=3), Record(20, 1.0, [1.3, 1.5], tokens=3, cached_tokens=16)], 0.5
    )


def test_figures_of_a_run() -> None:
    found = figures(run())
    assert found["requests_per_s"] == pytest.approx(4)
    assert found["output_tok_per_s"] == pytest.approx(12)
    assert found["input_tok_per_s"] == pytest.approx(60)
    assert [found[f"ftl_ms_{k}"] for k in ("min", "mean", "max")] == pytest.approx([100, 200, 300])
    assert found["tpot_ms_mean"] == pytest.approx((150 + 100) / 2)
    assert found["itl_ms_p50"] == pytest.approx(200)
    assert found["cached_tokens"] == 16
    assert figures(Run([Record(10, tokens=3)], 0.5))["tpot_ms_mean"] == 0  # of a target that shows no arrivals


def test_a_failed_request_adds_to_no_figure() -> None:
    whole = run()
    whole.records.append(Record(1000, 1.0, [1.1], tokens=1, error="500"))
    assert figures(whole) == {**figures(run()), "failed": 1}
    with pytest.raises(SystemExit, match="1 of 3 requests failed, the first: 500"):
        complain([whole])


def test_summary_is_over_repeats() -> None:
    slow = Run(run().records, 1.0)
    assert summary([run(), slow])["requests_per_s"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2}


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (75, 3.25), (100, 4)])
def test_percentiles_interpolate(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)


def test_the_file_tells_where_figures_come_from(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    write(path, machine={"device": "CPU"}, rows={"W3": [run()]}, more={"model": "demo"})
    found = json.loads(path.read_text())
    assert found["machine"] == {"device": "CPU"}
    assert found["versions"]["torch"] != "not installed"
    assert found["figures"]["W3"]["requests_per_s"]["median"] == pytest.approx(4)
    assert found["runs"]["W3"][0]["records"][0]["times"] == pytest.approx([0.1, 0.2, 0.4])


def test_arrivals_are_seeded_and_have_the_rate() -> None:
    assert Pacing().arrivals(3) == [0.0, 0.0, 0.0]
    times = Pacing(rate=50.0, seed=1).arrivals(2000)
    assert times == Pacing(rate=50.0, seed=1).arrivals(2000) != Pacing(rate=50.0, seed=2).arrivals(2000)
    assert times == sorted(times)
    assert 2000 / times[-1] == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize("name", list(workloads.ALL))
def test_divided_workloads_keep_their_shape(name: str) -> None:
    whole, small = workloads.ALL[name](1), make_work(name, rep=1, divide=4, vocab=1000)
    assert [len(w.prompt) for w in small] == [max(1, len(r["prompt"]) // 4) for r in whole]
    assert [w.out for w in small] == [max(1, r["out"] // 4) for r in whole]
    assert all(10 <= t < 990 for w in small for t in w.prompt)
    assert small != make_work(name, rep=2, divide=4, vocab=1000)
    if name == "W5":
        assert len({w.prompt[:256] for w in small}) == 1
        assert len({w.prompt for w in small}) == len(small)


def test_equal_lengths_are_the_mean() -> None:
    assert len({(len(w.prompt), w.out) for w in make_work("W3", rep=0, divide=4, vocab=1000, equal=True)}) == 1


def test_the_full_workload_is_the_peers() -> None:
    assert make_work("W1", rep=0, divide=1, vocab=workloads.VOCAB)[0].prompt == tuple(workloads.w1()[0]["prompt"])


def test_fixed_lengths() -> None:
    work = fixed_work(3, 5, 7, vocab=100, rep=0)
    assert [(len(w.prompt), w.out) for w in work] == [(5, 7)] * 3
    assert work != fixed_work(3, 5, 7, vocab=100, rep=1)


def encode(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_a_dataset_of_talks(tmp_path: Path) -> None:
    talks = [
        {"conversations": [{"value": "one two"}, {"value": "three four five"}, {"value": "more"}]},
        {"conversations": [{"value": "alone"}]},
        {"conversations": [{"value": "no answer"}, {"value": ""}]},
    ]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    assert read_dataset(path, encode) == [Work((3, 3), 3)]


def test_a_dataset_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "a bb", "out": 4}\n\n{"prompt": [5, 6], "out": 2}\n{"prompt": "c", "out": 1}\n')
    assert read_dataset(path, encode, limit=2) == [Work((1, 2), 4), Work((5, 6), 2)]
    path.write_text('{"prompt": "a", "out": 4}\n{"prompt": "a"}\n')
    with pytest.raises(SystemExit, match=r"lines.jsonl, line 2: not"):
        read_dataset(path, encode)
    path.write_text('{"prompt": "", "out": 4}\n')
    with pytest.raises(SystemExit, match="no request"):
        read_dataset(path, encode)
