"""What the front's tests share: a small real tokenizer and a generator whose answers are known."""

from __future__ import annotations

import json

import httpx
import pytest
import tokenizers

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.text.tokenizer import Tokenizer

from .fakes import CHAT_TEMPLATE, TOOLS_TEMPLATE, FakeGenerator, FakeStatus, make_backend


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A checkpoint's folder with a byte-level tokenizer of ChatML shape."""
    folder = tmp_path_factory.mktemp("model")
    backend: tokenizers.Tokenizer = make_backend()
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 256, "vocab_size": backend.get_vocab_size()})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [backend.token_to_id("<|im_end|>")]}))
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return Tokenizer.from_folder(model_folder, trust_template=True)


@pytest.fixture
def generator(tokenizer):
    return FakeGenerator(tokenizer)


@pytest.fixture
def status():
    return FakeStatus()


@pytest.fixture
def app(tokenizer, generator, status):
    models = [ServedModel("m", tokenizer, 256), ServedModel("org/base", base_of(tokenizer), 256)]
    return create_app(FrontConfig(), models, generator, status, draw_seed=lambda: 7, now=lambda: 1_700_000_000.0)


@pytest.fixture
async def client(app):
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://front", timeout=30) as c,
    ):
        yield c


@pytest.fixture
def tools_client(model_folder, generator, status):
    """A client of one model that calls tools as hermes does; `how` changes it, `template` is its chat template."""

    def client(*, template=TOOLS_TEMPLATE, **how):
        tokenizer = Tokenizer.from_folder(model_folder, trust_template=True, template=template)
        served = ServedModel("m", tokenizer, 4096, **{"tool_parser": "hermes", **how})
        app = create_app(FrontConfig(), [served], generator, status, draw_seed=lambda: 7)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")

    return client


def base_of(tokenizer):
    """The same tokenizer without a chat template."""
    return Tokenizer(make_backend(), eos_ids=tokenizer.eos_ids, context_length=256)
