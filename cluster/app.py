"""Brings a cluster up and down: Ray, the dispatcher's actor and the gateway's, the replicas' application, the front's.

Import only after `cluster.environment.prepare_ray`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from cluster.access import edge_secret, first_key, node_edge_secret
from cluster.config import ClusterConfig, threads_per_rank
from cluster.dispatcher_actor import start_dispatcher
from cluster.edge import refusal_of
from cluster.engine_deployment import Rollout, replica_application
from cluster.environment import DEMO_MODEL, cpu_count, edge_file, ray_token, secure_ray_token
from cluster.first_answer import await_answer, base_url, cause
from cluster.gateway_actor import Served, start_gateway, stop_gateway
from cluster.host_report import doubts_of
from cluster.ingress_deployment import front_application
from cluster.names import DISPATCHER, FRONT_APP, NAMESPACE, REPLICAS, replicas_app
from cluster.nodes import await_nodes, have_our_edge, refuse_unlike_hosts, survey
from cluster.placement import Layout, replica_demands
from cluster.room import await_room, waiting_replicas
from cluster.step_qos import StepQos
from cluster.tls import context_trusting
from workers.api.config import ReplicaConfig
from workers.api.errors import ConfigError, EchelonError

OBJECT_STORE_BYTES = 100 << 20  # tokens never pass through it
POLL_SECONDS = 1.0
CLOSE_SECONDS, CLOSE_POLL_SECONDS = 5.0, 0.1
QUIET: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
START_TIMEOUT = 600.0  # seconds; a big checkpoint takes minutes to load

Progress = Callable[[str], None]

log = logging.getLogger("echelon.cluster")


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """Where a cluster that was brought up answers."""

    base_url: str
    models: tuple[str, ...]
    ray_address: str  # for `echelon.connect`
    secret: str = field(default="", repr=False)  # what replicas, dispatcher and ingresses greet each other with


def join_ray(address: str) -> None:
    """Be a driver of the Ray cluster at `address`. Raises EchelonError where none answers."""
    try:
        ray.init(address=address, **QUIET)
    except ConnectionError as e:
        raise EchelonError(f"no Ray cluster answers at {address}: {e}") from e


def start_ray(config: ClusterConfig, spare_cpus: int = 0, gpus: int | None = None) -> None:
    """Start an own Ray cluster on this machine, with logical CPUs for all ranks, and `gpus` (None: those it has).

    The caller's SIGTERM handler stays: Ray's own ends its processes at once, before they can be stopped in order.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    models = [one.model for one in config.each]
    ranks = sum(model.most_ranks for model in models)
    one_more = max(model.tensor_parallel for model in models)  # upgrades start it first
    ray.init(
        address="local",
        num_cpus=max(cpu_count(), ranks + one_more) + spare_cpus,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **QUIET,
    )
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    secure_ray_token()


def choose_devices(config: ClusterConfig, *, may_grow: bool = False) -> dict[str, str]:
    """By model, `cuda` where Ray has GPUs for it, else `cpu`, unless the config says; in the order of the file.

    The embedded demo model is small enough for the CPU: it starts everywhere. A cluster that `may_grow` is given
    machines with GPUs when they are asked for, so that too few of them is for the placement to say. Raises ConfigError
    when there are too few GPUs.
    """
    free = gpus = int(ray.cluster_resources().get("GPU", 0))
    devices = {}
    for one in config.each:
        model, device = one.model, "cuda"
        ranks = model.replicas * model.tensor_parallel
        demo_without_room = model.path == DEMO_MODEL and free < ranks
        if model.device == "cpu" or (model.device == "auto" and (gpus == 0 or demo_without_room)):
            device = "cpu"
        elif free < ranks and not may_grow:
            taken = f", {gpus - free} of them for the models before it" if free < gpus else ""
            raise ConfigError(
                f"{model.replicas} replicas of {one.model_name} on {model.tensor_parallel} GPUs each need {ranks}, Ray "
                f"sees {gpus}{taken}: take fewer (--replicas, make serve "
                f"REPLICAS={max(1, free // model.tensor_parallel)}), or device: cpu in a cluster file"
            )
        else:
            free -= ranks
        devices[one.model_name] = device
    return devices


