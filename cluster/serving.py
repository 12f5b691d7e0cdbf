"""`echelon serve` and `echelon stop`: one foreground process that owns a cluster, and the note it leaves."""

from __future__ import annotations

import contextlib
import functools
import gc
import ipaddress
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from cluster.access import key_file
from cluster.config import ClusterConfig, ModelSection, checked_config, read_cluster_config, resolve_model
from cluster.doctor import refuse_if_unfit
from cluster.environment import DEMO_MODEL, prepare_ray, state_dir
from cluster.start_view import start_view
from cluster.tls import context_trusting, read_certificate
from router.keys.file import parse_keys, read_key_file
from router.text.template_choice import SUFFIXES, inlined
from workers.api.errors import ConfigError, EchelonError

STOP_SECONDS = 30.0
WATCH_SECONDS = 5.0  # between two looks at what waits for room
HTTP_FILES = ("api_keys", "tls_cert", "tls_key")
HTTP_FLAGS = ("host", "port", "no_auth", *HTTP_FILES)
DISPATCH_FLAGS = ("qos",)
PLACEMENT_FLAGS = ("nodes",)
ENGINE_FLAGS = ("batch_invariant", "eviction_type")
MODEL_FLAGS = (
    "replicas", "tensor_parallel", "name", "implementation", "model_files", "trust_remote_code", "max_model_len",
    "rope_scaling_factor", "chat_template", "capability", "tool_call_parser", "reasoning_parser",
)  # fmt: skip


def cluster_config(model: str, flags: dict[str, Any]) -> ClusterConfig:
    """The config of a model or a cluster file, with command-line flags on top. Raises ConfigError."""
    if model.endswith((".yaml", ".yml")):
        config = read_cluster_config(Path(model))
    else:
        config = ClusterConfig(model=ModelSection(path=model))
    values = config.model_dump()
    first, several = values.pop("model"), values.pop("models")
    models = list(several) or [first]
    given = {k: flags[k] for k in MODEL_FLAGS if k in flags}
    if len(models) > 1 and given:
        raise ConfigError(f"{model} has several models: what {', '.join(given)} of each is stands there, not in a flag")
    folder = Path(model).absolute().parent  # other processes have other working folders
    for section, name in (*((values["http"], name) for name in HTTP_FILES), (values["dispatch"], "qos")):
        _take_from(folder, section, name)
    for section in models:
        _take_from(folder, section, "qos")
        if isinstance(section["chat_template"], str):
            section["chat_template"] = _template(section["chat_template"], folder)
        section["model_files"] = [str(folder / Path(file).expanduser()) for file in section["model_files"]]
        checkpoint = Path(section["path"]).expanduser()
        if section["path"] != DEMO_MODEL and checkpoint.is_dir():
            section["path"] = str(checkpoint.resolve())  # and "." has no name
    if isinstance(given.get("chat_template"), str):
        given["chat_template"] = _template(given["chat_template"], Path.cwd())
    models[0].update(given)
    values["dispatch"].update({k: flags[k] for k in DISPATCH_FLAGS if k in flags})
    values["http"].update({k: flags[k] for k in HTTP_FLAGS if k in flags})
    values["placement"].update({k: flags[k] for k in PLACEMENT_FLAGS if k in flags})
    for limits in (values["engine"], *(section["engine"] for section in models if section["engine"])):
        limits.update({k: flags[k] for k in ENGINE_FLAGS if k in flags})
    config = checked_config(values | ({"models": models} if several else {"model": first}), "the command line")
    for one in config.each:
        one.replica_config("auto")  # limits that contradict each other: now, not when Ray is up
    config.dispatcher_config()  # a bad QoS file too
    return config


def _take_from(folder: Path, section: dict[str, Any], name: str) -> None:
    """A path of the file is relative to its folder."""
    if section[name] is not None:
        section[name] = str(folder / Path(section[name]).expanduser())


def _template(said: str, folder: Path) -> str | dict[str, Any]:
    """What a file says of a chat template, relative to its folder; what is in JSON and jinja files travels inside."""
    named = folder / Path(said).expanduser()
    return inlined(str(named) if named.suffix in SUFFIXES else said)


def note_path(port: int) -> Path:
    """The file that says which process serves on `port`."""
    return state_dir() / f"serve-{port}.json"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_open_house(config: ClusterConfig, *, joins: bool = False) -> str:
    """Who may ask, in words. Raises ConfigError when HTTP would listen beyond this machine without API keys, and for a
    key file that is not good.

    `joins`: Ray is another's, and so are the proxies that take HTTP: where they listen, and for whom they ask, is not
    known here.
    """
    host, keys = config.http.host, key_file(config)
    if keys is not None:
        count = sum(not e.revoked for e in parse_keys(read_key_file(keys), str(keys)).entries)
        return f"requests need one of the {count} API keys of {keys}; `echelon keys` changes them"
    if config.http.no_auth:
        return f"--no-auth: no API key is asked for, whoever reaches {host} may use the model"
    if joins:
        raise ConfigError(
            "there are no API keys, and the proxies of a Ray cluster that is joined (--address) may listen beyond this "
            "machine, whatever --host says: make a key (echelon keys add --owner NAME keys.yaml) and serve with "
            "--api-keys keys.yaml, or say --no-auth"
        )
    if not is_loopback(host):
        raise ConfigError(
            f"there are no API keys, so whoever reaches {host} could use the model: make a key (echelon keys add "
            "--owner NAME keys.yaml) and serve with --api-keys keys.yaml, or say --no-auth"
        )
    return "no API keys: only programs on this machine are served"


