"""The chat page in a browser, before a front whose answers are scripted.

Mutants seen to fail: HTML, or a link that is a script, from an answer; a stop button that stops only what is shown; a
key kept beyond the tab; another seed after the server was away.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from front.fakes import CHAT_TEMPLATE, FakeGenerator, FakeStatus, make_backend
from front.served import serving

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.keys.resolver import KeyResolver
from router.keys.ring import KeyEntry, KeyRing, digest_of, make_key
from router.text.tokenizer import Tokenizer
from router.web.server import page_server
from workers.api.errors import Overloaded

from .conftest import PHONE

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.long]

HOSTILE = """<script>window.hurt = 1</script><img src=x onerror="window.hurt = 2">
<iframe srcdoc="<script>parent.hurt = 3</script>"></iframe> <style>body { display: none }</style>
[link](javascript:window.hurt=4) [data](data:text/html,<script>1</script>) ![pic](https://example.org/pixel.png)
**bold <b onmouseover="window.hurt=5">b</b>** and `<u>code</u>`

```html
<script>window.hurt = 6</script>
```

- <svg onload="window.hurt=7"></svg>

| <a href="javascript:window.hurt=8">a</a> | b |
|---|---|
| 1 | <base href="https://example.org/"> |
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    backend = make_backend()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = backend.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8192, "vocab_size": size}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [backend.token_to_id("<|im_end|>")]}))
    return Tokenizer.from_folder(folder, trust_template=True)


@pytest.fixture
def generator(tokenizer: Any) -> FakeGenerator:
    return FakeGenerator(tokenizer, pause=0.005)


def front(tokenizer: Any, generator: FakeGenerator, identity: Any = None) -> Any:
    models = [ServedModel("m", tokenizer, 8192), ServedModel("org/second", tokenizer, 8192)]
    return create_app(FrontConfig(pages=True), models, generator, FakeStatus(), identity=identity)


@contextmanager
def shown(app: Any) -> Iterator[str]:
    with serving(app) as (host, port):
        yield f"http://{host}:{port}"


def open_chat(tab: Any, url: str, **how: Any) -> Any:
    one = tab(**how)
    one.page.goto(f"{url}/chat")
    one.page.wait_for_selector("#model:not([disabled])")
    forgive(one, "404")  # a front without a dispatcher has no /me
    return one


def forgive(one: Any, status: str) -> None:
    """A failed fetch is always written into the console."""
    one.page.wait_for_timeout(50)
    one.errors[:] = [e for e in one.errors if f"status of {status}" not in e]


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page: Any, answers: int = 1) -> None:
    page.wait_for_function(
        "n => document.querySelectorAll('.message.assistant').length === n && document.querySelector('#stop').hidden",
        arg=answers,
    )


def test_what_an_answer_says_stays_text(tab, tokenizer, generator):
    generator.answer, generator.tokens_a_step = HOSTILE, 7
    with shown(front(tokenizer, generator)) as url:
        one = open_chat(tab, url)
        asked = []
        one.page.on("request", lambda r: asked.append(r.url))
        say(one.page, "<img src=x onerror='window.hurt = 9'>")
        ended(one.page)
        text = one.page.inner_text(".message.assistant .text")
        hostile = (
            "<script>window.hurt = 1</script>",
            '<img src=x onerror="window.hurt = 2">',
            "javascript:window.hurt=4",
        )
        for part in hostile:
            assert part in text
        assert one.page.evaluate("window.hurt") is None
        inside = ".message :is(script, img, iframe, style, svg, base, b, u, object, embed, link, form)"
        assert one.page.locator(inside).count() == 0
        links = one.page.eval_on_selector_all(".message a", "all => all.map(a => a.href + ' ' + a.rel)")
        rel = "noopener noreferrer nofollow"
        assert links == [f"https://example.org/pixel.png {rel}", f"https://example.org/ {rel}"]
        assert [u for u in asked if not u.startswith(url)] == []
        one.page.reload()  # and what was kept of the conversation is shown the same way
        assert one.page.inner_text(".message.assistant .text") == text
        assert one.page.evaluate("window.hurt") is None
        one.page.wait_for_selector("#model:not([disabled])")
        forgive(one, "404")


def test_the_policy_holds_where_the_page_itself_would_fail(tab, tokenizer, generator):
    with shown(front(tokenizer, generator)) as url:
        one = open_chat(tab, url)
        tried = "try { document.body.innerHTML = '<img src=x onerror=\"window.hurt=1\">'; 'done' } catch (e) { e.name }"
        assert one.page.evaluate(tried) == "TypeError"
        one.page.evaluate("fetch('https://example.org/').catch(() => 0)")
        assert one.page.evaluate("window.hurt") is None
        one.page.wait_for_timeout(50)
        assert one.errors
        assert all("Security Policy" in e or "TrustedHTML" in e for e in one.errors), one.errors
        one.errors.clear()


