"""An application behind a real uvicorn on a loopback port, in a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn


@contextlib.contextmanager
def serving(app: Any, send_buffer: int | None = None, port: int = 0) -> Iterator[tuple[str, int]]:
    """The address at which `app` is served, on the kind of event loop that Ray Serve has.

    `send_buffer` (bytes) makes the kernel's buffers small.
    """
    listener = socket.create_server(("127.0.0.1", port))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    # Idle connections stay: a test that is held up between two requests finds its own.
    config = uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1, timeout_keep_alive=600)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
