"""From nothing to an answer over HTTP with `ray up` on three hosts, a replica over two of them, and back to nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts.pretend import ROOT, Hosts, why_not
from watching import await_true

pytestmark = [pytest.mark.ray, pytest.mark.hosts]

DEPLOY = ROOT / "deploy/ray-up"
BIN = Path(sys.prefix) / "bin"
PORT = 23333
PROMPTS = 60  # of the 200 whose greedy answers by transformers are kept; one rank gives the same


@dataclass
class Site:
    """Three hosts, and a machine from which `ray up` is called: this one, with a home of its own."""

    hosts: Hosts
    home: Path
    key: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.home / "up.yaml"

    def render(self, *, cpus: int = 2, **model: Any) -> None:
        """deploy/ray-up/local.yaml with these hosts' addresses, its cluster file with `model`, a token, an API key.

        `cpus`: for ranks, on each host.
        """
        self.run("ray", "get-auth-token", "--generate", timeout=60)
        keys = self.home / "keys.yaml"
        if not keys.exists():
            self.key = self.run("echelon", "keys", "add", "--owner", "me", str(keys)).split()[-1]
        cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
        cluster["model"] |= model
        (self.home / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        up = yaml.safe_load((DEPLOY / "local.yaml").read_text())
        head, *workers = (host.address for host in self.hosts)
        up["provider"] |= {"head_ip": head, "worker_ips": workers}
        up["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.key)}
        up["file_mounts"] = {
            there: str(self.home / Path(here).name) if here.startswith("deploy/") else here
            for there, here in up["file_mounts"].items()
        }
        for commands in (up["head_start_ray_commands"], up["worker_start_ray_commands"]):
            commands[-1] = commands[-1].replace("ray start", f"ray start --num-cpus={cpus}")
        self.file.write_text(yaml.safe_dump(up))

    def run(self, *command: str, timeout: float = 900) -> str:
        """What a command of ours says, called as a user would from the machine beside the hosts."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ECHELON_"))}
        environment |= {"HOME": str(self.home), "RAY_TMPDIR": str(self.home), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
            env=environment | {"PATH": f"{BIN}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def timed(self, name: str, *command: str) -> str:
        started = time.monotonic()
        said = self.run(*command)
        self.seconds[name] = time.monotonic() - started
        return said

    def up(self, name: str = "ray up, until it answers") -> str:
        return self.timed(name, "ray", "up", "--yes", "--no-config-cache", str(self.file))

    def down(self) -> str:
        return self.timed("echelon down", "echelon", "down", str(self.file))

    def ask(self, address: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one request to the endpoint at `address`."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {key or self.key}"}
        request = urllib.request.Request(
            f"http://{address}:{PORT}/v1{path}", data=json.dumps(body).encode() if body else None, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    def left(self) -> dict[str, list[str]]:
        """Processes on the hosts besides their sshd."""
        return {host.name: lines for host in self.hosts if (lines := list(host.processes().values()))}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if missing := why_not():
        pytest.skip(f"hosts of namespaces: {missing}")
    home = tmp_path_factory.mktemp("launcher")
    started = time.monotonic()
    with Hosts(3, prefix="ehup", subnet="10.77.70") as hosts:
        site = Site(hosts, home)
        site.seconds["three hosts"] = time.monotonic() - started
        try:
            yield site
        finally:
            for path in hosts.folder.glob("home.*/.cache/echelon/*.log"):
                shutil.copy(path, home / f"{path.parts[-4]}.{path.name}")  # pytest keeps them for a while
    lines = "".join(f"  {name}: {seconds:.1f} s\n" for name, seconds in site.seconds.items())
    print(f"\n{lines}", file=sys.__stderr__)


def listening(site: Site, number: int) -> set[tuple[str, int]]:
    """Addresses and ports where host `number` listens, over IPv4 and IPv6."""
    lines = site.hosts[number].enter("ss", "-Htln").splitlines()
    return {(at.rpartition(":")[0].strip("[]"), int(at.rpartition(":")[2])) for at in (one.split()[3] for one in lines)}


def test_from_nothing_to_an_answer_and_back(site: Site) -> None:
    site.render()
    said = site.up()
    assert "Echelon is serving" in said
    head = site.hosts[0]
    started = time.monotonic()
    answer = site.ask(head.address, "/chat/completions", {
        "model": "demo", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0,
    })  # fmt: skip
    site.seconds["first answer after it"] = time.monotonic() - started
    assert answer[0] == 200
    assert "7" in answer[1]["choices"][0]["message"]["content"]
    await_true(lambda: "all 3 replicas are up" in log(site), "not all replicas came up", seconds=120)
    assert site.ask(head.address, "/models", key="ek-wrong")[0] == 401
    # Serve has a proxy wherever it has a replica; three replicas on three hosts of two cores each.
    for host in site.hosts:
        await_true(lambda host=host: answers(site, host.address), f"{host.name} does not answer", seconds=120)
    for number in range(3):
        ports = listening(site, number)
        assert not any(port in (8265, 10001) for _, port in ports), (
            ports
        )  # dashboard and Ray Client, where Ray puts them
        assert not any(port in (8404, 9101) and at not in ("127.0.0.1", "::1") for at, port in ports), ports
    refused = head.run("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong ray status --address 127.0.0.1:6379", check=False)
    assert refused.returncode != 0
    assert "is down" in site.down()
    await_true(lambda: not site.left(), lambda: f"left on the hosts: {site.left()}")
    for host in site.hosts:
        assert host.run("ls ~/ray_bootstrap_key.pem", check=False).returncode != 0
    assert not list((site.home / "ray").glob("cluster-*"))


def log(site: Site) -> str:
    return site.hosts[0].run("cat ~/.cache/echelon/serve-*.log").stdout


def answers(site: Site, address: str) -> bool:
    try:
        return site.ask(address, "/models")[0] == 200
    except OSError:
        return False


def test_a_replica_over_two_hosts_answers_as_one_rank_does(site: Site) -> None:
    """Each host has one CPU for ranks, so that the two ranks of a replica find room only apart."""
    site.render(cpus=1, replicas=1, tensor_parallel=2)
    site.up("ray up with a replica over two hosts")
    head = site.hosts[0]
    reference = json.loads((ROOT / "tests/workers/demo_reference.json").read_text())
    asked = {"prompts": reference["prompts"][:PROMPTS], "max_tokens": reference["max_new"], "key": site.key}
    (head.home / "asked.json").write_text(json.dumps(asked))
    said = json.loads(head.run("cd && python -", input=BY_HANDLES).stdout.splitlines()[-1])
    assert said == reference["answers"][:PROMPTS]
    view = json.loads(head.run("echelon status --json").stdout)
    (replica,) = view["replicas"]
    assert len(set(replica["ranks"])) == 2, view
    assert replica["state"] == "ready"
    assert (replica["running"], replica["leases"], replica["free_blocks"]) == (0, 0, replica["total_blocks"])
    assert "is spread over" in log(site)
    assert "more than any node has" in log(site)
    doctor = head.run("echelon doctor --address auto", check=False)
    assert doctor.returncode == 0, doctor.stderr
    # Four ranks on three CPUs: said at once, with what each host lacks, and nothing is left of the attempt.
    head.run("echelon stop --all")
    started = time.monotonic()
    refused = head.run("echelon serve demo --tp 4 --no-auth --address auto", check=False)
    site.seconds["a replica that fits nowhere is refused"] = time.monotonic() - started
    assert refused.returncode == 1
    words = " ".join(refused.stderr.split())
    assert "bundle 3 of 4 (1 CPU) fits on no node beside the 3 before it" in words
    assert all(f"{host.address} lacks 1 CPU (0 of 1 free)" in words for host in site.hosts)
    site.down()
    await_true(lambda: not site.left(), lambda: f"left on the hosts: {site.left()}")


BY_HANDLES = """
import json, ray, echelon
asked = json.load(open("asked.json"))
handle = echelon.connect("auto", api_key=asked["key"])
refs = [handle.generate.remote(ids, max_tokens=asked["max_tokens"], temperature=0) for ids in asked["prompts"]]
print(json.dumps([list(one.token_ids) for one in ray.get(refs)]))
"""