def test_stop_ends_the_answer_and_what_made_it(tab, tokenizer, generator):
    generator.endless = True
    with shown(front(tokenizer, generator)) as url:
        page = open_chat(tab, url).page
        for number, stop in enumerate((lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")), 1):
            say(page, "Go on and on")
            page.wait_for_function(
                "n => document.querySelectorAll('.assistant .text')[n - 1]?.textContent.length > 20", arg=number
            )
            stop()
            ended(page, number)
            assert page.locator(".facts").last.inner_text().startswith("stopped")
            until(lambda: generator.running == 0)
        page.click(".regenerate:visible")
        page.wait_for_selector("#stop:visible")
        page.click("#new-chat")
        page.wait_for_selector("#empty:visible")
        until(lambda: generator.running == 0)


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_parameters_models_and_regeneration(tab, tokenizer, generator):
    with shown(front(tokenizer, generator)) as url:
        one = open_chat(tab, url)
        page = one.page
        page.select_option("#model", "org/second")
        page.click("#settings-button")
        page.fill("#system", "Be brief.")
        for name, value in (
            ("temperature", "0.3"),
            ("top_p", "0.9"),
            ("top_k", "7"),
            ("max_tokens", "5"),
            ("seed", "11"),
        ):
            page.fill(f"#{name}", value)
        say(page, "hello")
        ended(page)
        request = generator.requests[-1]
        sampling = request.samplings[0]
        assert (request.model, sampling.temperature, sampling.top_p, sampling.top_k) == ("org/second", 0.3, 0.9, 7)
        assert (sampling.max_tokens, sampling.seed) == (5, 11)
        assert "Be brief." in tokenizer.decode(request.prompt_ids)
        assert "cut off" in page.inner_text(".facts")
        page.fill("#seed", "")
        page.click(".regenerate")
        until(lambda: len(generator.requests) == 2)
        ended(page)
        assert generator.requests[1].prompt_ids == request.prompt_ids
        assert generator.requests[1].samplings[0].seed != 11
        page.fill("#temperature", "9")
        say(page, "again")
        page.wait_for_timeout(100)
        assert len(generator.requests) == 2, "a value out of range is shown, not sent"
        assert page.evaluate("document.activeElement.id") == "temperature"


def test_a_wrong_key_and_then_a_right_one(tab, tokenizer, generator):
    good = make_key()
    keys = KeyResolver(KeyRing([KeyEntry(digest_of(good.encode()), "anna")]))
    with shown(front(tokenizer, generator, keys)) as url:
        one = tab()
        page = one.page
        page.goto(f"{url}/chat")
        page.wait_for_selector("#notice:visible")
        assert "asks for an API key" in page.inner_text("#notice")
        for value in ("ek-wrong", good):
            page.click("#notice-action") if page.is_visible("#notice-action") else page.click("#key-button")
            page.fill("#key-input", value)
            page.click("#key-save")
            if value != good:
                page.wait_for_function("() => document.querySelector('#notice').textContent.includes('does not know')")
        page.wait_for_selector("#model:not([disabled])")
        say(page, "hello")
        ended(page)
        assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        other = one.context.new_page()  # of the same browser, but another tab
        other.goto(f"{url}/chat")
        other.wait_for_selector("#notice:visible")
        assert good not in page.content()
        forgive(one, "401")
        forgive(one, "404")


def test_a_full_queue_says_place_and_wait(tab, tokenizer, generator):
    generator.refusal = Overloaded("100 requests wait in tier Bronze already", retry_after=12.0)
    generator.refusal.position, generator.refusal.wait = 101, (30.0, 42.0, 66.0)
    with shown(front(tokenizer, generator)) as url:
        one = open_chat(tab, url, size=PHONE)
        say(one.page, "hello")
        one.page.wait_for_selector("#notice:visible")
        said = one.page.inner_text("#notice")
        assert "place 101" in said
        assert "30 s to 66 s" in said
        assert "in 12 s" in said
        assert "tier Bronze" in said
        one.expect_no_wider_than_the_window()
        generator.refusal = None
        one.page.click("#notice-action")
        ended(one.page)
        assert one.page.is_hidden("#notice")
        forgive(one, "429")


def test_an_answer_goes_on_when_its_server_comes_back(tab, tokenizer, generator):
    """The page server stays; the API server behind it ends in the middle, and another one takes its port."""
    generator.answer = " ".join(f"Line {n} of the answer.\n" for n in range(60))
    generator.pause = 0.02
    again = FakeGenerator(tokenizer, answer=generator.answer)
    with contextlib.ExitStack() as stack:
        with serving(front(tokenizer, generator)) as (host, port):
            url = stack.enter_context(shown(page_server(f"http://{host}:{port}")))
            one = open_chat(tab, url)
            say(one.page, "hello")
            one.page.wait_for_function("() => document.querySelector('.assistant .text')?.textContent.length > 30")
        one.page.wait_for_function("() => document.querySelector('.state').textContent.includes('went away')")
        before = one.page.inner_text(".assistant .text")
        assert len(before) > 30
        stack.enter_context(serving(front(tokenizer, again), port=port))
        ended(one.page)
        after = one.page.inner_text(".assistant .text")
        assert after.startswith(before[:-10])
        assert "Line 59 of the answer." in after
        assert "resumed" in one.page.inner_text(".facts")
        first, second = generator.requests[0], again.requests[0]
        assert (first.prompt_ids, first.samplings[0].seed) == (second.prompt_ids, second.samplings[0].seed)
        assert any("502" in e or "ERR_" in e for e in one.errors)
        one.errors.clear()


def test_keyboard_and_a_narrow_window(tab, tokenizer, generator):
    with shown(front(tokenizer, generator)) as url:
        one = open_chat(tab, url, size=PHONE, scheme="dark")
        page = one.page
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.type("line one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("line two")
        page.keyboard.press("Enter")
        ended(page)
        assert page.inner_text(".message.user .text") == "line one\nline two"
        one.expect_no_wider_than_the_window()
        page.focus("#settings-button")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "system"
        one.expect_no_wider_than_the_window()
