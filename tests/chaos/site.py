"""The cluster under test, on an own local Ray, and how the bench looks inside. Import only after `prepare_ray`."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from cluster.app import await_running, bring_down, bring_up
from cluster.config import ClusterConfig, DispatchSection, EngineSection, HttpSection, ModelSection
from cluster.environment import free_port
from cluster.names import DISPATCHER, FRONT_APP, NAMESPACE, replicas_app

ANSWER_SECONDS = 5.0
FIRST_COME = {
    "enable_user_qos": False,
    "user_groups": ["all"],
    "user_group_map": {"all": [{"id": "default", "quota_pct": 100}]},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is started. `blocks` of KV cache a replica are few enough that its load must be preempted now and then."""

    replicas: int = 3
    tensor_parallel: int = 1
    ingresses: int = 1
    gpus: int | None = None  # logical ones; None: those of the machine
    blocks: int = 320
    idle_timeout: float = 10.0  # of a client that takes nothing, in seconds


@dataclass(slots=True)
class Site:
    """A running cluster. Calls of it block for milliseconds: `chaos.waiting.look` has a thread for them."""

    shape: Shape
    port: int
    qos_file: Path
    host: str = "127.0.0.1"
    model: str = "demo"

    def dispatcher(self) -> Any:
        """Its actor. Raises ValueError while there is none."""
        return ray.get_actor(DISPATCHER, namespace=NAMESPACE)

    def rows(self) -> list[Any]:
        """The dispatcher's table of replicas; empty while nobody answers."""
        try:
            return list(ray.get(self.dispatcher().status.remote(), timeout=ANSWER_SECONDS).rows)
        except (ValueError, ray.exceptions.RayError):
            return []

    def ready(self) -> list[Any]:
        """Rows of the replicas that take leases."""
        return [r for r in self.rows() if r.state == "ready"]

    def waiting(self) -> int:
        """Requests without a lease."""
        return int(ray.get(self.dispatcher().status.remote(), timeout=ANSWER_SECONDS).waiting)

    def unsettled(self) -> str:
        """What is open in the books of leases, requests and blocks; "" when nothing is."""
        try:
            ledger = ray.get(self.dispatcher().ledger.remote(), timeout=ANSWER_SECONDS)
        except (ValueError, ray.exceptions.RayError) as e:
            return f"no dispatcher answers: {type(e).__name__}"
        if not ledger.balanced or ledger.held:
            return f"leases: {ledger}"
        for row in self.rows():
            load = row.load
            idle = row.leases == 0 and load.requests.running == 0 and load.free_blocks == load.total_blocks
            if not idle or not load.requests.balanced:
                return f"replica {row.info.id}: {row.leases} leases, {load}"
        return ""

    def tasks(self) -> int:
        """Of the dispatcher's event loop."""
        return int(ray.get(self.dispatcher().vitals.remote(), timeout=ANSWER_SECONDS).tasks)

    def supervisor(self, replica_id: str) -> int:
        """The process id of the Serve replica `replica_id`. Raises LookupError."""
        for replica in self._serve_replicas(replicas_app(self.model)):
            if replica["replica_id"].endswith(replica_id):
                return int(replica["pid"])
        raise LookupError(f"Serve knows no replica {replica_id}")

    def front_hosts(self) -> set[str]:
        """Addresses of the hosts with an ingress. Raises LookupError."""
        return {replica["node_ip"] for replica in self._serve_replicas(FRONT_APP)}

    def _serve_replicas(self, application: str) -> list[dict[str, Any]]:
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            details = ray.get(controller.get_serve_instance_details.remote(), timeout=ANSWER_SECONDS)
        except (ValueError, ray.exceptions.RayError) as e:
            raise LookupError(f"Serve's controller does not answer: {e}") from e
        deployments = details["applications"][application]["deployments"].values()
        return [replica for deployment in deployments for replica in deployment["replicas"]]

    def rank(self, replica_id: str, number: int) -> int:
        """The process id of a rank, as its supervisor's log has it. Raises LookupError."""
        for said in self.said("serve/replica_*", rf"replica {replica_id} rank {number} \(pid \d+\) is up"):
            return int(said.partition("(pid ")[2].partition(")")[0])
        raise LookupError(f"no log says where rank {number} of {replica_id} is")

    def logs(self, pattern: str) -> str:
        """All of Ray's log files whose path below logs/ fits `pattern`, joined."""
        folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
        return "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob(pattern)))

    def said(self, pattern: str, regex: str) -> list[str]:
        """What fits `regex` in those files."""
        return [m[0] for m in re.finditer(regex, self.logs(pattern))]

    def write_qos(self, text: str | None = None) -> None:
        """Replace the QoS file at once; None: the good one."""
        new = self.qos_file.with_suffix(".new")
        new.write_text(json.dumps(FIRST_COME) if text is None else text)
        new.rename(self.qos_file)


@contextlib.contextmanager
def running(
    shape: Shape, folder: Path, progress: Callable[[str], None], *, address: str | None = None
) -> Iterator[Site]:
    """The cluster is up in the block, and gone after it; on an own Ray, or on the one at `address`."""
    site = Site(shape, free_port(), folder / "qos.json")
    site.write_qos()
    config = ClusterConfig(
        model=ModelSection(
            path="demo",
            name=site.model,
            replicas=shape.replicas,
            tensor_parallel=shape.tensor_parallel,
            dtype="float32",
        ),
        engine=EngineSection(num_blocks=shape.blocks, max_num_seqs=64),
        http=HttpSection(
            port=site.port,
            ingress_replicas=shape.ingresses,
            idle_timeout=shape.idle_timeout,
            no_auth=address is not None,  # who asks is not known behind the proxies of a Ray that was joined
        ),
        dispatch=DispatchSection(qos=str(site.qos_file)),
    )
    try:
        bring_up(config, address=address, progress=progress, spare_cpus=4, gpus=shape.gpus)
        await_running(progress)
        yield site
    finally:
        bring_down(own_ray=address is None)
