"""Both pages before a cluster of the demo model with tiers and keys, under load; they make the README's pictures."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.environment import free_port
from router.keys.ring import digest_of, make_key

from .conftest import PHONE

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.long]

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 250_000
OWNERS = ("anna", "carl", "dora", "emil", "guest", "olga")
TIERS = {
    "enable_user_qos": True,
    "user_groups": ["Gold", "Silver", "Bronze"],
    "user_group_map": {
        "Gold": [{"id": "anna", "quota_pct": 50}, {"id": "carl", "quota_pct": 40}, {"id": "olga", "quota_pct": 10}],
        "Silver": [{"id": "dora", "quota_pct": 50}, {"id": "emil", "quota_pct": 50}],
        "Bronze": [{"id": "default", "quota_pct": 100}],
    },
}
LOAD = (("anna", 3), ("carl", 2), ("dora", 6), ("emil", 4), ("guest", 8))  # requests at a time


@dataclass(frozen=True)
class Live:
    """A cluster, and who may ask."""

    url: str
    keys: dict[str, str]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1001))

    def get(self, path: str, owner: str) -> Any:
        asked = urllib.request.Request(self.url + path, headers={"authorization": f"Bearer {self.keys[owner]}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)

    def ask(self, owner: str, model: str, text: str, **more: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        headers = {"authorization": f"Bearer {self.keys[owner]}", "content-type": "application/json"}
        headers["x-request-id"] = f"{owner}-{next(self.numbers)}"
        asked = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder, port = tmp_path_factory.mktemp("cluster"), free_port()
    keys = {owner: make_key() for owner in OWNERS}
    entries = [
        {"sha256": digest_of(key.encode()).hex(), "owner": owner, "admin": owner == "olga"}
        for owner, key in keys.items()
    ]
    (folder / "keys.yaml").write_text(json.dumps({"keys": entries}))
    (folder / "tiers.json").write_text(json.dumps(TIERS))
    models = [
        {"path": "demo", "name": "demo", "replicas": 2, "engine": {"max_num_seqs": 6, "num_blocks": 160}},
        {"path": "demo", "name": "second", "engine": {"max_num_seqs": 4, "num_blocks": 96}},
    ]
    http = {"port": port, "api_keys": "keys.yaml"}
    config = {"models": models, "http": http, "dispatch": {"qos": "tiers.json"}}
    (folder / "cluster.yaml").write_text(json.dumps(config))
    log = folder / "log"
    command = [sys.executable, "-m", "cluster.cli", "serve", str(folder / "cluster.yaml")]
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    try:
        await_true(lambda: server.poll() is not None or "replicas are up" in log.read_text(), 300)
        assert server.poll() is None, log.read_text()
        yield Live(f"http://127.0.0.1:{port}", keys)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)


def await_true(condition: Callable[[], bool], seconds: float) -> None:
    pause = threading.Event()
    for _ in range(int(seconds * 5)):
        if condition():
            return
        pause.wait(0.2)
    raise AssertionError("it did not come true")


@pytest.fixture(scope="module")
def load(live: Live) -> Iterator[None]:
    """Requests of all tiers, until the module's tests are over."""
    over = threading.Event()

    def run(owner: str, model: str, seed: int) -> None:
        draw = random.Random(seed)
        while not over.is_set():
            sum_of = f"What is {draw.randint(1, 99)} + {draw.randint(1, 99)}?"
            try:
                live.ask(owner, model, sum_of, max_tokens=draw.randint(20, 120), ignore_eos=True)
            except OSError:  # also of a starved one of the last tier: the order of tiers is strict
                over.wait(0.5)

    jobs = [(owner, "second" if n == 0 else "demo") for owner, count in LOAD for n in range(count)]
    threads = [threading.Thread(target=run, args=(*job, seed)) for seed, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()


def sign_in(page: Any, key: str, opened: bool = False) -> None:
    if not opened:
        page.click("#key-button")
    page.fill("#key-input", key)
    page.click("#key-save")


def forgive(one: Any, status: str) -> None:
    one.page.wait_for_timeout(50)
    one.errors[:] = [e for e in one.errors if f"status of {status}" not in e]


def picture(page: Any, name: str) -> None:
    path = PICTURES / name
    page.screenshot(path=path, animations="disabled")
    assert path.stat().st_size < MOST_BYTES


def test_the_demo_model_chats_and_its_user_sees_the_tier(live: Live, tab: Any) -> None:
    one = tab((1280, 800))
    page = one.page
    page.goto(f"{live.url}/chat")
    sign_in(page, live.keys["anna"])
    page.wait_for_selector("#tier:visible")
    assert page.inner_text("#tier") == "Tier Gold"
    assert page.inner_text("#key-button") == "Key: anna"
    assert page.is_hidden("#operator-link")
    forgive(one, "401")
    page.evaluate(
        """() => {
          window.grown = new Set();
          const texts = () => [...document.querySelectorAll('.assistant .text')].map((e) => e.textContent);
          const note = () => texts().forEach((text) => window.grown.add(text));
          new MutationObserver(note).observe(document.querySelector('#messages'), {subtree: true, childList: true});
        }"""
    )
    for number, (model, text) in enumerate(
        (
            ("demo", "What is the capital of France?"),
            ("second", "What is 17 + 25?"),
            ("demo", "Tell me about yourself."),
        ),
        1,
    ):
        page.select_option("#model", model)
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")
        page.wait_for_function(
            "n => document.querySelectorAll('.assistant').length === n && document.querySelector('#stop').hidden",
            arg=number,
        )
        assert page.locator(".who").last.inner_text() == model
    answers = page.locator(".assistant .text").all_inner_texts()
    assert "Paris" in answers[0]
    assert "42" in answers[1]
    grown = page.evaluate("() => [...window.grown]")
    assert sum(answers[2].startswith(part) and part != answers[2] for part in grown) >= 3, "it came at once"
    assert page.locator(".facts").first.inner_text().count("token") >= 2
    picture(page, "web-chat.png")


def test_an_operator_sees_the_load_and_a_killed_replica(live: Live, load: None, tab: Any) -> None:
    one, phone = tab((1280, 1160)), tab(PHONE, "dark")
    for each in (one, phone):
        each.page.goto(f"{live.url}/operator")
        each.page.wait_for_selector("#key-dialog[open]")
        forgive(each, "401")
        sign_in(each.page, live.keys["olga"], opened=True)
        each.page.wait_for_selector("#replicas tbody tr:nth-child(3)")
    page = one.page
    assert page.locator("#replicas .chip.good").count() == 3
    page.wait_for_function("() => document.querySelectorAll('#served tbody tr').length > 4")
    page.wait_for_function("() => [...document.querySelectorAll('#users td.name')].length >= 5")
    steps = "() => document.querySelector('#tiles').textContent"
    before = page.evaluate(steps)
    page.wait_for_function("b => document.querySelector('#tiles').textContent !== b", arg=before)
    rates = "() => [...document.querySelectorAll('#replicas tbody tr')].map((r) => r.cells[7].textContent)"
    page.wait_for_function("() => Number(document.querySelector('#replicas tbody tr').cells[7].textContent) > 0")
    assert page.evaluate(rates)
    tiers = set(page.locator("#tiers td.name").all_inner_texts())
    assert {t.split("\n")[0] for t in tiers} == {"Gold", "Silver", "Bronze"}
    assert page.locator("#plots svg path[d^=M]").count() >= 4
    page.locator("#served td button").first.click()
    page.wait_for_selector("#story h3")
    assert "Why it runs where it runs" in page.inner_text("#story")
    page.keyboard.press("Escape")
    phone.expect_no_wider_than_the_window()
    one.expect_no_wider_than_the_window()
    page.wait_for_timeout(60_000)  # for the picture: a minute of lines
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    page.mouse.move(0, 0)
    picture(page, "web-operator.png")

    victim = next(r for r in live.get("/cluster", "olga")["replicas"] if r["model"] == "demo")
    os.kill(victim["pid"], signal.SIGKILL)
    page.wait_for_function(
        "id => document.querySelector('#events').textContent.includes(`${id} is gone`)", arg=victim["id"][:6]
    )
    page.wait_for_selector("#replicas tr.gone .chip.bad")
    came_up = "() => document.querySelectorAll('#replicas .chip.good').length === 3"
    page.wait_for_function(came_up, timeout=120_000)
    assert "came up" in page.inner_text("#events")


def test_who_is_no_admin_is_told_so(live: Live, tab: Any) -> None:
    one = tab()
    one.page.goto(f"{live.url}/chat")
    sign_in(one.page, live.keys["anna"])
    one.page.wait_for_selector("#tier:visible")
    one.page.goto(f"{live.url}/operator")
    one.page.wait_for_selector("#notice:visible")
    assert "for admins" in one.page.inner_text("#notice")
    assert one.page.locator("#replicas tbody tr").count() == 0
    forgive(one, "401")
    forgive(one, "403")


def test_the_page_server_shows_the_same(live: Live, tab: Any) -> None:
    port = free_port()
    command = [sys.executable, "-m", "cluster.cli", "serve", "gradio", live.url, "--server-port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert "/operator" in server.stdout.readline()
        one = tab(PHONE)
        page = one.page
        page.goto(f"http://127.0.0.1:{port}/")
        sign_in(page, live.keys["olga"])
        page.wait_for_selector("#operator-link:visible")
        page.fill("#prompt", "What is the capital of France?")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".regenerate:visible")
        assert "Paris" in page.inner_text(".assistant .text")
        page.click("#operator-link")
        page.wait_for_selector("#replicas .chip.good")
        one.expect_no_wider_than_the_window()
        forgive(one, "401")
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
