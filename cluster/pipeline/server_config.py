"""What LMDeploy's `serve api_server` says, as a cluster config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, checked_config
from cluster.environment import ssl_files, state_dir
from cluster.names import PORT
from cluster.pipeline.engine_config import BackendConfig
from cluster.pipeline.pipeline import LEVELS, model_config
from router.keys.edit import add_key
from router.text.chat_classes import ChatTemplateConfig
from workers.api.errors import ConfigError

OWNER = "api"  # of keys that are given by themselves


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """`server_name` None: loopback without keys, every address with them. `api_keys`: keys, or one key file.

    `cors` are fields of the file's `http` section.
    """

    server_name: str | None = None
    server_port: int = PORT
    log_level: str = "ERROR"
    api_keys: Sequence[str] = field(default=(), repr=False)
    ssl: bool = False
    no_auth: bool = False
    qos_config_path: str | None = None
    cors: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """Of a cluster file's `log` section. Raises ConfigError."""
        level = self.log_level.upper()
        if level not in LEVELS:
            raise ConfigError(f"log_level {self.log_level!r} is not one of {', '.join(LEVELS)}")
        return "error" if level == "CRITICAL" else level.lower()


def server_config(
    path: str,
    name: str | None,
    backend: BackendConfig | None,
    template: ChatTemplateConfig | None,
    options: ServerOptions,
    fields: dict[str, Any],
) -> ClusterConfig:
    """The config of a server of one model; `fields` are more of its section. Raises ConfigError."""
    config = model_config(path, name, backend, template, fields, elsewhere=True)
    values = config.model_dump() | {"http": http_section(options), "log": {"level": options.level}}
    if options.qos_config_path is not None:
        values["dispatch"] = {"qos": str(Path(options.qos_config_path).absolute())}
    return checked_config(values, "the options")


def http_section(options: ServerOptions) -> dict[str, Any]:
    """The file's section. Raises ConfigError."""
    keys = _key_file(options.api_keys, options.server_port)
    host = options.server_name or ("127.0.0.1" if keys is None and not options.no_auth else "0.0.0.0")
    http: dict[str, Any] = {"host": host, "port": options.server_port, **options.cors}
    if keys is not None:
        http["api_keys"] = keys
    elif options.no_auth:
        http["no_auth"] = True
    if options.ssl:
        http["tls_cert"], http["tls_key"] = ssl_files()
    return http


def _key_file(keys: Sequence[str], port: int) -> str | None:
    """The key file that is given, or a private one with the keys that are, all of them of one owner."""
    if not keys:
        return None
    if len(keys) == 1 and Path(keys[0]).is_file():
        return str(Path(keys[0]).absolute())
    file = state_dir() / f"api-server-{port}-keys.yaml"
    file.unlink(missing_ok=True)
    for key in dict.fromkeys(keys):
        add_key(file, key, OWNER)
    return str(file)
