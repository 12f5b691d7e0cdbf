"""Echelon as the applications of a Serve config file: for `serve deploy`, and for KubeRay's RayService.

    applications:
      - {name: replicas, route_prefix: null, import_path: "cluster.serve_file:replicas", args: {file: /etc/e/c.yaml}}
      - {name: front, route_prefix: /, import_path: "cluster.serve_file:front", args: {file: /etc/e/c.yaml}}

With several models in the file there is an application for each, whose args say `model: NAME` besides.
Each is built in a process of its own, so that the cluster's secret comes from the environment ($ECHELON_SECRET). Serve,
not the file, says where HTTP listens. There is no gateway, so neither `echelon.connect` nor `echelon upgrade`: a
changed file is deployed instead.
"""

from __future__ import annotations

from pathlib import Path

from ray import serve

from cluster.config import ClusterConfig, threads_per_rank
from cluster.dispatcher_actor import start_dispatcher
from cluster.engine_deployment import Rollout, replica_application
from cluster.environment import cluster_secret
from cluster.ingress_deployment import front_application
from cluster.serving import cluster_config, refuse_open_house
from cluster.step_qos import StepQos
from workers.api.errors import ConfigError


def replicas(args: dict[str, str]) -> serve.Application:
    """The application `replicas`. Raises ConfigError for a bad file, one without a device, or an unknown model."""
    whole, secret = _begin(args)
    config = whole.of(args.get("model", whole.model_name))
    model = config.model
    if model.device == "auto":
        raise ConfigError("model.device must be cuda or cpu here: nodes may come later than this is read")
    return replica_application(
        config.replica_config(model.device),
        revision=model.revision,
        replicas=model.replicas,
        secret=secret,
        threads=threads_per_rank(whole),
        qos=None if config.dispatch.qos is None else StepQos.read(Path(config.dispatch.qos)),
        rollout=Rollout(model.drain_timeout, model.upgrade != "stop_first", config.scaling()),
    )


def front(args: dict[str, str]) -> serve.Application:
    """The application `front`. Raises ConfigError for a bad file."""
    return front_application(*_begin(args))


def _begin(args: dict[str, str]) -> tuple[ClusterConfig, str]:
    """The file's config and the secret; the dispatcher runs."""
    config, secret = cluster_config(args["file"], {}), cluster_secret()
    refuse_open_house(config, joins=True)
    start_dispatcher(config.dispatcher_config(), secret, config.log, config.qos_files, shared=True)
    return config, secret
