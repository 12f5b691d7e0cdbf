"""Who may ask this cluster: the keys of its key file, and the one that it shows itself."""

from __future__ import annotations

import hmac
from pathlib import Path

from cluster.config import ClusterConfig
from router.http.identity import Identity
from router.keys.file import DEFAULT_OWNER
from router.keys.live import LiveKeys
from router.keys.resolver import Keys
from router.keys.ring import KeyEntry, digest_of


class NoKeysNeeded:
    """Everybody is the default owner: without a key file, Ray handles need no key."""

    def identity(self, key: bytes | None) -> Identity:
        """The default identity, whatever `key` is; who may join the Ray cluster is believed what it calls itself."""
        return Identity(believed=True)


def first_key(secret: str) -> str:
    """The key by which the start asks for its first answer over HTTP; it follows from the cluster's secret."""
    return hmac.new(secret.encode(), b"first answer", "sha256").hexdigest()


def edge_secret(secret: str) -> str:
    """What the HAProxy of an own Ray shows the ingresses, to be believed whose requests it hands on."""
    return hmac.new(secret.encode(), b"edge", "sha256").hexdigest()


def node_edge_secret(token: str) -> str:
    """The same of hosts that were made ready by `echelon node`: it follows from Ray's token, which each of them has."""
    return hmac.new(token.encode(), b"edge", "sha256").hexdigest()


def key_file(config: ClusterConfig) -> Path | None:
    """The key file, the same absolute path on every node; None = there are no keys."""
    return None if config.http.api_keys is None else Path(config.http.api_keys)


def open_keys(config: ClusterConfig, secret: str) -> LiveKeys | None:
    """The keys of this process; None where the cluster has none. Raises ConfigError where the file is bad or absent."""
    path = key_file(config)
    if path is None:
        return None
    return LiveKeys(path, own=(KeyEntry(digest_of(first_key(secret).encode()), DEFAULT_OWNER),))


def keys_for_handles(config: ClusterConfig, secret: str) -> Keys:
    """What the gateway asks. Raises ConfigError."""
    return open_keys(config, secret) or NoKeysNeeded()
