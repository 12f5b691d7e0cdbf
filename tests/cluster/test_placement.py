"""Where replicas go, and what is said of those that fit nowhere."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import ONE_NODE, SEVERAL_NODES, Demand, Node, explain, plan, ranks_by_node


def node(number: int, gpus: float, cpus: float = 8, *, used: float = 0) -> Node:
    total = {"CPU": cpus, "GPU": gpus}
    return Node(f"n{number}", f"10.0.0.{number}", {"CPU": cpus, "GPU": gpus - used}, total)


def gang(name: str, ranks: int) -> Demand:
    return Demand(name, ({"CPU": 1.0, "GPU": 1.0},) * ranks)


def test_replicas_spread_over_nodes_and_ranks_stay_together() -> None:
    made = plan([gang(f"r{i}", 2) for i in range(4)], [node(1, 4), node(2, 4)])
    assert [one.nodes for one in made.placed] == [
        ("10.0.0.1", "10.0.0.1"), ("10.0.0.2", "10.0.0.2"), ("10.0.0.1", "10.0.0.1"), ("10.0.0.2", "10.0.0.2"),
    ]  # fmt: skip
    assert (made.strategy(""), made.refused, made.warnings) == (ONE_NODE, (), ())
    assert made.most_on_a_node() == 4


def test_a_replica_is_put_where_it_is_whole_before_another_is_split() -> None:
    """Three free cards on each of two nodes: two replicas of two ranks stay whole, the third gets what is left."""
    made = plan([gang(f"r{i}", 2) for i in range(3)], [node(1, 3), node(2, 3)])
    assert sorted(one.spread for one in made.placed) == [False, False, True]
    assert made.strategy("") == SEVERAL_NODES
    assert made.warnings == (
        "r2 is spread over 10.0.0.1, 10.0.0.2: its 2 ranks need 2 CPU, 2 GPU, and no node has that much free",
    )


def test_a_replica_larger_than_any_node_says_so() -> None:
    made = plan([gang("big", 4)], [node(1, 1), node(2, 3)])
    assert made.placed[0].nodes == ("10.0.0.2", "10.0.0.2", "10.0.0.2", "10.0.0.1")
    assert made.warnings == (
        "big is spread over 10.0.0.2, 10.0.0.1: its 4 ranks need 4 CPU, 4 GPU, more than any node has "
        "(10.0.0.1 has 8 CPU, 1 GPU; 10.0.0.2 has 8 CPU, 3 GPU)",
    )


def test_what_does_not_fit_is_named_with_what_each_node_lacks() -> None:
    made = plan([gang("a", 2), gang("b", 2)], [node(1, 2), node(2, 2, cpus=0.5), node(3, 1, used=0.5)])
    assert [one.name for one in made.placed] == ["a"]
    assert made.refused == (
        "b cannot be placed: bundle 0 of 2 (1 CPU, 1 GPU) fits on no node: 10.0.0.1 lacks 1 GPU (0 of 2 free); "
        "10.0.0.2 lacks 0.5 CPU (0.5 of 0.5 free); 10.0.0.3 lacks 0.5 GPU (0.5 of 1 free)",
    )


def test_what_does_not_fit_takes_no_room_from_others() -> None:
    made = plan([gang("large", 3), gang("small", 2)], [node(1, 1), node(2, 1)])
    assert [one.name for one in made.placed] == ["small"]
    assert len(made.refused) == 1
    assert made.refused[0].endswith(
        "bundle 2 of 3 (1 CPU, 1 GPU) fits on no node beside the 2 before it: "
        "10.0.0.1 lacks 1 GPU (0 of 1 free); 10.0.0.2 lacks 1 GPU (0 of 1 free)"
    )


def test_without_nodes_nothing_is_placed() -> None:
    assert plan([gang("a", 1)], []).refused == (
        "a cannot be placed: bundle 0 of 1 (1 CPU, 1 GPU) fits on no node: there is none",
    )


def test_a_waiting_group_is_explained_by_its_strategy() -> None:
    nodes = [node(1, 1), node(2, 1)]
    pair = gang("a", 2).bundles
    assert explain(pair, SEVERAL_NODES, nodes) is None
    assert explain(pair, ONE_NODE, nodes) == (
        "no node has room for all of its 2 ranks, 2 CPU, 2 GPU: 10.0.0.1 lacks 1 GPU (1 of 1 free); "
        "10.0.0.2 lacks 1 GPU (1 of 1 free)"
    )
    assert explain(pair, ONE_NODE, [*nodes, node(3, 2)]) is None
    text = explain(gang("a", 3).bundles, SEVERAL_NODES, nodes)
    assert text is not None
    assert text.startswith("bundle 2 of 3 ")


def test_ranks_of_a_node_are_neighbours_and_the_first_bundle_is_rank_0() -> None:
    assert ranks_by_node({0: "b", 1: "a", 2: "b", 3: "a"}) == [0, 2, 1, 3]
    assert ranks_by_node({0: "a"}) == [0]


@given(st.lists(st.integers(1, 5), max_size=6), st.lists(st.integers(0, 5), max_size=5))
@settings(max_examples=60, deadline=None)
def test_no_node_is_given_more_than_it_has(ranks: list[int], gpus: list[int]) -> None:
    nodes = [node(i, count) for i, count in enumerate(gpus)]
    made = plan([gang(f"r{i}", n) for i, n in enumerate(ranks)], nodes)
    assert len(made.placed) + len(made.refused) == len(ranks)
    for one in nodes:
        assert sum(placed.nodes.count(one.address) for placed in made.placed) <= one.free["GPU"]
    room = sum(gpus) - sum(len(placed.nodes) for placed in made.placed)
    sizes = {f"r{i}": n for i, n in enumerate(ranks)}
    for text in made.refused:
        assert sizes[text.split()[0]] > room, (text, room)
