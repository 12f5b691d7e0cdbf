"""A chat template said as its pieces: what stands before and after each turn. It becomes a jinja template.

    {system}{meta_instruction}{eosys}{user}{question}{eoh}{assistant}{answer}{eoa}{separator}{user}...

are the names that LMDeploy's JSON files have. Like everything that a template writes, the pieces may be special tokens;
what users say is never one.
"""

from __future__ import annotations

from dataclasses import dataclass

CAPABILITIES = ("completion", "infilling", "chat", "python")
FILL = "<FILL>"

# What a model calls the start of the prefix, of the suffix and of the middle, and what ends the middle.
INFILLING = (
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),  # Code Llama
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"),  # Qwen, Gemma
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜end▁of▁sentence｜>"),  # DeepSeek: the hole comes second
)


@dataclass(frozen=True, slots=True)
class ChatForm:
    """The pieces. `meta_instruction` is the system message where a conversation brings none; None: then there is none.

    `stop_words` end an answer, besides the checkpoint's own ends. `capability`: `chat`; `completion` and `python` take
    the messages as they stand, without any piece; `infilling` asks for what belongs in the place of `<FILL>` in the
    last message. `system_in_turn`: the system part stands inside the first user's turn. `numbered`: turns are counted,
    `user` has `{round}` in it. `opening`: `assistant` where an answer is asked for (None: the same).
    """

    system: str = ""
    meta_instruction: str | None = None
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    separator: str = ""
    stop_words: tuple[str, ...] = ()
    capability: str = "chat"
    system_in_turn: bool = False
    numbered: bool = False
    opening: str | None = None

    def as_jinja(self, leading: str = "", infilling: tuple[str, ...] = ()) -> str:
        """The template's source. `leading`: what the tokenizer puts in front of any text; it comes once.

        `infilling`: the tokenizer's own entry of INFILLING, where the capability is that.
        """
        if self.capability in ("completion", "python"):
            body = "{% for m in messages %}{{ m.content }}{% endfor %}"
        elif self.capability == "infilling":
            body = _infilling_body(*infilling[:3])
        else:
            body = self._chat_body()
        begin = ascii(leading)
        return (
            f"{{% set body %}}{body}{{% endset %}}"
            f"{{% if {begin} and not body.startswith({begin}) %}}{{{{ {begin} }}}}{{% endif %}}{{{{ body }}}}"
        )

    def _chat_body(self) -> str:
        user = f"{self.user!a}.replace('{{round}}', state.round ~ '')" if self.numbered else ascii(self.user)
        default = ""
        if self.meta_instruction is not None:
            said = ascii(self.system + self.meta_instruction + self.eosys)
            default = f"{{% if messages[0].role != 'system' %}}{{% set state.held = {said} %}}{{% endif %}}"
        opening = self.assistant if self.opening is None else self.opening
        shown = "{{ state.held }}{% set state.held = '' %}"
        before, within = ("", shown) if self.system_in_turn else (shown, "")
        return (
            "{% set state = namespace(held='', round=0, answered=false) %}"
            f"{default}"
            "{% for m in messages %}"
            f"{{% if state.answered %}}{{{{ {self.separator!a} }}}}{{% set state.answered = false %}}{{% endif %}}"
            "{% if m.role == 'system' %}"
            f"{{% set state.held = state.held ~ {self.system!a} ~ m.content ~ {self.eosys!a} %}}"
            "{% elif m.role == 'user' %}{% set state.round = state.round + 1 %}"
            f"{before}{{{{ {user} }}}}{within}{{{{ m.content }}}}{{{{ {self.eoh!a} }}}}"
            "{% elif m.role == 'assistant' %}"
            f"{shown}{{{{ {self.assistant!a} }}}}{{{{ m.content }}}}{{{{ {self.eoa!a} }}}}"
            "{% set state.answered = true %}"
            "{% else %}{{ raise_exception('this template knows the roles system, user and assistant') }}{% endif %}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{shown}"
            f"{{% if state.answered %}}{{{{ {self.separator!a} }}}}{{% endif %}}"
            f"{{{{ {opening!a} }}}}{{% else %}}{shown}{{% endif %}}"
        )


def _infilling_body(before: str, after: str, middle: str) -> str:
    return (
        f"{{% set parts = messages[-1].content.split({FILL!r}) %}}"
        "{% if parts | length != 2 %}"
        f"{{{{ raise_exception('infilling needs exactly one {FILL} in the last message') }}}}{{% endif %}}"
        f"{{{{ {before!a} ~ parts[0] ~ {after!a} ~ parts[1] ~ {middle!a} }}}}"
    )
