"""One rank as a Ray actor: a thin shell around `workers.rank.Rank` and, on rank 0, `workers.replica.EngineServer`."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from cluster.config import resolve_model
from workers.api.config import ReplicaConfig
from workers.api.replica import ReplicaInfo

if TYPE_CHECKING:
    from workers.replica import EngineServer


class RankActor:
    """Loads its shard in `start`, then steps in `run`, which never returns while the replica is well."""

    def __init__(self, config: ReplicaConfig, revision: str | None, replica_id: str, secret: str, threads: int) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        folder = resolve_model(config.model.path, revision)
        self._config = replace(config, model=replace(config.model, path=str(folder)))
        self._replica_id, self._secret, self._threads = replica_id, secret, threads
        self._server: EngineServer | None = None

    def start(self) -> tuple[ReplicaInfo, dict[str, float]]:
        """Load, warm up and listen. Returns the address, and the seconds that each phase of the start took."""
        from workers.rank import Rank  # imports torch: the driver and the supervisor never do
        from workers.replica import EngineServer

        rank = Rank(self._config, threads=self._threads)
        host = ray.util.get_node_ip_address()
        info = ReplicaInfo(
            id=self._replica_id,
            model=self._config.model.name,
            host=host,
            port=0,
            max_model_len=rank.max_model_len,
            max_num_seqs=self._config.engine.max_num_seqs,
            num_blocks=rank.num_blocks,
            block_size=self._config.engine.block_size,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
        )
        self._server = EngineServer(rank.make_engine(), info, self._secret)
        return self._server.start(host), dict(rank.phases)

    def run(self) -> None:
        """Step until told to stop. Raises what a step raised."""
        assert self._server is not None, "start() comes first"
        self._server.run()

    def stop(self) -> None:
        """Make `run` return."""
        if self._server is not None:
            self._server.stop()
