"""`GenerationConfig`: how answers are drawn, by LMDeploy's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from workers.api.errors import InvalidRequest
from workers.api.request import SamplingParams

MOST_LOGPROBS = 20


@dataclass
class GenerationConfig:
    """`top_k` 1 is greedy, 0 switches it off; `random_seed` None draws one; counts are in tokens.

    `n` answers are given for each prompt; `logprobs` asks for the log-probabilities of each token drawn and of so many
    likely ones.
    """

    n: int = 1
    max_new_tokens: int = 512
    top_p: float = 1.0
    top_k: int = 1
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: list[str] | None = None
    bad_words: list[str] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def body(self) -> dict[str, Any]:
        """The fields of OpenAI's bodies that say the same, but for lengths, stop words and log-probabilities.

        Raises InvalidRequest.
        """
        if self.max_new_tokens < 1:
            raise InvalidRequest(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}", param="max_new_tokens"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InvalidRequest(f"logprobs must be from 0 to {MOST_LOGPROBS}, got {self.logprobs}", param="logprobs")
        body: dict[str, Any] = {
            "n": self.n,
            "top_p": float(self.top_p),
            "top_k": self.top_k,
            "temperature": float(self.temperature),
            "repetition_penalty": float(self.repetition_penalty),
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
        }
        if self.random_seed is not None:
            body["seed"] = self.random_seed
        if self.bad_words:
            body["bad_words"] = list(self.bad_words)
        return body

    def fitted(self, sampling: SamplingParams) -> SamplingParams:
        """`sampling` (as many tokens as fit) with this config's lengths and log-probabilities."""
        most = min(sampling.max_tokens, self.max_new_tokens)
        least = min(self.min_new_tokens or 0, most)
        return replace(sampling, max_tokens=most, min_tokens=least, logprobs=self.logprobs)