def bring_up(
    config: ClusterConfig, *, address: str | None, progress: Progress, spare_cpus: int = 0, gpus: int | None = None,
    every_node: bool = True,
) -> RunningCluster:  # fmt: skip
    """Start everything and return once a real request was answered. Raises EchelonError with what to do.

    One replica is enough for an answer: `await_running` waits for the others.

    `spare_cpus`: logical CPUs of an own Ray for what else is to run in it. `gpus`: its logical GPUs, where gangs are to
    share those of the machine. `every_node`: HTTP is taken on each node with replicas, not on the head alone.
    """
    secret = secrets.token_hex(16)
    if address is None:
        progress("starting Ray")
        start_ray(config, spare_cpus, gpus)
        edge = own_edge(config, secret)
    else:
        progress(f"joining Ray at {address}")
        join_ray(address)
    try:
        if address is not None:
            edge = joined_edge(config, secret, progress)
        start_dispatcher(config.dispatcher_config(), secret, config.log, config.qos_files)
    except EchelonError:
        ray.shutdown()  # what runs there is another one's: `bring_down` must not find it
        raise
    devices = choose_devices(config, may_grow=address is not None)
    models = {one.model_name: one for one in config.each}
    ranks = {name: one.replica_config(devices[name]) for name, one in models.items()}
    layouts: dict[str, Layout] = {}
    if address is not None:  # an own Ray was started with room for all ranks
        demands = [d for name, one in models.items() for d in replica_demands(ranks[name], one.model.replicas)]
        try:
            made = await_room(demands, config.placement, progress)
        except EchelonError:
            bring_down(own_ray=False)
            raise
        threads = max(1, cpu_count() // made.most_on_a_node())
        layouts = {name: Layout(made.strategy(name), threads) for name in models}
    what = ", ".join(f"{one.model.replicas} replicas of {name} on {devices[name]}" for name, one in models.items())
    progress(f"starting Serve and {what}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    start_serve(config, edge, every_node=every_node)
    versions = {name: version_of(ranks[name], one.model.revision) for name, one in models.items()}
    served = Served(config, secret, versions, edge.secret, layouts)
    deploy(served, ranks)
    cert = config.http.tls_cert
    url = base_url(config.http.host, config.http.port, tls=cert is not None)
    trust = context_trusting(Path(cert)) if cert else None
    for name in models:
        await_answer(url, name, START_TIMEOUT, lambda: watch_start(progress), key=first_key(secret), trust=trust)
    start_gateway(served)  # not before: what it imports would take the replicas' time on a small machine
    return RunningCluster(url, config.names, ray.get_runtime_context().gcs_address, secret)


def version_of(config: ReplicaConfig, revision: str | None) -> str:
    """The same for replicas that may stand beside each other as one model; threads and counts make no difference."""
    return hashlib.sha256(repr((config, revision)).encode()).hexdigest()[:16]


def deploy(served: Served, ranks: Mapping[str, ReplicaConfig], *, start_first: bool = False) -> None:
    """Tell Serve what should run of the models in `ranks`; it starts, and replaces replicas of another version, from
    then on.

    The front is never replaced, but one that starts later has the new config.
    """
    whole, targets = served.config, []
    for name, config in ranks.items():
        one, layout = whole.of(name), served.layouts.get(name, Layout())
        replicas = replica_application(
            config,
            revision=one.model.revision,
            replicas=one.model.replicas,
            secret=served.secret,
            threads=layout.threads or threads_per_rank(whole),
            strategy=layout.strategy,
            qos=None if one.dispatch.qos is None else StepQos.read(Path(one.dispatch.qos)),
            rollout=Rollout(one.model.drain_timeout, start_first, one.scaling(), served.versions[name]),
        )
        targets.append(serve.RunTarget(replicas, name=replicas_app(name), route_prefix=None))
    front = front_application(whole, served.secret, served.edge)
    targets.append(serve.RunTarget(front, name=FRONT_APP, route_prefix="/"))
    serve.run_many(targets, wait_for_applications_running=False)


def replica_apps(applications: Iterable[str]) -> list[str]:
    """Those of the names of Serve applications that are our replicas'."""
    return [name for name in applications if name.startswith(REPLICAS)]


@dataclass(frozen=True, slots=True)
class Edge:
    """The HTTP edge before the ingresses: the secret that it shows them, and where Serve listens behind it."""

    secret: str = field(repr=False)
    serve_host: str


def own_edge(config: ClusterConfig, secret: str) -> Edge:
    """That of a Ray of our own: of what takes HTTP, HAProxy alone listens beyond this machine."""
    shown = edge_secret(secret)
    config.edge_settings(shown).write(edge_file())
    return Edge(shown, "127.0.0.1")


def joined_edge(config: ClusterConfig, secret: str, progress: Progress) -> Edge:
    """That of a Ray cluster that was joined, once its nodes are there and fit. Raises EchelonError.

    Hosts that `echelon node` made ready have our HAProxy, which reaches ingresses on each other. Elsewhere Serve's
    proxies are what they are.
    """
    await_nodes(config.placement, progress)
    reports = survey()
    refuse_unlike_hosts(reports)
    for doubt in doubts_of(reports):
        progress(f"warning: {doubt}")
    if have_our_edge(reports):
        return Edge(node_edge_secret(ray_token()), "0.0.0.0")
    if config.http.tls_cert:
        raise ConfigError(
            "TLS needs Echelon's own edge: a Ray without --address, hosts started with `echelon node`, or a proxy in "
            "front that has it"
        )
    return Edge(edge_secret(secret), config.http.host)


def start_serve(config: ClusterConfig, edge: Edge, *, every_node: bool = True) -> None:
    """Start Serve with its HTTP front. Raises EchelonError where HAProxy's configuration is refused."""
    http = HTTPOptions(host=edge.serve_host, port=config.http.port)
    try:
        where = ProxyLocation.EveryNode if every_node else ProxyLocation.HeadOnly
        serve.start(proxy_location=where, http_options=http)
    except (RuntimeError, RayError):
        refuse_unfit_edge()
        raise


def refuse_unfit_edge() -> None:
    """Raise EchelonError with the reason when HAProxy's last start was refused."""
    if why := refusal_of(edge_file()):
        raise EchelonError(why)


def watch_start(progress: Progress) -> bool:
    """Report how the start goes; true once all applications run. Raises EchelonError with the cause when one failed.

    A look costs Serve's controller time that the replicas need: not more often than every few seconds.
    """
    refuse_unfit_edge()
    status = serve.status().applications
    replicas = replica_apps(status)
    states = {status[name].status for name in (*replicas, FRONT_APP) if name in status}
    messages = deployment_messages(status)
    if "DEPLOY_FAILED" in states:
        raise EchelonError(f"the replicas did not start: {messages}")
    if messages:
        progress(f"starting the replicas; {messages}"[:300])
    for line in waiting_replicas():
        progress(line)
    return bool(replicas) and FRONT_APP in status and states == {"RUNNING"}


def await_running(progress: Progress) -> None:
    """Return once every replica runs. Raises EchelonError with the cause when one fails, or at START_TIMEOUT."""
    deadline = time.monotonic() + START_TIMEOUT
    while not watch_start(progress):
        if time.monotonic() > deadline:
            raise EchelonError(f"not all replicas are up within {START_TIMEOUT:.0f} s: see Serve's log")
        time.sleep(POLL_SECONDS)


def deployment_messages(applications: dict[str, Any]) -> str:
    """What Serve says of deployments that are not well; of a traceback its cause."""
    lines = []
    for app in applications.values():
        for name, deployment in app.deployments.items():
            if deployment.status != "HEALTHY" and deployment.message:
                lines.append(f"{name}: {cause(deployment.message)}")
    return "\n".join(lines)


def bring_down(*, own_ray: bool) -> None:
    """Stop the applications, and Ray if it is our own; Serve and its port too, unless it runs others' applications."""
    if not ray.is_initialized():
        return
    stop_gateway()  # replicas wait for those whom they serve
    try:
        close_front()
        apps = replica_apps(serve.status().applications)
        for blocking in (False, True):  # all of them at once
            for name in apps:
                serve.delete(name, _blocking=blocking)
        if not own_ray and not serve.status().applications:
            serve.shutdown()
    except RayServeException as e:
        log.info("Serve had not started: %s", e)
    if not own_ray:
        with contextlib.suppress(ValueError):  # it had not started
            ray.kill(ray.get_actor(DISPATCHER, namespace=NAMESPACE))
    ray.shutdown()


def close_front() -> None:
    """End the front's application; whoever is served then has CLOSE_SECONDS."""
    serve.delete(FRONT_APP, _blocking=False)
    deadline = time.monotonic() + CLOSE_SECONDS
    while FRONT_APP in serve.status().applications:
        if time.monotonic() > deadline:
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if actor["name"].startswith(f"SERVE_REPLICA::{FRONT_APP}#"):
                    with contextlib.suppress(ValueError):  # it ended meanwhile
                        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        time.sleep(CLOSE_POLL_SECONDS)


def stop_at(address: str) -> None:
    """Stop the Echelon in the Ray cluster at `address`, whose own process may be gone. Raises EchelonError."""
    join_ray(address)
    try:
        ray.get_actor(DISPATCHER, namespace=NAMESPACE)
    except ValueError as e:
        ray.shutdown()
        raise EchelonError(f"no Echelon runs in the Ray cluster at {address}") from e
    bring_down(own_ray=False)
