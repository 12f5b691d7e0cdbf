"""HAProxy's configuration as Ray Serve writes it, made fit for the open. haproxy.sh runs this file before HAProxy.

It imports the standard library only: it runs at every change of the cluster, while requests wait. Ray Serve writes the
file anew before each run. A file that does not look as Ray 2.60 writes it is refused: HAProxy then does not start, and
`refusal_of` tells the starting process why.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

MARK = "# Edited by Echelon: cluster/edge.py"
OWN_CONNECTIONS = 100  # statistics, metrics, checks: beside what clients may hold
METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS"
SANE_ID = "^[A-Za-z0-9._:/+=@-]{1,128}$"
REQUEST_ID = "%[var(txn.echelon_id)]"

# What a client may say to nobody behind the edge: whose request it is, and what Serve would obey.
DROPPED_PREFIXES = ("x-forwarded", "x-echelon", "x-serve-")
DROPPED_HEADERS = (
    "forwarded",
    "upgrade",
    "http2-settings",
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve_multiplexed_model_id",
    "serve-multiplexed-model-id",
)
# Since TLS 1.2: forward secrecy and authenticated encryption only. TLS 1.3 has nothing else.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
BUFFER_BYTES = 16 << 10  # of a body, that HAProxy waits for
# An HAProxy whose successor has taken over ends with its last stream; one that hangs in it, after so many seconds.
LONGEST_STREAM = 86_400


class UnfitConfiguration(Exception):
    """The configuration, or what the edge was told, cannot be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class EdgeSettings:
    """What the edge is told. Seconds, bytes, counts.

    `secret` tells the ingress that a request came through here. `host` is where clients are listened for: Serve itself
    listens on loopback. `buffer_timeout` is for the first BUFFER_BYTES of a body, at the pace that an ingress asks for.
    `tls_cert` and `tls_key` are PEM files, both or none.
    """

    secret: str = dataclasses.field(repr=False)
    host: str
    max_body_bytes: int
    max_connections: int
    header_timeout: float
    buffer_timeout: float
    idle_timeout: float
    keep_alive_timeout: float
    tls_cert: str | None = None
    tls_key: str | None = None

    def write(self, path: Path) -> None:
        """Put them where the wrapper finds them; only the owner reads them."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            json.dump(dataclasses.asdict(self), f)

    @classmethod
    def read(cls, path: Path) -> EdgeSettings:
        """What `write` wrote. Raises UnfitConfiguration."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as e:
            raise UnfitConfiguration(f"no settings of the edge in {path}: {e}") from e


def edited(text: str, settings: EdgeSettings, pem: Path) -> str:
    """The configuration `text` with our rules. `pem`: certificate and key in one file, used where there is TLS.

    Raises UnfitConfiguration.
    """
    if text.startswith(MARK):
        return text
    sections = _sections(text)
    for title in ("global", "defaults", "frontend prometheus", "frontend http_frontend", "listen stats"):
        if title not in sections:
            raise UnfitConfiguration(f"there is no section {title!r}")
    for title, lines in sections.items():
        known = title in ("frontend prometheus", "frontend http_frontend", "listen stats", "global", "defaults")
        if not known and not title.startswith("backend "):
            raise UnfitConfiguration(f"nobody guards the section {title!r}")
        if title.startswith("backend ") and any(_words(line)[:1] == ["bind"] for line in lines):
            raise UnfitConfiguration(f"{title!r} listens")
    _edit_global(sections["global"], settings)
    _edit_defaults(sections["defaults"], settings)
    for title in ("frontend prometheus", "listen stats"):
        _replace(sections[title], r"bind \*?:(\d+)", r"bind 127.0.0.1:\1")
    _edit_front(sections["frontend http_frontend"], settings, pem)
    if "backend default_backend" in sections:
        _replace(
            sections["backend default_backend"],
            r"http-request return status 404 .*",
            _returned(503, "The server is starting.", "service_unavailable_error", "starting", "hdr retry-after 1"),
        )
    body = "\n".join(line for title, lines in sections.items() for line in (title, *lines))
    return f"{MARK}\n{body}\n"


def _sections(text: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "\t", "#"):
            title = " ".join(line.split())
            if title in sections:
                raise UnfitConfiguration(f"the section {title!r} stands there twice")
            lines = sections[title] = []
        elif lines is not None:
            lines.append(line)
        elif _words(line):
            raise UnfitConfiguration(f"{line.strip()!r} stands before the first section")
    return sections


