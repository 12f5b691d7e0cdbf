"""`serve`: a server in a process of its own, for as long as this one lives, and a client of it."""

from __future__ import annotations

import atexit
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cluster.config import ClusterConfig
from cluster.detached import POLL_SECONDS, answers
from cluster.environment import fresh_environment, state_dir
from cluster.first_answer import base_url
from cluster.names import PORT
from cluster.pipeline.api_client import APIClient
from cluster.pipeline.engine_config import BackendConfig
from cluster.pipeline.server_config import ServerOptions, server_config
from cluster.serving import note_path, refuse_open_house, refuse_taken_port
from router.text.chat_classes import ChatTemplateConfig
from workers.api.errors import EchelonError

STOP_SECONDS = 30.0


class Served(APIClient):
    """A client of a server that was started for it; `close`, or the end of this process, stops that."""

    def __init__(self, config: ClusterConfig, api_key: str | None = None) -> None:
        http = config.http
        super().__init__(base_url(http.host, http.port, tls=http.tls_cert is not None), api_key)
        refuse_open_house(config)
        refuse_taken_port(http.host, http.port)
        self._files = [state_dir() / f"served-{uuid.uuid4().hex}{suffix}" for suffix in (".yaml", ".log")]
        file, log = self._files
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"models"})))
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from cluster.cli import main; main()", "serve", "model", str(file)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=fresh_environment(),
            )  # fmt: skip
        atexit.register(self.close)
        try:
            self._await(note_path(http.port), log)
        except BaseException:
            self.close()
            raise

    def _await(self, note: Path, log: Path) -> None:
        while not answers(note, self._process.pid):
            if (status := self._process.poll()) is not None:
                words = log.read_text(errors="replace").strip()[-2000:]
                raise EchelonError(f"the server ended with {status}: {words}")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """The server has ended. A second time does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for file in self._files:
            file.unlink(missing_ok=True)
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(
    model_path: str,
    model_name: str | None = None,
    backend: str | None = None,
    backend_config: BackendConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    server_name: str | None = None,
    server_port: int = PORT,
    log_level: str = "ERROR",
    api_keys: str | Sequence[str] | None = None,
    ssl: bool = False,
    **kwargs: Any,
) -> Served:
    """Serve a model over HTTP from a process of its own, on `server_port`; returns once it answers.

    Without `api_keys` it listens on loopback alone (`server_name` None) and refuses other addresses, unless `no_auth`
    is True. `ssl`: with the PEM files that $SSL_CERTFILE and $SSL_KEYFILE name. `backend` is accepted: there is one
    engine. Other keywords are fields of a cluster file's model section. Raises EchelonError.
    """
    keys = [api_keys] if isinstance(api_keys, str) else list(api_keys or ())
    options = ServerOptions(
        server_name, server_port, log_level, keys, ssl, bool(kwargs.pop("no_auth", False)),
        kwargs.pop("qos_config_path", None),
    )  # fmt: skip
    if backend is not None:
        kwargs["backend"] = backend
    config = server_config(model_path, model_name, backend_config, chat_template_config, options, kwargs)
    return Served(config, keys[0] if keys and not Path(keys[0]).is_file() else None)
