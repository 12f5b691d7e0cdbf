"""What `sessions.py` asks when it asks a server: requests over HTTP, and what the server says of them afterwards."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.environment import free_port

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300.0
STOP_SECONDS = 60.0


@contextmanager
def serving(url: str | None, *, replicas: int, engine: dict[str, Any], fronts: int) -> Iterator[str]:
    """`url`, or that of an `echelon serve` of the demo model, which ends with this."""
    if url is not None:
        yield url.rstrip("/").removesuffix("/v1")
        return
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        file, log = Path(name) / "cluster.yaml", Path(name) / "log"
        model = {"path": "demo", "replicas": replicas, "device": "cpu"}
        http = {"port": port, "ingress_replicas": fronts}
        file.write_text(yaml.safe_dump({"model": model, "engine": engine, "http": http}))
        with log.open("w") as out:
            command = [sys.executable, "-m", "cluster.cli", "serve", str(file)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            until, base = time.monotonic() + START_SECONDS, f"http://127.0.0.1:{port}"
            while _ready(base) < replicas:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(1.0)
            yield base
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def _ready(base: str) -> int:
    """Replicas that take requests."""
    try:
        seen = httpx.get(f"{base}/cluster", timeout=5.0)
    except httpx.TransportError:
        return 0
    return sum(row["state"] == "ready" for row in seen.json()["replicas"]) if seen.status_code == 200 else 0


@dataclass(frozen=True)
class Served:
    """One server, whose requests are named so that it can be asked about them."""

    http: httpx.AsyncClient
    model: str
    run: str  # no id is used twice

    @staticmethod
    @asynccontextmanager
    async def at(url: str, model: str) -> AsyncIterator[Served]:
        """The server at `url`."""
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            yield Served(http, model, secrets.token_hex(4))

    async def post(self, front: int, path: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, whose id is `name`; which front has it is for the server's proxy to say."""
        headers = {"x-request-id": f"{self.run}-{name}"}
        r = await self.http.post(path, json={"model": self.model, **body}, headers=headers)
        if r.status_code != 200:
            raise SystemExit(f"{path}: {r.status_code} {r.text}")
        answer: dict[str, Any] = r.json()
        return answer

    async def cached(self, name: str) -> int:
        """How many tokens of its prompt were in a prefix cache: the dispatcher hears of it right after the answer."""
        while True:
            r = await self.http.get(f"/requests/{self.run}-{name}/explain")
            r.raise_for_status()
            if (cached := r.json()["cached_tokens"]) is not None:
                return int(cached)
            await asyncio.sleep(0.01)

    async def metric(self, name: str) -> float:
        """The sum of all samples of a metric."""
        r = await self.http.get("/metrics")
        r.raise_for_status()
        families = text_string_to_metric_families(r.text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    async def executed(self) -> float:
        """Tokens that the engines have run, once a front has heard of the last of them."""
        await asyncio.sleep(1.0)
        return await self.metric("echelon_executed_tokens_total")
