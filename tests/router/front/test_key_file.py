"""The key file: what is wrong is named with its line, a change is taken while the server runs, edits keep the rest."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.keys.edit import add_key, revoke_key
from router.keys.file import parse_keys, read_key_file
from router.keys.live import LiveKeys
from router.keys.ring import KeyEntry, KeyRing, digest_of, make_key, masked
from workers.api.errors import ConfigError, NotAuthorized

KEY, OTHER = "ek-" + "a" * 43, "ek-" + "b" * 43
A, B = (digest_of(k.encode()).hex() for k in (KEY, OTHER))

FILE = f"""# who may come
keys:
  # the first
  - sha256: {A}
    owner: anna
    tier: gold
    models: [demo, "org/x"]
  - sha256: "{B.upper()}"
    owner: ben
    revoked: true
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.yaml"


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_becomes_a_ring():
    ring = parse_keys(FILE.encode(), "keys.yaml")
    assert ring.entries == (
        KeyEntry(bytes.fromhex(A), "anna", "gold", frozenset({"demo", "org/x"})),
        KeyEntry(bytes.fromhex(B), "ben", revoked=True),
    )
    anna = ring.identity(KEY.encode())
    assert (anna.owner, anna.tier, anna.salt, anna.may_use("demo"), anna.may_use("y")) == (
        "anna",
        "gold",
        b"anna",
        True,
        False,
    )
    with pytest.raises(NotAuthorized, match="revoked"):
        ring.identity(OTHER.encode())
    with pytest.raises(NotAuthorized, match="Incorrect"):
        ring.identity(bytes.fromhex(A))
    for nothing in (None, b""):
        with pytest.raises(NotAuthorized) as e:
            ring.identity(nothing)
        assert e.value.code is None
    assert parse_keys(b"keys: []", "keys.yaml").entries == ()


BAD = [
    ("", 1, "empty"),
    ("# only a comment\n", 1, "empty"),
    ("- a\n", 1, "mapping"),
    ("keys:\n", 1, "list"),
    ("keys: {}\n", 1, "list"),
    ("kyes: []\n", 1, "kyes"),
    ("keys: []\nmore: 1\n", 2, "more"),
    ("keys: []\nkeys: []\n", 2, "twice"),
    ("keys:\n- owner: [\n", 3, "expected"),
    ("keys:\n\t- a\n", 2, "token"),
    ("keys:\n- anna\n", 2, "mapping"),
    (f"keys:\n- sha256: {A}\n", 2, "owner"),
    ("keys:\n- owner: anna\n", 2, "sha256"),
    (f"keys:\n- sha256: {A[:-1]}\n  owner: anna\n", 2, "sha256"),
    (f"keys:\n- sha256: {A}\n\n  owner: anna b\n", 4, "owner"),
    (f"keys:\n- sha256: {A}\n  owner: 7\n", 3, "owner"),
    (f"keys:\n- sha256: {A}\n  owner: default\n", 3, "default"),
    (f"keys:\n- sha256: {A}\n  owner: anna\n  tyre: gold\n", 4, "tyre"),
    (f"keys:\n- sha256: {A}\n  owner: anna\n  models: demo\n", 4, "models"),
    (f"keys:\n- sha256: {A}\n  owner: anna\n  models:\n  - 1\n", 5, "models.0"),
    (f"keys:\n- sha256: {A}\n  owner: anna\n  revoked: 1\n", 4, "revoked"),
    (f"keys:\n- sha256: {A}\n  owner: anna\n  owner: ben\n", 4, "twice"),
    (f"keys:\n- sha256: {A}\n  owner: anna\n- sha256: {A.upper()}\n  owner: ben\n", 4, "line 2"),
    (f"keys:\n- sha256: {A}\n  owner: !!python/object:os.system x\n", 3, "plain"),
    (f"keys:\n- sha256: {A}\n  owner: 2001-99-99\n", 3, "plain"),
    ("keys:\n- " + "[" * 100_000, 2, "too deep"),
    ("keys:\n" + "- " * 100_000, 2, "too deep"),
    ("{keys: " * 100_000, 1, "too deep"),
    ("keys: &a [*a]\n", 1, "mapping"),
    (f"keys:\n- sha256: {A}\n  owner: anna\n  models: &m [*m]\n", 4, "models.0"),
]


