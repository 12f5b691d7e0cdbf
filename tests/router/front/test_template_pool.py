"""Chat templates in processes of their own: the same prompts, whatever a template does, and nothing left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from router.text.template_pool import TemplatePool
from router.text.template_process import RenderLimits
from router.text.templates import ChatTemplate, Conversation
from workers.api.errors import InvalidRequest, Overloaded

from .fakes import CHAT_TEMPLATE

# The first message's text says what the template does.
HOSTILE = """{%- set text = messages[0].content -%}
{%- if text == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif text == 'power' %}{{ (text | length) ** (10 ** 9) }}
{%- elif text == 'memory' %}{{ 'a' * 10 ** 9 }}
{%- elif text == 'pieces' %}{% set ns = namespace(x=['a' * 1000000]) %}
  {%- for i in range(90000) %}{% set ns.x = ns.x + ns.x %}{% endfor %}
{%- elif text == 'long' %}{{ 'a' * 2000001 }}
{%- elif text == 'recursion' %}{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}
{%- elif text == 'undefined' %}{{ nothing.at.all }}
{%- elif text == 'refuse' %}{{ raise_exception('not today') }}
{%- else %}<{{ text }}>{% endif %}"""
LIMITS = RenderLimits(cpu_seconds=0.3, wall_seconds=20, memory_bytes=256 << 20, characters=2_000_000)


def saying(text: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}])


@pytest.fixture
async def pools():
    """Makes pools that end with the test."""
    made: list[TemplatePool] = []

    def make(source: str, limits: RenderLimits = LIMITS, **more) -> TemplatePool:
        made.append(TemplatePool(source, more.pop("variables", {}), limits=limits, name="some model", **more))
        return made[-1]

    yield make
    pids = [pid for pool in made for pid in pool.pids]
    for pool in made:
        pool.close()
        assert pool.pids == []
    await asyncio.sleep(0)  # the event loop learns that the sockets are closed
    assert not [pid for pid in pids if _runs(pid)]


async def test_prompts_are_those_of_the_same_template_in_process(pools) -> None:
    now = datetime(2031, 5, 6, 7, 8)
    source = CHAT_TEMPLATE + "{{ strftime_now('%d %B') }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    pool = pools(source, variables={"bos_token": "<|bos|>"}, now=lambda: now)
    here = ChatTemplate(source, {"bos_token": "<|bos|>"})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"n": [1, 2.5, None, True]}}}]
    for conversation in (
        saying("wörld 你好 🎉 {{ 7 * 7 }}\x00"),
        Conversation([{"role": "developer", "content": "x", "name": None}], tools=tools, add_generation_prompt=False),
        Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is "}],
                     add_generation_prompt=False, continue_final_message=True),
    ):  # fmt: skip
        assert await pool.render(conversation) == here.render(conversation, now)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("loop", "used more than 0.3 s of CPU time"),
        ("power", "used more than 0.3 s of CPU time"),
        ("memory", "too much memory"),
        ("pieces", "too much memory"),
        ("long", "writes more than 2000000 characters"),
        ("recursion", "raises RecursionError"),
        ("undefined", "UndefinedError: 'nothing' is undefined"),
    ],
)
async def test_a_failing_template_is_refused_and_others_go_on(pools, caplog, text, says) -> None:
    pool = pools(HOSTILE, replace(LIMITS, cpu_seconds=10) if "memory" in says else LIMITS)
    assert await pool.render(saying("before")) == "<before>"
    texts = [f"{i}" for i in range(24)]
    with caplog.at_level(logging.ERROR, "echelon.text"):
        failing, *others = await asyncio.gather(
            pool.render(saying(text)), *(pool.render(saying(t)) for t in texts), return_exceptions=True
        )
        assert isinstance(failing, InvalidRequest)
        assert says in failing.message
        assert (failing.code, failing.param) == ("chat_template_failed", "messages")
        assert others == [f"<{t}>" for t in texts]
        with pytest.raises(InvalidRequest, match="chat template fails"):
            await pool.render(saying(text))
        assert await pool.render(saying("after")) == "<after>"
    assert [r.getMessage() for r in caplog.records] == [f"chat template of some model: {failing.message} (said once)"]
    assert len(pool.pids) <= LIMITS.processes


async def test_a_refusal_is_the_templates_own(pools, caplog) -> None:
    pool = pools(HOSTILE)
    with pytest.raises(InvalidRequest, match="refuses these messages: not today") as e:
        await pool.render(saying("refuse"))
    assert (e.value.code, e.value.param) == (None, "messages")
    assert not caplog.records


async def test_a_killed_process_is_replaced(pools) -> None:
    pool = pools(HOSTILE, RenderLimits(processes=1))
    await pool.render(saying("x"))
    (before,) = pool.pids
    waiting = [asyncio.create_task(pool.render(saying(str(i)))) for i in range(9)]
    await asyncio.sleep(0)
    os.kill(before, signal.SIGKILL)
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    failed = [a for a in answers if isinstance(a, InvalidRequest)]
    assert len(failed) <= 1  # the one that it was at, if any
    assert [a for a in answers if isinstance(a, str)] == [f"<{i}>" for i, a in enumerate(answers) if isinstance(a, str)]
    assert pool.pids != [before]


async def test_a_process_that_stands_still_is_replaced(pools) -> None:
    pool = pools(HOSTILE, RenderLimits(processes=1, wall_seconds=0.5))
    await pool.render(saying("x"))
    os.kill(pool.pids[0], signal.SIGSTOP)
    with pytest.raises(InvalidRequest, match=r"took more than 0\.5 s"):
        await pool.render(saying("a"))
    assert await pool.render(saying("b")) == "<b>"


@pytest.mark.parametrize("source", ["{{ 2 ** (10 ** 9) % 7 }}", "{{ (10 ** (10 ** 8)) | string | length }}"])
async def test_what_compiling_already_runs_is_bounded(pools, caplog, source) -> None:
    """jinja computes constant expressions when it compiles."""
    pool = pools(source)
    pool.start()
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="chat template fails"):
            await pool.render(saying("x"))
    assert len(caplog.records) == 1


async def test_too_many_waiting_are_refused(pools) -> None:
    pool = pools(HOSTILE, RenderLimits(waiting=3))
    tasks = [asyncio.create_task(pool.render(saying(str(i)))) for i in range(5)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert answers[:3] == ["<0>", "<1>", "<2>"]
    assert all(isinstance(a, Overloaded) for a in answers[3:])


async def test_a_reader_that_goes_away_leaves_no_trace(pools) -> None:
    pool = pools(HOSTILE, RenderLimits(processes=1))
    await pool.render(saying("x"))
    tasks = [asyncio.create_task(pool.render(saying(str(i)))) for i in range(12)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [a for a in answers if isinstance(a, str)] == [f"<{i}>" for i in range(1, 12, 2)]
    assert await pool.render(saying("y")) == "<y>"


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
async def test_closing_refuses_what_is_under_way(pools, turns) -> None:
    pool = pools(HOSTILE)
    task = asyncio.create_task(pool.render(saying("loop")))
    for _ in range(turns):
        await asyncio.sleep(0)
    pool.close()
    with pytest.raises(Overloaded):
        await task
    with pytest.raises(Overloaded):
        await pool.render(saying("x"))


PARENT = """
import asyncio, os, signal, sys
from router.text.template_pool import TemplatePool
from router.text.templates import Conversation
async def main():
    pool = TemplatePool("{{ messages[0].content }}", {})
    await pool.render(Conversation([{"role": "user", "content": "x"}]))
    print(pool.pids[0], flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["kill", "end"])
