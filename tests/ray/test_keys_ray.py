"""API keys on the way by Ray handles, in a real cluster: a second gateway of it, one that asks for keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.client import Handle
from cluster.config import ClusterConfig, HttpSection
from cluster.gateway_actor import Gateway, Served
from router.keys.edit import add_key
from router.keys.ring import make_key
from workers.api.errors import NotAuthorized

pytestmark = pytest.mark.ray

PROMPT = list(range(40, 140))


def test_handles_with_keys(cluster: Any, tmp_path: Path) -> None:
    import ray

    keys, anna, ben = tmp_path / "keys.yaml", make_key(), make_key()
    add_key(keys, anna, "anna")
    add_key(keys, ben, "ben")
    config = ClusterConfig(http=HttpSection(api_keys=str(keys)))
    gateway = ray.remote(Gateway).options(num_cpus=0).remote(Served(config, cluster.secret, {"demo": "keys"}))

    def cached(key: str | None) -> int:
        found = Handle(gateway, key).generate.remote(PROMPT, max_tokens=1, temperature=0)
        tokens: int = ray.get(found, timeout=60).usage.cached_tokens
        return tokens

    try:
        hers = [cached(anna) for _ in range(6)]
        assert hers[0] == 0
        assert max(hers) > 0
        assert cached(ben) == 0
        for key in (None, make_key()):
            with pytest.raises(NotAuthorized) as e:
                cached(key)
            assert "router/" not in str(e.value), "the caller should not have to read our frames"
            assert key is None or key not in str(e.value)
            with pytest.raises(NotAuthorized):
                ray.get(Handle(gateway, key).models.remote(), timeout=60)
            assert ray.get(Handle(gateway, key).reply.remote("/v1/completions", b"{}"), timeout=60).status == 401
        assert ray.get(Handle(gateway, ben).models.options(name="x").remote(), timeout=60) == ("demo",)
    finally:
        ray.kill(gateway)
