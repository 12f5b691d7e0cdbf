"""`echelon down`: the end of a cluster that `ray up` started, on every one of its hosts.

`ray down` stops Ray on the head only where hosts are given by address; their workers' processes stay for a minute.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.environment import ray_temp_dir
from workers.api.errors import ConfigError, EchelonError

SSH_SECONDS = 120.0  # for one host's commands
STOP_ECHELON = "echelon stop --all"
# Of `ray up` on a host: a copy of the key that opens the others, and what the cluster was to be.
LEFT_OVERS = "rm -f ~/ray_bootstrap_key.pem ~/ray_bootstrap_config.yaml"
STOP_RAY = f"ray stop --force; {LEFT_OVERS}"


@dataclass(frozen=True, slots=True)
class UpFile:
    """What of a file of `ray up` says where its hosts are. `head` and `workers` are empty for a cloud's."""

    path: Path
    name: str
    head: str
    workers: tuple[str, ...]
    ssh: tuple[str, ...]  # the command, up to the host

    @classmethod
    def read(cls, path: Path) -> UpFile:
        """The file at `path`. Raises ConfigError."""
        try:
            data: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
            provider, auth = data["provider"], data.get("auth") or {}
            ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"]
            ssh += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]  # as `ray up` calls it
            if key := auth.get("ssh_private_key"):
                ssh += ["-o", "IdentitiesOnly=yes", "-i", str(Path(key).expanduser())]
            if proxy := auth.get("ssh_proxy_command"):
                ssh += ["-o", f"ProxyCommand={proxy}"]
            if user := auth.get("ssh_user"):
                ssh += ["-l", user]
            local = provider["type"] == "local"
            head = provider.get("external_head_ip") or provider["head_ip"] if local else ""
            return cls(path, data["cluster_name"], head, tuple(provider["worker_ips"]) if local else (), tuple(ssh))
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from e
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(f"{path} is not a file of `ray up`: {e!r}") from e


def take_down(path: Path, say: Callable[[str], None]) -> None:
    """Stop what `ray up PATH` started. Logs stay on the hosts. Raises EchelonError with every host that failed."""
    file = UpFile.read(path)
    if not file.head:
        _ray_down(file)
        return
    failed = _everywhere(file, [file.head], STOP_ECHELON, say)
    # The head first: its autoscaler would start the workers again.
    failed |= _everywhere(file, [file.head], STOP_RAY, say)
    failed |= _everywhere(file, file.workers, STOP_RAY, say)
    for suffix in ("state", "lock"):
        (ray_temp_dir() / f"cluster-{file.name}.{suffix}").unlink(missing_ok=True)
    if failed:
        raise EchelonError("; ".join(f"{host}: {why}" for host, why in failed.items()))
    say(f"{file.name} is down")


def _everywhere(file: UpFile, hosts: Iterable[str], command: str, say: Callable[[str], None]) -> dict[str, str]:
    hosts = list(hosts)
    if not hosts:
        return {}
    with ThreadPoolExecutor(len(hosts)) as pool:
        ends = list(pool.map(lambda host: _run(file, host, command), hosts))
    for host, (_, said) in zip(hosts, ends, strict=True):
        for line in said.splitlines():
            say(f"{host}: {line}")
    return {
        host: said.strip() or f"ssh ended with {code}" for host, (code, said) in zip(hosts, ends, strict=True) if code
    }


def _run(file: UpFile, host: str, command: str) -> tuple[int, str]:
    """Exit status and words of `command` in the shell that `ray up` uses there."""
    with tempfile.TemporaryFile() as words:  # no pipe: what it leaves running would hold it open
        quoted = f"bash --login -c -i 'source ~/.bashrc; {command}'"
        try:
            code = subprocess.run(
                [*file.ssh, host, quoted], stdin=subprocess.DEVNULL, stdout=words, stderr=words, timeout=SSH_SECONDS,
                check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return 1, f"`{command}` has not ended within {SSH_SECONDS:.0f} s"
        words.seek(0)
        lines = words.read().decode(errors="replace").splitlines()
    # An interactive shell without a terminal says so, twice.
    return code, "\n".join(line for line in lines if line.strip() and not line.startswith("bash: "))


def _ray_down(file: UpFile) -> None:
    code = subprocess.run(["ray", "down", "--yes", str(file.path)], check=False).returncode
    if code:
        raise EchelonError(f"`ray down {file.path}` ended with {code}")
