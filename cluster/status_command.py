"""`echelon status`: a look at the Echelon of a Ray cluster, from any of its hosts."""

from __future__ import annotations

import ray

from cluster.app import join_ray
from cluster.names import DISPATCHER, NAMESPACE
from cluster.room import nodes_with_room, rank_homes, waiting_replicas
from cluster.status_view import ClusterView, view_of
from workers.api.errors import EchelonError

ANSWER_SECONDS = 10.0


def look_at(address: str) -> ClusterView:
    """The view of the Echelon in the Ray cluster at `address`. Raises EchelonError where there is none."""
    join_ray(address)
    try:
        dispatcher = ray.get_actor(DISPATCHER, namespace=NAMESPACE)
        asked = [dispatcher.status.remote(), dispatcher.clients.remote()]
        table, fronts = ray.get(asked, timeout=ANSWER_SECONDS)
        nodes = nodes_with_room()
        return view_of(table, nodes, rank_homes(), fronts=fronts, unplaced=waiting_replicas())
    except ValueError as e:
        raise EchelonError(f"no Echelon runs in the Ray cluster at {address}") from e
    except ray.exceptions.RayError as e:
        raise EchelonError(f"the dispatcher does not answer: {e}") from e
    finally:
        ray.shutdown()