@pytest.mark.parametrize(("text", "line", "reason"), BAD)
def test_what_is_wrong_has_its_line(text, line, reason):
    with pytest.raises(ConfigError) as e:
        parse_keys(text.encode(), "keys.yaml")
    assert str(e.value).startswith(f"keys.yaml, line {line}: ")
    assert reason in str(e.value)
    assert len(str(e.value)) < 300


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_is_refused_or_harmless(data):
    """Pieces cut out, doubled or replaced: a ring or a ConfigError, nothing else."""
    text = FILE.encode()
    for _ in range(data.draw(st.integers(1, 3))):
        at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        text = text[:at] + data.draw(st.binary(max_size=8) | st.just(text[at:end] * 2)) + text[end:]
    with contextlib.suppress(ConfigError):
        assert len(parse_keys(text, "keys.yaml").entries) < 100


@pytest.mark.parametrize("text", [b"\xff\xfe\xff", b"keys: \x00", b"\xed\xa0\x80"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        parse_keys(text, "keys.yaml")


def test_a_key_in_place_of_its_hash_is_not_shown():
    for field in ("sha256", "owner", "tier"):
        values = {"sha256": A, "owner": "anna", field: KEY + " "}
        text = "keys:\n- " + "\n  ".join(f'{k}: "{v}"' for k, v in values.items())
        with pytest.raises(ConfigError) as e:
            parse_keys(text.encode(), "keys.yaml")
        assert KEY not in str(e.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(path, mode):
    with pytest.raises(ConfigError, match="chmod go-w"):
        read_key_file(write(path, FILE, mode))
    assert read_key_file(write(path, FILE, 0o644)) == FILE.encode()
    with pytest.raises(ConfigError, match="No such file"):
        read_key_file(path.with_name("absent"))


@pytest.fixture
def live(path):
    keys = LiveKeys(write(path, FILE), own=(KeyEntry(digest_of(b"own"), "default"),), poll_seconds=3600)
    yield keys
    keys.close()


def test_a_change_is_taken(live, path, caplog):
    caplog.set_level(logging.INFO)
    assert live.identity(KEY.encode()).owner == "anna"
    write(path, FILE.replace("    revoked: true\n", ""))
    with pytest.raises(NotAuthorized):
        live.identity(OTHER.encode())
    live.look()
    assert live.identity(OTHER.encode()).owner == "ben"
    live.look()  # reads once more, and finds the same
    write(path, "keys: []")
    live.look()
    with pytest.raises(NotAuthorized):
        live.identity(KEY.encode())
    assert live.identity(b"own").owner == "default"
    assert [r.getMessage() for r in caplog.records] == [f"API keys of {path} read again: {n}" for n in (2, 0)]


def bad_states(path):
    write(path, "keys:\n- owner: anna\n")
    yield "line 2"
    write(path, "")
    yield "empty"
    write(path, FILE, 0o666)
    yield "written by others"
    path.unlink()
    yield "No such file"


def test_a_bad_change_is_refused_whole_and_said_once(live, path, caplog):
    for reason in bad_states(path):
        caplog.clear()
        for _ in range(4):
            live.look()
        assert live.identity(KEY.encode()).owner == "anna"
        assert len(caplog.records) == 1, reason
        assert reason in caplog.text
    write(path, FILE.replace("anna", "zoe"))
    live.look()
    assert live.identity(KEY.encode()).owner == "zoe"


def test_two_writes_within_one_tick_are_seen(live, path):
    """The file system's clock may give both the same time: the second is found by reading once more."""
    write(path, FILE.replace("anna", "zoe1"))
    live.look()
    before = path.stat()
    with path.open("r+") as f:
        f.write(FILE.replace("anna", "zoe2"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    live._signature = live._look()  # as if the inode's change had fallen into the same tick
    live.look()
    assert live.identity(KEY.encode()).owner == "zoe2"


def test_nothing_is_read_while_nothing_changes(live, path, monkeypatch):
    live.look()
    monkeypatch.setattr("router.keys.live.read_key_file", lambda path: pytest.fail("read again"))
    for _ in range(5):
        live.look()
        live.identity(KEY.encode())


def test_the_file_is_watched_by_a_thread_that_ends(path):
    before = threading.active_count()
    keys = LiveKeys(write(path, FILE), poll_seconds=0.01)
    taken = threading.Event()
    original = keys._parsed

    def parsed(text):
        ring = original(text)
        taken.set()
        return ring

    keys._parsed = parsed
    write(path, FILE.replace("anna", "zoe"))
    assert taken.wait(30)
    keys.close()
    assert keys.identity(KEY.encode()).owner == "zoe"
    assert threading.active_count() == before


def test_a_defect_does_not_end_the_watch(path, caplog):
    keys = LiveKeys(write(path, FILE), poll_seconds=0.01)
    looked = threading.Semaphore(0)

    def look():
        looked.release()
        raise RuntimeError("a defect")

    keys.look = look
    for _ in range(3):
        assert looked.acquire(timeout=30)
    keys.close()
    assert "a defect" in caplog.text


def test_the_first_file_must_be_good(path):
    before = threading.active_count()
    for text in ("", "keys: 1"):
        with pytest.raises(ConfigError, match="line 1"):
            LiveKeys(write(path, text))
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        LiveKeys(path)
    assert threading.active_count() == before


STYLES = [
    FILE,
    FILE.rstrip("\n"),
    "keys: []\n",
    "keys: [  ]",
    f"keys:\n- sha256: {A}\n  owner: anna\n# the end\n",
    f"keys:\n- owner: anna\n  models:\n  - x\n  sha256: {A}\n",
    f"keys:\n-   owner: anna\n    sha256: {A}\n",
]


@pytest.mark.parametrize("text", STYLES)
def test_an_added_key_is_in_the_file_and_nothing_else_changes(path, text):
    write(path, text, 0o640)
    before = parse_keys(text.encode(), "x").entries
    key = make_key()
    added = add_key(path, key, "zoe", tier="gold", models=["demo", "a: b, ]", "7"], admin=True)
    ring = parse_keys(read_key_file(path), "x")
    assert ring.entries == (*before, added)
    zoe = ring.identity(key.encode())
    assert zoe.admin
    assert (zoe.owner, zoe.tier, zoe.models) == ("zoe", "gold", {"demo", "a: b, ]", "7"})
    assert key not in path.read_text()
    lines = text.splitlines()
    kept = path.read_text().splitlines()[: len(lines)]
    assert kept == ["keys:" if line.startswith("keys:") else line for line in lines]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    revoked = revoke_key(path, added.id.upper())
    assert parse_keys(read_key_file(path), "x").entries == (*before, revoked)
    assert revoke_key(path, key) == revoke_key(path, added.digest.hex()) == revoked
    assert path.read_text().count("revoked: true") == text.count("revoked: true") + 1
    assert os.listdir(path.parent) == [path.name]


def test_a_new_file_is_its_owners_alone(path):
    add_key(path, KEY, "anna", models=[])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not KeyRing(parse_keys(read_key_file(path), "x").entries).identity(KEY.encode()).may_use("demo")


def test_what_cannot_be_edited_stays(path):
    flow = f"keys: [{{sha256: {A}, owner: anna}}]\n"
    write(path, flow)
    for edit in (lambda: add_key(path, OTHER, "ben"), lambda: revoke_key(path, A)):
        with pytest.raises(ConfigError, match="by hand"):
            edit()
    assert path.read_text() == flow
    write(path, FILE)
    refusals = [
        (lambda: add_key(path, KEY, "anna"), "line 4"),
        (lambda: add_key(path, make_key(), "an na"), "owner"),
        (lambda: add_key(path, make_key(), "default"), "default"),
        (lambda: revoke_key(path, ""), "2 keys"),
        (lambda: revoke_key(path, A[:5]), "1 keys"),
        (lambda: revoke_key(path, "f" * 20), "0 keys"),
        (lambda: revoke_key(path.with_name("absent"), A), "No such file"),
    ]
    for edit, reason in refusals:
        with pytest.raises(ConfigError, match=reason):
            edit()
    assert path.read_text() == FILE
    assert os.listdir(path.parent) == [path.name]
    path.with_name("keys.yaml.new").touch()
    with pytest.raises(ConfigError, match="another command"):
        revoke_key(path, A)
    assert path.read_text() == FILE


def test_a_link_stays_a_link(path):
    real = write(path.with_name("real.yaml"), FILE)
    path.symlink_to(real)
    revoke_key(path, A)
    assert path.is_symlink()
    assert real.read_text().count("revoked") == 2


def test_keys_are_long_random_and_masked():
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert len(key) == 46
        assert key.startswith("ek-")
        assert masked(key.encode()) == f"{key[:4]}********{key[-4:]}"
    assert masked(b"x" * 23) == "********"
    assert masked(b"\n\xff\x00~" * 100) == "????********????"
