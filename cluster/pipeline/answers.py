"""What a pipeline gives back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Response:
    """An answer, or a piece of one.

    `token_ids` are those that were emitted, the one that ended the answer included, and `generate_token_len` counts
    them; in a stream `text`, `token_ids` and `logprobs` are what is new, and the count goes on. `finish_reason` is
    `stop`, `length`, or None while more comes. `logprobs` maps token ids to natural logarithms, for each token drawn.
    `index` is the answer's place among those of one call: prompt p's choice c stands at p * n + c.
    """

    text: str
    generate_token_len: int
    input_token_len: int
    session_id: int = -1
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    index: int = 0


@dataclass
class Session:
    """A conversation of `pipeline.chat`: the turns so far, question and answer, and the last answer."""

    history: list[tuple[str, str]] = field(default_factory=list)
    response: Response | None = None
    system: str | None = None

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The whole conversation with `prompt` at its end."""
        said = [] if self.system is None else [("system", self.system)]
        for question, answer in self.history:
            said += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": text} for role, text in [*said, ("user", prompt)]]
