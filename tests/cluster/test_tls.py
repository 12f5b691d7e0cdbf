"""Certificates are looked at before anything starts."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import pytest
from haproxy_run import TLS, new_edge, settings

from cluster.first_answer import await_answer, base_url
from cluster.serving import cluster_config
from cluster.tls import context_trusting, read_certificate
from workers.api.errors import ConfigError, EchelonError

CERT, KEY = str(TLS / "cert.pem"), str(TLS / "key.pem")
EXPIRED = str(TLS / "expired-cert.pem")


def test_a_good_one() -> None:
    found = read_certificate(CERT, KEY)
    assert found.warning is None
    assert not found.trusted
    assert found.names == ("localhost", "127.0.0.1")
    assert found.curl_options("https://127.0.0.1:1/v1") == ("https://127.0.0.1:1/v1", f" --cacert {CERT}")
    assert found.curl_options("https://[::1]:1/v1") == (
        "https://localhost:1/v1",
        f" --cacert {CERT} --resolve localhost:1:[::1]",
    )


def test_one_that_the_system_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting() -> ssl.SSLContext:
        return context_trusting(Path(CERT))

    monkeypatch.setattr(ssl, "create_default_context", trusting)
    found = read_certificate(CERT, KEY)
    assert found.trusted
    assert found.curl_options("https://127.0.0.1:1/v1")[1] == ""


def test_an_expired_one_is_a_warning() -> None:
    found = read_certificate(EXPIRED, str(TLS / "expired-key.pem"))
    assert found.warning
    assert "expired" in found.warning
    assert found.curl_options("https://127.0.0.1:1/v1")[0] == "https://front.example:1/v1"


@pytest.mark.parametrize(
    ("cert", "key", "named"),
    [
        (CERT, str(TLS / "expired-key.pem"), "is not the key of"),
        (CERT, str(TLS / "encrypted-key.pem"), "encrypted"),
        (CERT, "/no/such.pem", r"http\.tls_key /no/such\.pem: No such file"),
        ("/no/such.pem", KEY, r"http\.tls_cert /no/such\.pem"),
        (CERT, CERT, "not a certificate and its key"),
        (KEY, KEY, "not a certificate and its key"),
        (CERT, __file__, "not a certificate and its key"),
        (CERT, str(TLS), "Is a directory"),
    ],
)
def test_what_cannot_serve_is_refused(cert: str, key: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_certificate(cert, key)


def test_files_are_relative_to_the_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("http: {tls_cert: cert.pem, tls_key: ~/key.pem}")
    http = cluster_config(str(tmp_path / "cluster.yaml"), {}).http
    assert http.tls_cert == str(tmp_path / "cert.pem")
    assert http.tls_key == str(Path.home() / "key.pem")


@pytest.mark.parametrize(("cert", "key"), [(CERT, KEY), (EXPIRED, str(TLS / "expired-key.pem"))])
def test_the_first_answer_comes_by_tls(cert: str, key: str) -> None:
    edge = new_edge()
    process = edge.run(edge.text(), settings(tls_cert=cert, tls_key=key))
    try:
        url = base_url("0.0.0.0", edge.port, tls=True)
        assert url == f"https://127.0.0.1:{edge.port}/v1"
        await_answer(url, "demo", 60.0, trust=context_trusting(Path(cert)))
        other = context_trusting(Path(EXPIRED if cert == CERT else CERT))
        with pytest.raises(EchelonError, match="CERTIFICATE"):
            await_answer(url, "demo", 0.1, trust=other)
    finally:
        process.terminate()
        process.communicate(timeout=20)
        edge.backend.shutdown()
        edge.backend.server_close()
        shutil.rmtree(edge.folder)
