"""The QoS file of a running cluster: read again when it changes, and refused whole when it is bad."""

from __future__ import annotations

import logging
from pathlib import Path

from router.qos.config import QosConfig
from router.qos.file import load_qos_config
from workers.api.errors import ConfigError

log = logging.getLogger("echelon.qos")


class QosFile:
    """Looks at `path`, which holds what was loaded last; the first look takes it as new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._settled = False

    def look(self) -> QosConfig | None:
        """The new configuration if the file has changed and is good. A bad one is said in the log, once."""
        try:
            stat = self._path.stat()
        except OSError as e:
            seen: tuple[int, ...] = (-1,)
            reason = f"cannot read {self._path}: {e.strerror}"
        else:
            seen, reason = (stat.st_mtime_ns, stat.st_size, stat.st_ino), ""
        if seen == self._seen and self._settled:
            return None
        # Two writes within one tick of the file system's clock look alike: after a change the text is read twice.
        self._settled, self._seen = seen == self._seen, seen
        try:
            if reason:
                raise ConfigError(reason)
            return load_qos_config(self._path)
        except ConfigError as e:
            if self._settled:
                log.error("the QoS configuration stays as it was: %s", e)
            return None
