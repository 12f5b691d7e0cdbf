"""The certificate that the front shows: checked before anything starts, with what a client needs to trust it."""

from __future__ import annotations

import shlex
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workers.api.errors import ConfigError

NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which `ssl` has no name


@dataclass(frozen=True, slots=True)
class Certificate:
    """What clients will see.

    `warning` says what is wrong with it today; `trusted`: this system's authorities know it; `names` are the DNS names
    and addresses that it is for.
    """

    path: Path
    trusted: bool
    names: tuple[str, ...]
    warning: str | None

    def curl_options(self, url: str) -> tuple[str, str]:
        """`url` as this certificate answers to it, and the options with which curl gets there from this machine."""
        options = "" if self.trusted else f" --cacert {shlex.quote(str(self.path))}"
        parts = urlsplit(url)
        named = [n for n in self.names if "*" not in n]
        if parts.hostname in self.names or not named:
            return url, options
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
        other = parts._replace(netloc=f"{named[0]}:{parts.port}")
        return other.geturl(), f"{options} --resolve {named[0]}:{parts.port}:{host}"


def read_certificate(cert: str, key: str) -> Certificate:
    """Check the PEM files of a certificate (with its chain) and of its key. Raises ConfigError with what to do."""
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        try:
            text = Path(path).read_bytes()
        except OSError as e:
            raise ConfigError(f"cannot read http.{name} {path}: {e.strerror}") from e
        if b"ENCRYPTED" in text:
            raise ConfigError(f"http.{name} {path} is encrypted: nobody is there to give a password when it is read")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(cert, key)
    except ssl.SSLError as e:
        if e.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"http.tls_key {key} is not the key of http.tls_cert {cert}") from e
        raise ConfigError(
            f"http.tls_cert {cert} and http.tls_key {key} are not a certificate and its key in PEM format: {e}"
        ) from e
    shown = _shown_to(context_trusting(Path(cert)), server)
    strict = context_trusting(Path(cert))
    strict.verify_flags &= ~NO_CHECK_TIME
    warning = None
    try:
        _shown_to(strict, server)
    except ssl.SSLCertVerificationError as e:
        warning = f"clients will refuse the certificate {cert}: {e.verify_message}"
    names = tuple(name for kind, name in shown.get("subjectAltName", ()) if kind in ("DNS", "IP Address"))
    return Certificate(Path(cert), _is_trusted(server), names, warning)


def context_trusting(cert: Path) -> ssl.SSLContext:
    """A client's context that takes the certificate in the PEM file `cert`, and no other, whatever its name and age."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cert)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
    return context


def _is_trusted(server: ssl.SSLContext) -> bool:
    everybody = ssl.create_default_context()
    everybody.check_hostname = False
    everybody.verify_flags |= NO_CHECK_TIME
    try:
        _shown_to(everybody, server)
    except ssl.SSLCertVerificationError:
        return False
    return True


def _shown_to(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, Any]:
    """The certificate that `client` sees in a handshake with `server`, in memory. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    ends = [asking, server.wrap_bio(to_server, to_client, server_side=True)]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue  # the other one's turn
    return asking.getpeercert() or {}