def refuse_taken_port(host: str, port: int) -> None:
    """Raise ConfigError when something listens there already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({e.strerror}). Stop the other one (echelon stop --port {port}) "
                "or take another port (make serve PORT=..., echelon serve --port ...)"
            ) from e


class Beside(Protocol):
    """What stands beside a cluster while it serves."""

    def __call__(self, url: str, trust: ssl.SSLContext | None) -> AbstractContextManager[str]:
        """For the API at `url`, whose certificate `trust` takes; it says in a line where it is. Raises EchelonError."""


def run_until_stopped(model: str, flags: dict[str, Any], *, address: str | None, beside: Beside | None = None) -> None:
    """`serve_until_stopped` of a model or a cluster file, with command-line flags on top. Raises EchelonError."""
    serve_until_stopped(cluster_config(model, flags), address=address, beside=beside)


def serve_until_stopped(config: ClusterConfig, *, address: str | None, beside: Beside | None = None) -> None:
    """Bring the cluster up, say where it answers, and wait for Ctrl-C or SIGTERM. Raises EchelonError."""
    refuse_if_unfit()
    who = refuse_open_house(config, joins=address is not None)
    refuse_taken_port(config.http.host, config.http.port)
    http = config.http
    certificate = read_certificate(http.tls_cert, http.tls_key) if http.tls_cert and http.tls_key else None
    # A wrong path, a download with its progress bar: now, not in a replica's log.
    for one in config.each:
        resolve_model(one.model.path, one.model.revision)
    gc.disable()  # until it answers: what the imports leave stays, and looking through it takes 0.3 s
    prepare_ray()
    from cluster.app import bring_down, bring_up
    from cluster.served_model import served_models
    from cluster.start_watch import watched_start

    served_models(config)  # a tokenizer that cannot be read, too
    stop = threading.Event()
    signal.signal(signal.SIGTERM, _interrupt)  # `echelon stop` while it starts is Ctrl-C
    note = note_path(config.http.port)
    said: dict[str, Any] = {"pid": os.getpid(), "began": _began(os.getpid()), "port": config.http.port}
    note.write_text(json.dumps(said))
    console = Console(highlight=False)
    say = functools.partial(console.print, soft_wrap=True, markup=False)
    around = contextlib.ExitStack()
    try:
        started = time.monotonic()
        with start_view(console, say) as view, watched_start(view.show):
            cluster = bring_up(config, address=address, progress=view.say)
        gc.enable()
        said["ray"] = cluster.ray_address
        note.write_text(json.dumps(said))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        body = json.dumps({"model": cluster.models[0], "messages": [{"role": "user", "content": "What is 3 + 4?"}]})
        what = f"model{'s' * (len(cluster.models) > 1)} {', '.join(cluster.models)}"
        say(f"Echelon is serving {cluster.base_url} ({what})")
        say(f"  {who}")
        if certificate and certificate.warning:
            say(f"  warning: {certificate.warning}")
        say(f"  started in {time.monotonic() - started:.1f} s; try:")
        key = ' -H "authorization: Bearer $ECHELON_API_KEY"' if config.http.api_keys else ""
        url, options = certificate.curl_options(cluster.base_url) if certificate else (cluster.base_url, "")
        say(f"  curl{options} {url}/chat/completions -H 'content-type: application/json'{key} -d '{body}'")
        say(f"  from Python: echelon.connect({cluster.ray_address!r})")
        if beside is not None:
            trust = context_trusting(certificate.path) if certificate else None
            say(f"  {around.enter_context(beside(cluster.base_url, trust))}")
        elif config.http.pages:
            root = url.removesuffix("/v1")
            say(f"  web pages: {root}/chat and {root}/operator")
        note.write_text(json.dumps({**said, "url": cluster.base_url}))  # `--detach` has read all of the above then
        say(f"  stop it with Ctrl-C, `make stop PORT={config.http.port}` or `echelon stop --port {config.http.port}`")
        replicas = sum(one.model.replicas for one in config.each)
        if replicas > 1:
            with start_view(console, say) as view, watched_start(view.show):
                view.say("starting the other replicas")
                others = await_others(replicas, stop, started, say)
            say(f"  {others}")
        watch = threading.Thread(target=say_what_waits, args=(stop, say), daemon=True, name="placement")
        watch.start()
        stop.wait()
        watch.join(WATCH_SECONDS)  # not in the middle of a question to a Ray that goes
        console.print("stopping ...")
    except KeyboardInterrupt:
        console.print("stopped before it was up")
    finally:
        try:
            around.close()
            bring_down(own_ray=address is None)
        finally:
            note.unlink(missing_ok=True)


def await_others(replicas: int, stop: threading.Event, started: float, say: Callable[[str], None]) -> str:
    """Wait until all replicas are up, one has failed, or `stop`; what to print of it. The first one serves meanwhile.

    `started`: time.monotonic() of the start. `say` is told of each replica that finds no room.
    """
    said: set[str] = set()

    def tell(text: str) -> None:
        if WAITS in text and text not in said:
            said.add(text)
            say(f"  warning: {text}")

    from cluster.app import POLL_SECONDS, watch_start
    from cluster.room import WAITS

    try:
        while not watch_start(tell):
            if stop.wait(POLL_SECONDS):
                return f"not all of the {replicas} replicas were up yet"
    except EchelonError as e:
        return f"not all of the {replicas} replicas are up; the others serve on: {e}"
    return f"all {replicas} replicas are up after {time.monotonic() - started:.1f} s"


def say_what_waits(stop: threading.Event, say: Callable[[str], None]) -> None:
    """Until `stop`: say which replicas find no room, whenever that changes. Runs in a thread of its own, since Ray
    answers nothing while its head is away.
    """
    from ray.exceptions import RayError

    from cluster.room import waiting_replicas

    said: list[str] = []
    while not stop.wait(WATCH_SECONDS):
        try:
            lines = waiting_replicas()
        except RayError as e:
            lines = [f"Ray does not say what waits for room: {e}"]
        for line in lines:
            if line not in said:
                say(f"warning: {line}")
        said = lines


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def stop_running(port: int) -> str:
    """Stop the `echelon serve` on `port` and return what to print. Raises EchelonError when there is none."""
    note = note_path(port)
    try:
        said = json.loads(note.read_text())
        pid, began = int(said["pid"]), int(said["began"])
        if _began(pid) != began:  # it is gone, or its number has gone to another process
            note.unlink(missing_ok=True)
            return f"process {pid} was gone already; its note is removed"
        os.kill(pid, signal.SIGTERM)
    except FileNotFoundError as e:
        raise EchelonError(f"nothing that this user started serves on port {port}") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EchelonError(f"{note} does not name a process of this user ({e}): remove it") from e
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if not note.exists():
            return f"stopped the server on port {port}"
        if _began(pid) != began:
            note.unlink(missing_ok=True)
            return f"process {pid} ended without cleaning up; its note is removed"
        time.sleep(0.1)
    raise EchelonError(f"process {pid} has not stopped within {STOP_SECONDS:.0f} s; kill it with kill -9 {pid}")


def stop_cluster(address: str) -> str:
    """Stop what a killed `echelon serve --address` left there; returns what to print. Raises EchelonError."""
    prepare_ray()
    from cluster.app import stop_at

    stop_at(address)
    return f"stopped the Echelon in the Ray cluster at {address}"


def ray_address(port: int) -> str:
    """Where the Ray of the `echelon serve` on `port` is. Raises EchelonError when there is none, or not yet."""
    try:
        said = json.loads(note_path(port).read_text())
        if _began(int(said["pid"])) == int(said["began"]):
            return str(said["ray"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    raise EchelonError(f"nothing that this user started serves on port {port}, or it is still starting")


def upgrade_running(model: str, flags: dict[str, Any], *, address: str | None, restart: bool) -> str:
    """Upgrade what runs, on the port of `flags` or the file, or in Ray at `address`; what to print.

    Raises EchelonError.
    """
    config = cluster_config(model, flags)
    where = address or ray_address(config.http.port)
    prepare_ray()
    from cluster.start_watch import watched_start
    from cluster.upgrade import upgrade

    with start_view(Console(stderr=True, highlight=False), _say) as view, watched_start(view.show):
        return upgrade(config, address=where, restart=restart, progress=view.say)


def drain_running(target: str, *, port: int, address: str | None, timeout: float) -> str:
    """Drain a replica or node of what runs; what to print. Raises EchelonError."""
    where = address or ray_address(port)
    prepare_ray()
    from cluster.drain_command import drain

    return drain(target, address=where, timeout=timeout, progress=_say)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def stop_all() -> str:
    """Stop every `echelon serve` of this user on this machine; what to print. Raises EchelonError where one stays."""
    ports = [int(path.stem.removeprefix("serve-")) for path in state_dir().glob("serve-*.json")]
    return "\n".join(stop_running(port) for port in sorted(ports)) or "nothing that this user started serves here"


def _began(pid: int) -> int | None:
    """When process `pid` began, in the kernel's clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])
