"""`echelon node`: makes a host ready for `ray start`, so that Echelon's own HTTP edge runs on it.

A file of `ray up` calls it on every host (deploy/ray-up). What it prints is for the shell that starts Ray.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from cluster.access import node_edge_secret
from cluster.doctor import refuse_if_unfit
from cluster.environment import node_defaults, ray_token, secure_ray_token, state_dir
from cluster.serving import cluster_config, refuse_open_house
from cluster.tls import read_certificate


def node_exports(cluster_file: Path) -> str:
    """Shell lines that export what `ray start` needs here; the edge of this host has its settings then.

    Raises ConfigError where the host is not fit, the file is wrong, or what it names (keys, certificate) is not here.
    """
    config = cluster_config(str(cluster_file), {})
    refuse_if_unfit()
    refuse_open_house(config)
    if config.http.tls_cert and config.http.tls_key:
        read_certificate(config.http.tls_cert, config.http.tls_key)
    token = ray_token()
    secure_ray_token()
    folder = state_dir() / "node"
    exports = node_defaults(folder) | {"ECHELON_EDGE": str(folder / "edge.json")}
    config.edge_settings(node_edge_secret(token)).write(folder / "edge.json")
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items())
