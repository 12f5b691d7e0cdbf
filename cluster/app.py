"""Brings a cluster up and down: Ray, the dispatcher's actor, the replicas' application and the front's.

Import only after `cluster.environment.prepare_ray`.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from cluster.config import ClusterConfig, threads_per_rank
from cluster.dispatcher_actor import start_dispatcher
from cluster.engine_deployment import replica_application
from cluster.environment import cpu_count, secure_ray_token
from cluster.ingress_deployment import front_application
from cluster.names import DISPATCHER, FRONT_APP, NAMESPACE, REPLICAS_APP
from workers.api.errors import ConfigError, EchelonError

OBJECT_STORE_BYTES = 100 << 20  # tokens never pass through it
START_TIMEOUT = 600.0  # seconds; a big checkpoint takes minutes to load

Progress = Callable[[str], None]

log = logging.getLogger("echelon.cluster")


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """Where a cluster that was brought up answers."""

    base_url: str
    model: str
    secret: str = field(default="", repr=False)  # what replicas, dispatcher and ingresses greet each other with


def connect_ray(config: ClusterConfig, address: str | None, spare_cpus: int = 0) -> None:
    """Join the Ray cluster at `address`, or start an own one on this machine, with logical CPUs for all ranks."""
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    ranks = config.model.replicas * config.model.tensor_parallel
    ray.init(
        address="local",
        num_cpus=max(cpu_count(), ranks) + spare_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **quiet,
    )
    secure_ray_token()


def choose_device(config: ClusterConfig) -> str:
    """`cuda` where Ray has enough GPUs for all ranks, else `cpu`. Raises ConfigError when cuda was asked for."""
    ranks = config.model.replicas * config.model.tensor_parallel
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.model.device == "cuda" and gpus < ranks:
        raise ConfigError(
            f"{config.model.replicas} replicas of {config.model.tensor_parallel} GPUs need {ranks}, Ray sees {gpus}"
        )
    if config.model.device == "auto":
        return "cuda" if gpus >= ranks else "cpu"
    return config.model.device


def bring_up(config: ClusterConfig, *, address: str | None, progress: Progress, spare_cpus: int = 0) -> RunningCluster:
    """Start everything and return once a real request was answered. Raises EchelonError with what to do.

    `spare_cpus`: logical CPUs of an own Ray for what else is to run in it.
    """
    progress("starting Ray" if address is None else f"joining Ray at {address}")
    connect_ray(config, address, spare_cpus)
    secret = secrets.token_hex(16)
    replica_config = config.replica_config(choose_device(config))
    start_dispatcher(config.dispatcher_config(), secret)
    progress(f"starting Serve and {config.model.replicas} replicas of {config.model_name} on {replica_config.device}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = HTTPOptions(host=config.http.host, port=config.http.port)
    serve.start(proxy_location=ProxyLocation.EveryNode, http_options=http)
    replicas = replica_application(
        replica_config,
        revision=config.model.revision,
        replicas=config.model.replicas,
        secret=secret,
        threads=threads_per_rank(config),
    )
    targets = [
        serve.RunTarget(replicas, name=REPLICAS_APP, route_prefix=None),
        serve.RunTarget(front_application(config, secret), name=FRONT_APP, route_prefix="/"),
    ]
    try:
        serve.run_many(targets)
    except RuntimeError as e:
        raise EchelonError(f"the replicas did not start: {deployment_messages() or e}") from e
    progress("waiting for the first answer")
    host = "127.0.0.1" if config.http.host in ("0.0.0.0", "::") else config.http.host
    cluster = RunningCluster(f"http://{host}:{config.http.port}/v1", config.model_name, secret)
    await_answer(cluster)
    return cluster


def deployment_messages() -> str:
    """What Serve says of deployments that are not well."""
    lines = []
    for app in serve.status().applications.values():
        for name, deployment in app.deployments.items():
            if deployment.status != "HEALTHY":
                lines.append(f"{name}: {deployment.message}")
    return "\n".join(lines)


def await_answer(cluster: RunningCluster, deadline_seconds: float = START_TIMEOUT) -> None:
    """Return once one token came back over HTTP. Raises EchelonError when the deadline passes."""
    body = {"model": cluster.model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
    request = urllib.request.Request(
        f"{cluster.base_url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    deadline, last = time.monotonic() + deadline_seconds, ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as e:
            last = e.read(500).decode(errors="replace")
        except OSError as e:
            last = str(e)
        time.sleep(0.1)
    raise EchelonError(f"no answer from {cluster.base_url} within {deadline_seconds:.0f} s; the last one: {last}")


def bring_down(*, own_ray: bool) -> None:
    """Stop the applications, and Ray if it is our own."""
    if not ray.is_initialized():
        return
    try:
        serve.delete(FRONT_APP)
        serve.delete(REPLICAS_APP)
    except RayServeException as e:
        log.info("Serve had not started: %s", e)
    if not own_ray:
        ray.kill(ray.get_actor(DISPATCHER, namespace=NAMESPACE))
    ray.shutdown()