def test_no_process_outlives_its_parent(how) -> None:
    done = subprocess.run([sys.executable, "-c", PARENT, how], capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0), done.stderr
    pid = int(done.stdout)
    for _ in range(500):
        if not _runs(pid):
            return
        time.sleep(0.02)
    pytest.fail("the template's process is still there")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it ends between opening and reading
        return False


async def test_the_process_has_little_to_reach(pools, monkeypatch) -> None:
    monkeypatch.setenv("ECHELON_SECRET", "s3cret")
    pool = pools(HOSTILE)
    await pool.render(saying("x"))
    process = Path(f"/proc/{pool.pids[0]}")
    assert [v.split(b"=")[0] for v in (process / "environ").read_bytes().split(b"\0") if v] == [b"PYTHONPATH"]
    assert sorted(p.name for p in (process / "fd").iterdir()) == ["0", "1", "2"]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
    assert limits["Max open files"] == ["3", "3"]
    assert limits["Max processes"] == ["0", "0"]
    assert limits["Max address space"] == [str(LIMITS.memory_bytes)] * 2


def test_the_process_loads_little() -> None:
    program = "import sys, router.text.template_worker; print(*sys.modules)"
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    command = [sys.executable, "-S", "-c", program]
    names = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    heavy = {"torch", "ray", "fastapi", "pydantic", "tokenizers", "numpy", "asyncio", "starlette"}
    assert not heavy & set(names.stdout.split())
