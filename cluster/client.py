"""`echelon.connect`: a running cluster's gateway, from any driver of its Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.environment import api_key as key_of_environment
from cluster.names import GATEWAY, NAMESPACE
from router.protocol.answers import Usage
from workers.api.errors import ConfigError
from workers.api.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class GeneratedChoice:
    """One answer. `token_ids` are all that were emitted, the one that ended it included.

    `logprobs` are of the tokens drawn, where `logprobs` was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """What `generate` yields: n choices of one prompt, or choice c of prompt p at p * n + c."""

    choices: tuple[GeneratedChoice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Of the first choice: stop or length."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the gateway, with the caller's API key before its arguments."""

    method: Any
    key: str | None = field(default=None, repr=False)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        """The ObjectRef of the result."""
        return self.method.remote(self.key, *arguments, **named)

    def options(self, **options: Any) -> Call:
        """The same with Ray's options for a call."""
        return Call(self.method.options(**options), self.key)


@dataclass(frozen=True, slots=True)
class Handle:
    """The gateway of a cluster. It may be passed to Ray tasks and actors, and takes its API key along."""

    actor: Any
    key: str | None = field(default=None, repr=False)

    @property
    def generate(self) -> Call:
        """`generate.remote(prompt_or_messages, **sampling)` -> ObjectRef of a `Generated`.

        `sampling` holds the fields of OpenAI's body (`max_tokens`, `temperature`, `n`, `seed`, `model`, ...).
        `ray.get` raises the EchelonError that HTTP would have answered; its `cause` has the plain message.
        """
        return Call(self.actor.generate, self.key)

    @property
    def get_ppl(self) -> Call:
        """`get_ppl.remote(prompt_or_prompts, model=None)` -> ObjectRef of the mean loss, nats a token, of each prompt.

        As LMDeploy's it is the cross entropy: the perplexity is exp of it. A prompt is a text or token ids, at most one
        token shorter than the context; of a list there comes a list. `ray.get` raises as for `generate`.
        """
        return Call(self.actor.get_ppl, self.key)

    @property
    def reply(self) -> Call:
        """`reply.remote(route, body)` -> ObjectRef of a `router.service.Reply`: what HTTP would answer, in JSON."""
        return Call(self.actor.reply, self.key)

    @property
    def models(self) -> Call:
        """`models.remote()` -> ObjectRef of the names of the models that the key may use."""
        return Call(self.actor.models, self.key)


def connect(address: str | None = None, *, api_key: str | None = None) -> Handle:
    """A handle on the Echelon that runs in the Ray cluster at `address`, under the owner of `api_key`.

    `address` None = the Ray cluster that this process has joined, or else the one on this machine; `api_key` None =
    $ECHELON_API_KEY, if set. A cluster with keys answers calls without a good one with NotAuthorized; one without
    keys takes any. Raises ConfigError when there is no such cluster, when no Echelon runs in it, or when this process
    has joined another one.
    """
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address or "auto", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as e:
            raise ConfigError(f"there is no Ray cluster at {address or 'this machine'}: {e}") from e
    elif address not in (None, "auto", joined := ray.get_runtime_context().gcs_address):
        raise ConfigError(f"this process has joined the Ray cluster at {joined} already, not {address}")
    try:
        return Handle(ray.get_actor(GATEWAY, namespace=NAMESPACE), api_key or key_of_environment())
    except ValueError as e:
        raise ConfigError("no Echelon runs in this Ray cluster: start one with echelon serve --address") from e
