"""The QoS configuration at a replica: the policy that orders its engine's steps, and its reloads."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.qos_file import QosFile
from router.qos.config import QosConfig
from router.qos.file import load_qos_config
from router.qos.ledger import Prices
from router.qos.steps import StepOrder, engine_limits
from workers.api.replica import ReplicaInfo

if TYPE_CHECKING:
    from workers.replica import EngineServer

LOOK_SECONDS = 1.0  # between two looks at the file

log = logging.getLogger("echelon.qos")


@dataclass(frozen=True, slots=True)
class StepQos:
    """What the file at `path` said when the cluster was started; travels to the ranks."""

    config: QosConfig
    path: Path

    @classmethod
    def read(cls, path: Path) -> StepQos:
        """The file as it is now. Raises ConfigError."""
        return cls(load_qos_config(path), path)

    def ordering(self, info: ReplicaInfo) -> StepOrder:
        """The policy of the engine that `info` describes."""
        prices = Prices()
        return StepOrder(self.config, engine_limits(info, prices), prices)

    def follow(self, ordering: StepOrder, server: EngineServer) -> None:
        """From now on `ordering` changes with the file, between two steps of `server`."""
        file = QosFile(self.path)

        def watch() -> None:
            while True:
                try:
                    config = file.look()
                    if config is not None:
                        server.between_steps(lambda config=config: ordering.replace(config))  # type: ignore[misc]
                except Exception:  # a defect here must not end the watch
                    log.exception("the QoS configuration stays as it was")
                time.sleep(LOOK_SECONDS)

        threading.Thread(target=watch, name="QoS file", daemon=True).start()
