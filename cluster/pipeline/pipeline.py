"""`pipeline`: a model as a Python object. One rank is in this process; several are in a Ray cluster of their own."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from cluster.config import ClusterConfig, checked_config, resolve_model
from cluster.environment import DEMO_MODEL
from cluster.pipeline.answers import Response, Session
from cluster.pipeline.engine_config import BackendConfig
from cluster.pipeline.generation_config import GenerationConfig
from cluster.pipeline.notices import without_effect
from cluster.pipeline.prompts import prompts_of
from cluster.pipeline.questions import Question, Questions
from router.http.config import ServedModel
from router.text.chat_classes import ChatTemplateConfig
from router.text.tokenizer import Tokenizer
from workers.api.errors import ConfigError, ContextLengthExceeded, InvalidRequest

LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


class Engine(Protocol):
    """Who answers questions."""

    model: ServedModel
    device: str

    def pieces(self, questions: Sequence[Question], *, whole: bool) -> Generator[Response, None, None]:
        """The answers as they come, each piece with its `index`; `whole`: nobody looks before they are complete.

        Closing it ends what is not finished. Raises EchelonError.
        """

    def losses(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """The mean negative log-likelihood of each prompt, nats a token. Raises EchelonError."""

    def close(self) -> None:
        """Nothing of it runs."""


class Pipeline:
    """A model that is asked by calls. Threads may share it; it is a context manager, and `close` ends it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._questions = Questions(engine.model)
        self._sessions = itertools.count()
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; `encode` and `decode`."""
        return self._engine.model.tokenizer

    @property
    def name(self) -> str:
        """The model and its device."""
        return f"{self._engine.model.name} in this process on {self._engine.device}"

    @property
    def session_len(self) -> int:
        """The longest context in tokens."""
        return self._engine.model.max_model_len

    def __call__(
        self,
        prompts: Any,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Response | list[Response]:
        """The answer to a prompt (a text, or messages as OpenAI has them), or a list of answers to a list of prompts.

        With `gen_config.n` over 1 a list too: the n answers to each prompt in turn. `do_preprocess` False: a text is
        what the model goes on from, without its chat template. A prompt that leaves no room for an answer has an empty
        one whose finish_reason is `length`, and a warning. Raises InvalidRequest.
        """
        questions, empty, several = self._ask(prompts, gen_config, do_preprocess, adapter_name)
        found = {response.index: response for response in empty}
        for piece in self._engine.pieces(questions, whole=True):
            before = found.get(piece.index)
            found[piece.index] = piece if before is None else _joined(before, piece)
        answers = [replace(found[index], session_id=next(self._sessions)) for index in sorted(found)]
        return answers if several or len(answers) > 1 else answers[0]

    def stream_infer(
        self,
        prompts: Any,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Generator[Response, None, None]:
        """The same piece by piece, as they come: `index` says of which answer. Closing it stops the answers."""
        questions, empty, _ = self._ask(prompts, gen_config, do_preprocess, adapter_name)
        first = next(self._sessions)
        with closing(self._engine.pieces(questions, whole=False)) as pieces:
            for piece in itertools.chain(empty, pieces):
                yield replace(piece, session_id=first + piece.index)

    def chat(
        self,
        prompt: Any,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
    ) -> Session:
        """The next turn of a conversation: a session with the answer, and with what was said so far.

        The session that is given is not changed, so that a conversation may branch.
        """
        if not isinstance(prompt, str):
            prompts_of(prompt)  # images are refused by name
            raise InvalidRequest("chat takes a text: a whole conversation goes to the pipeline itself")
        before = session or Session()
        answer = self(before.messages(prompt), gen_config, do_preprocess)
        assert isinstance(answer, Response)
        return Session([*before.history, (prompt, answer.text)], answer, before.system)

    def get_ppl(self, prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[float]:
        """The mean loss of each prompt (a text or token ids, or a list of them), nats a token: exp of it is the
        perplexity. Raises InvalidRequest for a prompt of one token, or one that is longer than the context.
        """
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        listed: Any = [prompts] if one else prompts
        room = self.session_len - 1
        ids = [self.tokenizer.encode(p, limit=room) if isinstance(p, str) else list(p) for p in listed]
        for prompt in ids:
            if not 2 <= len(prompt) <= room:
                raise InvalidRequest(f"a prompt of {len(prompt)} tokens: from 2 to {room} have a perplexity here")
        return self._engine.losses(ids)

    def close(self) -> None:
        """The model is gone from memory, and what was started for it has ended. A second time does nothing."""
        if not self._closed:
            self._closed = True
            self._questions.close()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self, asked: Any, config: GenerationConfig | None, preprocess: bool, adapter: str | None
    ) -> tuple[list[Question], list[Response], bool]:
        """Questions, the answers to those that leave no room for one, and whether a list was asked."""
        if self._closed:
            raise InvalidRequest("the pipeline is closed")
        if adapter is not None:
            raise InvalidRequest(f"adapter_name={adapter!r}: LoRA adapters are not done yet")
        prompts, several = prompts_of(asked)
        config = config or GenerationConfig()
        questions: list[Question] = []
        empty: list[Response] = []
        for place, prompt in enumerate(prompts):
            try:
                questions.append(self._questions.question(place, prompt, config, preprocess=preprocess))
            except ContextLengthExceeded as e:
                warnings.warn(f"prompt {place}: {e}", UserWarning, stacklevel=3)
                empty += [
                    Response("", 0, 0, finish_reason="length", index=place * config.n + c) for c in range(config.n)
                ]
        return questions, empty, several


def _joined(before: Response, piece: Response) -> Response:
    logprobs = None if piece.logprobs is None else [*(before.logprobs or ()), *piece.logprobs]
    return replace(
        piece, text=before.text + piece.text, token_ids=before.token_ids + piece.token_ids, logprobs=logprobs
    )


def pipeline(
    model_path: str,
    model_name: str | None = None,
    backend_config: BackendConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    log_level: str = "ERROR",
    **kwargs: Any,
) -> Pipeline:
    """A model as a Python object: `pipeline("demo")("What is 3 + 4?").text`.

    `model_path`: "demo", a folder in the Hugging Face layout, or a hub id. With `backend_config.tp` over 1 its ranks
    run in a Ray cluster of this process. Other keywords are fields of a cluster file's model section (`device`,
    `trust_remote_code`, ...). Raises ConfigError, WeightError or OutOfMemory.
    """
    if log_level.upper() not in LEVELS:
        raise ConfigError(f"log_level {log_level!r} is not one of {', '.join(LEVELS)}")
    logging.getLogger("echelon").setLevel(log_level.upper())
    several = backend_config is not None and backend_config.tp > 1
    config = model_config(model_path, model_name, backend_config, chat_template_config, kwargs, elsewhere=several)
    if config.model.tensor_parallel > 1:
        from cluster.pipeline.ray_engine import RayEngine

        return Pipeline(RayEngine(config))
    from cluster.pipeline.local_engine import LocalEngine  # torch

    return Pipeline(LocalEngine(config))


def model_config(
    path: str,
    name: str | None,
    backend: BackendConfig | None,
    template: ChatTemplateConfig | None,
    fields: dict[str, Any],
    *,
    elsewhere: bool = False,
) -> ClusterConfig:
    """The cluster file that says the same; `elsewhere`: for other processes. Raises ConfigError."""
    model, engine = ({}, {}) if backend is None else backend.sections()
    folder = None if backend is None else backend.download_dir
    if folder is not None:
        path = str(resolve_model(path, backend.revision if backend else None, download_dir=folder))
    if fields.pop("backend", None) is not None:
        without_effect("backend", "there is one engine here")
    if elsewhere and path != DEMO_MODEL and Path(path).expanduser().is_dir():
        path = str(Path(path).expanduser().resolve())  # other processes have other working folders
    model |= fields | {"path": path}
    if name is not None:
        model["name"] = name
    if template is not None:
        model["chat_template"] = template.portable() if elsewhere else template.to_dict()
    return checked_config({"model": model, "engine": engine}, "pipeline")
