"""The web pages' files: who may have them, how they are cached, that nothing inline runs and no text becomes HTML.

Mutants seen to fail: pages that are always on; `innerHTML` in a script; an inline handler; `unsafe-inline`; the
folder's name not in the page; a file that is not packaged.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.keys.resolver import KeyResolver
from router.keys.ring import KeyEntry, KeyRing, digest_of, make_key
from router.web.assets import PAGES, Asset, read_assets

from .test_access import call

ROOT = Path(__file__).resolve().parents[3]
STATIC = ROOT / "router" / "web" / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
MARKUP = sorted(STATIC.glob("*.html"))
KEY = make_key()
# Ways from text to code or HTML, and to what outlives the tab.
FORBIDDEN = (
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "createContextualFragment", "parseFromString", "document.write"),
    *("eval(", "Function(", "import(", "srcdoc", "localStorage", "document.cookie", "indexedDB", "javascript:"),
)


@pytest.fixture(scope="module")
def assets() -> Mapping[str, Asset]:
    return read_assets()


def front(tokenizer: Any, generator: Any, status: Any, *, pages: bool) -> Any:
    resolver = KeyResolver(KeyRing([KeyEntry(digest_of(KEY.encode()), "anna")]))
    models = [ServedModel("m", tokenizer, 256)]
    return create_app(FrontConfig(pages=pages), models, generator, status, identity=resolver)


async def test_pages_need_no_key_and_open_nothing_else(tokenizer, generator, status, assets):
    app = front(tokenizer, generator, status, pages=True)
    for path, asset in assets.items():
        answer = await call(app, path=path, method="GET")
        assert (answer.status, answer.body) == (200, asset.body), path
        assert (await call(app, path=path, method="HEAD")).status == 200
        for other in (f"{path}/", f"{path}x", f"/v1{path}", path.upper()):
            assert (await call(app, path=other, method="GET")).status == 401, other
    for path in ("/v1/models", "/me", "/cluster", "/metrics", "/web/", "/"):
        assert (await call(app, path=path, method="GET")).status == 401, path


async def test_a_front_shows_no_pages_unless_it_is_told_to(tokenizer, generator, status, assets):
    app = front(tokenizer, generator, status, pages=False)
    for path in assets:
        assert (await call(app, path=path, method="GET")).status == 401, path


async def test_pages_are_asked_for_anew_and_their_files_kept(tokenizer, generator, status, assets):
    app = front(tokenizer, generator, status, pages=True)
    for path, asset in assets.items():
        first = await call(app, path=path, method="GET")
        expected = "no-cache" if path in PAGES else "public, max-age=31536000, immutable"
        assert first.headers["cache-control"] == expected, path
        known = [(b"if-none-match", f'"other", W/{asset.etag}'.encode())]
        again = await call(app, known, path=path, method="GET")
        assert (again.status, again.body) == (304, b""), path
        changed = await call(app, [(b"if-none-match", b'"other"')], path=path, method="GET")
        assert changed.status == 200, path


async def test_a_page_may_load_from_its_server_only_and_nothing_inline_runs(tokenizer, generator, status, assets):
    app = front(tokenizer, generator, status, pages=True)
    for path in assets:
        headers = (await call(app, path=path, method="GET")).headers
        policy = {d.split()[0]: d.split()[1:] for d in headers["content-security-policy"].split("; ")}
        assert policy["default-src"] == ["'none'"]
        for kind in ("script-src", "style-src", "img-src", "connect-src"):
            assert policy[kind] == ["'self'"], kind
        assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == ["'none'"]
        assert policy["require-trusted-types-for"] == ["'script'"]
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("file", MARKUP, ids=lambda f: f.name)
def test_markup_has_no_code_and_names_files_that_are_there(file, assets):
    text = file.read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://(?!www\.w3\.org)", text)
    path = next(path for path, name in PAGES.items() if name == file.name)
    page = assets[path].body.decode()
    links = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert links
    assert "{{" not in page
    assert [link for link in links if link not in assets] == []


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda f: f.name)
def test_scripts_make_no_html_of_text_and_keep_nothing(file):
    text = file.read_text()
    assert [way for way in FORBIDDEN if way in text] == []
    imported = re.findall(r'from "([^"]+)"', text)
    assert all(name.startswith("./") and (STATIC / name).is_file() for name in imported), imported
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)[\w.]", text), "everything comes from this server"


def test_what_the_pages_use_is_reached_and_nothing_else_lies_there(assets):
    """From each page over its links and imports."""
    seen: set[str] = set()
    ahead = list(PAGES)
    while ahead:
        path = ahead.pop()
        if path in seen:
            continue
        seen.add(path)
        text = assets[path].body.decode()
        folder = path.rpartition("/")[0]
        ahead += [f"{folder}/{name[2:]}" for name in re.findall(r'from "(\./[^"]+)"', text)]
        if path in PAGES:
            ahead += [link for link in re.findall(r'(?:src|href)="([^"#]+)"', text) if link not in PAGES]
    assert seen == set(assets)


def test_a_changed_file_has_another_address(assets, tmp_path, monkeypatch):
    import importlib.resources

    copy = tmp_path / "static"
    copy.mkdir()
    for file in STATIC.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    assert read_assets() == assets
    (copy / "base.css").write_text("body {}")
    changed = read_assets()
    assert set(changed) & set(assets) == set(PAGES)
    assert all(changed[path].etag != assets[path].etag for path in PAGES)


def test_a_wheel_has_all_of_them():
    """setuptools takes what package-data names, of packages that it finds."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {f for pattern in settings["package-data"]["router.web"] for f in (ROOT / "router/web").glob(pattern)}
    assert packaged == {f for f in STATIC.rglob("*") if f.is_file()}
    assert any(name == "router*" for name in settings["packages"]["find"]["include"])
    assert (ROOT / "router" / "web" / "__init__.py").is_file()
    assert not [f for f in STATIC.iterdir() if f.is_dir()], "read_assets looks into no folders"


def test_no_page_is_large():
    sizes = {f.name: len(f.read_bytes()) for f in STATIC.iterdir()}
    assert sum(sizes.values()) < 150_000, json.dumps(sizes)
