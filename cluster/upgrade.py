"""`echelon upgrade`: the models' and the engines' sections of a file for a running cluster, replica by replica.

A replacement is up before its predecessor goes, where there is room for one more, and whoever goes is drained: clients
notice nothing. What does not come up is taken back, and the replicas that ran serve on.

Import only after `cluster.environment.prepare_ray`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from pathlib import Path

import ray
from ray import serve

from cluster.app import (
    POLL_SECONDS,
    START_TIMEOUT,
    Progress,
    choose_devices,
    deploy,
    deployment_messages,
    join_ray,
    version_of,
)
from cluster.config import ClusterConfig, resolve_model
from cluster.gateway_actor import Served
from cluster.names import DISPATCHER, GATEWAY, NAMESPACE, replicas_app
from cluster.placement import Layout, plan, rank_bundles, replica_demands
from cluster.room import nodes_with_room
from cluster.served_model import served_model
from workers.api.config import ReplicaConfig
from workers.api.errors import ConfigError, EchelonError

EXPECTED_SECONDS = 15.0  # that requests wait for a replica after the last time that we said one would come
APPLIED = ("model", "models", "engine")  # sections
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # that the front has read


def upgrade(config: ClusterConfig, *, address: str, restart: bool, progress: Progress) -> str:
    """Bring the cluster in Ray at `address` to `config`; what to print. Raises EchelonError; the cluster serves on.

    `restart`: replace the replicas even if nothing has changed.
    """
    join_ray(address)
    try:
        gateway = ray.get_actor(GATEWAY, namespace=NAMESPACE)
    except ValueError as e:
        ray.shutdown()
        raise EchelonError(f"no Echelon runs in the Ray cluster at {address}, or it has not started yet") from e
    try:
        runs: Served = ray.get(gateway.served.remote())
        wanted = merged(runs.config, config)
        devices = choose_devices(wanted)
        for one in wanted.each:
            refuse_other_front(runs.config.of(one.model_name), one)
        changed = []
        for one in wanted.each:
            then = upgraded(runs, one, one.replica_config(devices[one.model_name]), restart=restart)
            if then is None:
                continue
            roll_out(one.model_name, then, runs, devices[one.model_name], progress)
            ray.get(gateway.upgraded.remote(then))
            runs = then
            changed.append(one.model_name)
    finally:
        ray.shutdown()
    if not changed:
        return "nothing has changed: no replica was replaced (--restart replaces them all the same)"
    left = [s for s in type(config).model_fields if s not in APPLIED and getattr(config, s) != getattr(runs.config, s)]
    note = f"; {', '.join(left)}: what differs there needs a new start" if left else ""
    return f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} upgraded" + note


def upgraded(runs: Served, wanted: ClusterConfig, ranks: ReplicaConfig, *, restart: bool) -> Served | None:
    """What runs, with the model of `wanted` as it is there; None where that changes nothing."""
    name = wanted.model_name
    version = version_of(ranks, wanted.model.revision)
    if restart:
        version = hashlib.sha256(f"{version} {time.time_ns()}".encode()).hexdigest()[:16]
    elif version == runs.versions[name] and wanted.model == runs.config.of(name).model:
        return None
    return dataclasses.replace(
        runs,
        config=runs.config.with_model(wanted.model),
        versions={**runs.versions, name: version},
        layouts={**runs.layouts, name: layout_after(runs, wanted, ranks)},
    )


def layout_after(runs: Served, wanted: ClusterConfig, ranks: ReplicaConfig) -> Layout:
    """How gangs of the new size are laid out; those of the same size stay as they are."""
    name = wanted.model_name
    layout = runs.layouts.get(name, Layout())
    if wanted.model.tensor_parallel == runs.config.of(name).model.tensor_parallel:
        return layout
    empty = [dataclasses.replace(node, free=node.total) for node in nodes_with_room()]
    return dataclasses.replace(
        layout, strategy=plan(replica_demands(ranks, wanted.model.replicas), empty).strategy(name)
    )


def merged(runs: ClusterConfig, file: ClusterConfig) -> ClusterConfig:
    """What runs, with what an upgrade takes from `file`. Raises ConfigError where the models have other names."""
    if set(file.names) != set(runs.names):
        raise ConfigError(
            f"the cluster serves {', '.join(runs.names)}, the file says {', '.join(file.names)}: clients know a model "
            "by its name, and an upgrade can neither change that (model.name, or --name) nor add or take away a model"
        )
    return runs.model_copy(update={section: getattr(file, section) for section in APPLIED})


def refuse_other_front(runs: ClusterConfig, wanted: ClusterConfig) -> None:
    """Raise ConfigError where front and dispatcher, which stay, would not fit the model: token ids must mean the same
    before and after.
    """
    if wanted.model == runs.model:
        return
    if wanted.model.qos != runs.model.qos:
        raise ConfigError(f"{wanted.model_name} would have another QoS file: that needs a new start")
    old, new = (resolve_model(c.model.path, c.model.revision) for c in (runs, wanted))
    for name in TEXT_FILES:
        if old != new and _bytes(old / name) != _bytes(new / name):
            raise ConfigError(f"{new / name} is not that of {old}: another tokenizer or template needs a new start")
    lengths = [served_model(c, folder).max_model_len for c, folder in ((runs, old), (wanted, new))]
    if lengths[0] != lengths[1]:
        raise ConfigError(f"the context would be {lengths[1]} tokens instead of {lengths[0]}: that needs a new start")


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def has_room(config: ReplicaConfig) -> bool:
    """Whether Ray has free what one replica more needs; whether it fits on the nodes is for Ray to see."""
    free = ray.available_resources()
    needs: dict[str, float] = {}
    for bundle in rank_bundles(config):
        for name, amount in bundle.items():
            needs[name] = needs.get(name, 0.0) + amount
    return all(free.get(name, 0.0) >= amount for name, amount in needs.items())


def roll_out(name: str, wanted: Served, runs: Served, device: str, progress: Progress) -> None:
    """Replace the replicas of one model, or only change their number, and wait until it is done.

    Raises EchelonError when they do not come up; then what ran is asked for again.
    """
    one = wanted.config.of(name)
    ranks = one.replica_config(device)
    start_first = one.model.upgrade == "start_first" or (one.model.upgrade == "auto" and has_room(ranks))
    how = "a new replica before an old one goes" if start_first else "in place"
    progress(f"{name}: version {wanted.versions[name]}, {how}")
    deploy(as_many_as_run(name, wanted), {name: ranks}, start_first=start_first)
    try:
        await_rollout(name, progress)
    except EchelonError as e:
        before = runs.config.of(name).replica_config(device)
        deploy(as_many_as_run(name, runs), {name: before}, start_first=start_first)
        with contextlib.suppress(EchelonError):
            await_rollout(name, lambda text: progress(f"going back; {text}"))
        raise EchelonError(f"the upgrade of {name} was taken back, what ran before serves on: {e}") from e


def as_many_as_run(name: str, served: Served) -> Served:
    """With autoscaling, a deployment begins with the replicas that there are: it must not shrink a busy fleet."""
    model = served.config.of(name).model
    scaling = model.autoscaling
    if scaling is None:
        return served
    table = ray.get(ray.get_actor(DISPATCHER, namespace=NAMESPACE).status.remote())
    there = sum(r.info.model == name and r.state != "draining" and not r.info.url for r in table.rows)
    replicas = min(max(there, scaling.min_replicas), scaling.max_replicas)
    config = served.config.with_model(model.model_copy(update={"replicas": replicas}))
    return dataclasses.replace(served, config=config)


def await_rollout(name: str, progress: Progress) -> None:
    """Return once the replicas of model `name` are as they were asked for. Raises EchelonError with Serve's reason, or
    after a while in which nothing happened.
    """
    last, since = "", time.monotonic()
    dispatcher = ray.get_actor(DISPATCHER, namespace=NAMESPACE)
    while True:
        dispatcher.expect.remote(name, EXPECTED_SECONDS)  # with `stop_first` there may be none for a while
        status = serve.status().applications
        app = status[replicas_app(name)]
        if app.status == "RUNNING":
            return
        messages = deployment_messages({name: app})
        if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise EchelonError(messages or str(app.message))
        states = ", ".join(
            f"{n} {s.lower()}" for d in app.deployments.values() for s, n in d.replica_states.items() if n
        )
        if states != last:
            last, since = states, time.monotonic()
            progress(states)
        if time.monotonic() - since > START_TIMEOUT:
            raise EchelonError(f"for {START_TIMEOUT:.0f} s nothing has happened ({last}); {messages}")
        time.sleep(POLL_SECONDS)