def _words(line: str) -> list[str]:
    return [] if line.lstrip().startswith("#") else line.split()


def _replace(lines: list[str], pattern: str, by: str, *, times: int = 1) -> None:
    found = [i for i, line in enumerate(lines) if re.fullmatch(pattern, line.strip())]
    if len(found) != times:
        raise UnfitConfiguration(f"{pattern!r} was expected {times} times, it is there {len(found)} times")
    for i in found:
        lines[i] = "    " + re.sub(pattern, by, lines[i].strip())


def _edit_global(lines: list[str], settings: EdgeSettings) -> None:
    _replace(lines, r"(stats socket \S+) mode 666 (level admin.*)", r"\1 mode 600 \2")
    _replace(lines, r"maxconn \d+", f"maxconn {settings.max_connections + OWN_CONNECTIONS}")
    _replace(lines, r"hard-stop-after \d+s", f"hard-stop-after {LONGEST_STREAM}s")


def _edit_defaults(lines: list[str], settings: EdgeSettings) -> None:
    _replace(lines, r"timeout client \d+s", f"timeout client {_milliseconds(settings.idle_timeout)}")
    keep_alive = f"timeout http-keep-alive {_milliseconds(settings.keep_alive_timeout)}"
    _replace(lines, r"timeout http-keep-alive \d+s", keep_alive)
    if any(_words(line)[:2] == ["timeout", "http-request"] for line in lines):
        raise UnfitConfiguration("it has a deadline for headers already")
    # Serve turns 502, 503 and 504 into a bare 500.
    _replace(lines, r"errorfile 50[234] \S+", "# its error page is ours", times=3)
    too_large = f"The request body is larger than {settings.max_body_bytes} bytes."
    refused, failed = "invalid_request_error", "server_error"
    lines += [
        f"    timeout http-request {_milliseconds(settings.header_timeout)}",
        "    " + _error(400, "The request is not valid HTTP.", refused, None),
        "    " + _error(408, "The request did not come in time.", refused, "request_timeout"),
        "    " + _error(413, too_large, refused, "request_too_large"),
        "    " + _error(500, "The server had an error while processing your request.", failed, None),
        "    " + _error(502, "The server broke off its answer.", failed, "bad_gateway"),
        "    " + _error(503, "No front takes requests.", "service_unavailable_error", "no_front", "hdr retry-after 1"),
        "    " + _error(504, "The server did not answer in time.", failed, "gateway_timeout"),
    ]


def _edit_front(lines: list[str], settings: EdgeSettings, pem: Path) -> None:
    tls = settings.tls_cert is not None
    # HTTP/1.1 only: what HAProxy would take as HTTP/2 without being asked has other limits.
    options = "proto h1"
    if tls:
        options = f"ssl crt {pem} alpn http/1.1 ssl-min-ver TLSv1.2 ciphers {CIPHERS} no-tls-tickets"
    if any(_words(line)[:1] == ["maxconn"] for line in lines):
        raise UnfitConfiguration("its front has a cap on connections already")
    _replace(lines, r"bind \S*?:(\d+)", rf"bind {_listened(settings.host)} {options}")
    at = next(i for i, line in enumerate(lines) if _words(line)[:1] == ["bind"]) + 1
    rules = _front_rules(settings, "https" if tls else "http")
    lines[at:at] = [f"    maxconn {settings.max_connections}", *("    " + rule for rule in rules)]


