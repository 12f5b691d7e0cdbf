"""A tokenizer.json that nobody trained: byte-level BPE with as many tokens as a large model has, seeded.

What a grammar costs depends on the bytes of the tokens alone, so they are of the kinds that such vocabularies have: all
single bytes, spaces and line ends in runs, numbers up to 999, punctuation as it stands in JSON and code, pieces of
characters outside ASCII, and made-up words, whole and in parts, most of them behind a space. Where two tokens make a
third one, a merge says so: text is cut into tokens of some length.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

SPECIALS = 256  # ids at the end that no text has
END = "<|end_of_text|>"
_ONSETS = ["", *"bcdfghjklmnprstvwz", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "qu", "sh", "sp", "st",
           "str", "th", "tr", "wh"]  # fmt: skip
_VOWELS = [*"aeiou", "ai", "ea", "ee", "io", "oo", "ou", "y"]
_CODAS = ["", "", *"bcdgklmnprstxz", "ck", "ght", "ll", "nd", "ng", "nt", "rd", "rt", "ss", "st"]
_ENDS = ["s", "ed", "er", "ing", "ion", "ly", "able", "ment", "ness", "ity"]
_MARKS = "\"{}[]:,.;()<>/\\=_-+*&|!?#@$%'`~^"


def byte_names() -> list[str]:
    """What byte-level BPE calls each byte: printable Latin-1 is itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def made_tokens(count: int, seed: int = 0) -> list[bytes]:
    """`count` different tokens, at least the 256 bytes."""
    random = Random(seed)
    found = dict.fromkeys(bytes([b]) for b in range(256))
    for n in range(2, 33):
        found |= dict.fromkeys((b" " * n, b"\n" * n, b"\t" * n, b"\n" + b" " * n))
    found |= dict.fromkeys(str(n).encode() for n in range(1000))
    found |= dict.fromkeys(f"{n:0{width}}".encode() for width in (2, 3) for n in range(10**width))
    pairs = ["".join(pair) for pair in product(_MARKS, repeat=2)]
    found |= dict.fromkeys(pair.encode() for pair in pairs)
    for text in (
        '":',
        '",',
        '"}',
        '"]',
        '":"',
        '": "',
        '","',
        '", "',
        '"},',
        '"],',
        '"}]',
        '[{"',
        '{"',
        '"}}',
        '"]}',
        "}}",
    ):
        found |= dict.fromkeys((text.encode(), b" " + text.encode(), text.encode() + b"\n"))
    for first, second in ((0x0400, 0x0460), (0x0391, 0x03CA), (0x3041, 0x3097), (0x4E00, 0x5200), (0xAC00, 0xAE00)):
        found |= dict.fromkeys(chr(c).encode() for c in range(first, second))
    while len(found) < count:
        word = "".join(
            random.choice(_ONSETS) + random.choice(_VOWELS) + random.choice(_CODAS)
            for _ in range(random.choices((1, 2, 3), (2, 4, 2))[0])
        ) + (random.choice(_ENDS) if random.random() < 0.3 else "")
        for token in (" " + word, random.choice((word, word.capitalize(), " " + word.capitalize(), word.upper()))):
            found.setdefault(token.encode())
    return list(found)[:count]


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """For each token that two others make, these: the longest beginning that is a token, and what is left."""
    known = set(tokens)
    merges = []
    for token in tokens:
        cut = next((at for at in range(len(token) - 1, 0, -1) if token[:at] in known and token[at:] in known), 0)
        if cut:
            merges.append((token[:cut], token[cut:]))
    return merges


def write_tokenizer(path: Path, vocab_size: int, seed: int = 0) -> None:
    """A tokenizer.json of `vocab_size` tokens, the last `SPECIALS` of them special; `END` is the second of these."""
    tokens = made_tokens(vocab_size - SPECIALS, seed)
    names = byte_names()

    def name(token: bytes) -> str:
        return "".join([names[b] for b in token])

    specials = ["<|begin_of_text|>", END, *(f"<|reserved_{i}|>" for i in range(SPECIALS - 2))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_bytes: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "pre_tokenizer": by_bytes, "decoder": by_bytes,
        "added_tokens": [{"id": len(tokens) + i, "content": text, **flags} for i, text in enumerate(specials)],
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {name(token): i for i, token in enumerate(tokens)},
            "merges": [[name(left), name(right)] for left, right in merges_of(tokens)],
        },
    }  # fmt: skip
    path.write_text(json.dumps(document))