def _front_rules(settings: EdgeSettings, scheme: str) -> Iterable[str]:
    refused = "invalid_request_error"
    for prefix in DROPPED_PREFIXES:
        yield f"http-request del-header {prefix} -m beg"
    for name in DROPPED_HEADERS:
        yield f"http-request del-header {name}"
    yield "http-request set-var(txn.echelon_id) req.fhdr(x-request-id) if { req.fhdr_cnt(x-request-id) eq 1 } " + (
        f"{{ req.fhdr(x-request-id) -m reg '{SANE_ID}' }}"
    )
    yield "http-request set-var-fmt(txn.echelon_id) req-%[uuid] unless { var(txn.echelon_id) -m found }"
    yield f"http-request set-header x-request-id {REQUEST_ID}"
    yield f"http-response set-header x-request-id {REQUEST_ID}"
    yield "http-request set-header x-forwarded-for %[src]"
    yield f"http-request set-header x-forwarded-proto {scheme}"
    yield f"http-request set-header x-echelon-edge {settings.secret}"
    # Serve's own routes answer without a key; the ingress decodes a path once before it looks. Probes of this machine
    # may ask whether Serve is healthy.
    internal = _returned(404, "Invalid URL.", refused, "unknown_url")
    yield f"{internal} if {{ path,url_dec -m beg /-/ }} !{{ path /-/healthz }}"
    yield f"{internal} if {{ path /-/healthz }} !{{ src 127.0.0.0/8 ::1 }}"
    allow = f"hdr allow '{', '.join(METHODS.split())}'"
    yield _returned(405, "No such method here.", refused, "method_not_supported", allow) + (
        f" unless {{ method {METHODS} }}"
    )
    too_large = f"The request body is larger than {settings.max_body_bytes} bytes."
    yield _returned(413, too_large, refused, "request_too_large") + (
        f" if {{ req.body_size gt {settings.max_body_bytes} }}"
    )
    # Where a body is still under way when the server is chosen, HAProxy mostly tells nobody that its client has left.
    yield f"http-request wait-for-body time {_milliseconds(settings.buffer_timeout)} if METH_POST"


def _listened(host: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.:_-]*|\*", host):
        raise UnfitConfiguration(f"{host!r} is no address")
    if host == "::":
        return r"[::]:\1 v4v6"
    if host in ("", "*"):
        host = "0.0.0.0"
    return rf"[{host}]:\1" if ":" in host else rf"{host}:\1"


def _milliseconds(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _json(message: str, kind: str, code: str | None) -> str:
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error}).replace("%", "%%")
    return f"content-type application/json lf-string '{body}' hdr x-request-id {REQUEST_ID}"


def _returned(status: int, message: str, kind: str, code: str | None, headers: str = "") -> str:
    return f"http-request return status {status} {_json(message, kind, code)} {headers}".rstrip()


def _error(status: int, message: str, kind: str, code: str | None, headers: str = "") -> str:
    return f"http-error status {status} {_json(message, kind, code)} {headers}".rstrip()


def refusal_of(settings_path: Path) -> str | None:
    """Why HAProxy did not start at its last run with these settings; None when it did."""
    try:
        return settings_path.with_suffix(".refusal").read_text()
    except FileNotFoundError:
        return None


def edit_file(configuration: Path, settings_path: Path, haproxy: str) -> None:
    """Edit `configuration` in place and let HAProxy check it. Raises UnfitConfiguration."""
    settings = EdgeSettings.read(settings_path)
    pem = settings_path.with_name("tls.pem")
    try:
        if settings.tls_cert is not None and settings.tls_key is not None:
            parts = [Path(p).read_bytes() for p in (settings.tls_cert, settings.tls_key)]
            _put(pem, b"\n".join(parts))
        _put(configuration, edited(configuration.read_text(), settings, pem).encode())
    except OSError as e:
        raise UnfitConfiguration(str(e)) from e
    needed = 2 * (settings.max_connections + OWN_CONNECTIONS) + 200
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UnfitConfiguration(
            f"{settings.max_connections} connections take {needed} open files, {limit} are allowed (ulimit -Hn): "
            "allow more, or set http.max_connections lower"
        )
    check = subprocess.run([haproxy, "-c", "-q", "-f", str(configuration)], capture_output=True, text=True, check=False)
    if check.returncode != 0:
        raise UnfitConfiguration(f"HAProxy does not take it: {check.stderr.strip()[-1000:]}")


def _put(path: Path, content: bytes) -> None:
    """Replace `path` at once; only the owner reads it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as f:  # made 0600
        f.write(content)
    os.replace(f.name, path)


def main(settings_path: Path, haproxy: str, arguments: list[str]) -> None:
    """Edit the file that follows `-f`, then become HAProxy. Leaves the process with 1 where it is unfit."""
    refusal = settings_path.with_suffix(".refusal")
    try:
        if "-f" in arguments:
            edit_file(Path(arguments[arguments.index("-f") + 1]), settings_path, haproxy)
    except UnfitConfiguration as e:
        text = f"the HAProxy configuration of Ray Serve cannot be guarded: {e}"
        refusal.write_text(text)
        sys.exit(text)
    refusal.unlink(missing_ok=True)
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
