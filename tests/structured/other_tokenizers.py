"""Small tokenizers that are not byte-level, as checkpoints have them. Seeded: the same each time."""

from __future__ import annotations

from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIALS = ("<unk>", "<s>", "</s>")
END = 2
_BYTES = tuple(f"<0x{b:02X}>" for b in range(256))


def pieces(count: int = 300) -> list[str]:
    """Letters, digits, marks, and words made of letters; "\u2581" stands for a space."""
    random = Random(7)
    single = [chr(c) for c in range(0x21, 0x7F)] + ["\u2581", "\u00fc", "\u00e9"]
    found = dict.fromkeys(single)
    for text in (
        '":',
        '",',
        '{"',
        '"}',
        "},",
        '":\u2581',
        ',\u2581"',
        "\u2581{",
        '\u2581"',
        "\u2581[",
        "\u2581\u2581",
        "12",
        "345",
    ):
        found.setdefault(text)
    for text in ("yes", "no", "name", "age", "\u2581yes", "\u2581no", "\u2581name", "\u2581age"):
        found.setdefault(text)
    while len(found) < count:
        word = "".join(random.choices("abcdefgh", k=random.randint(2, 4)))
        found.setdefault(word)
        found.setdefault("\u2581" + word)
    return list(found)


def _bpe(byte_fallback: bool) -> models.BPE:
    names = [*SPECIALS, *(_BYTES if byte_fallback else ()), *pieces()]
    return models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>", fuse_unk=True,
        byte_fallback=byte_fallback,
    )  # fmt: skip


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def llama2() -> Tokenizer:
    """SentencePiece's BPE with byte fallback, as transformers converts it."""
    made = Tokenizer(_bpe(True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(made)


def metaspace(scheme: str = "always") -> Tokenizer:
    """The same with the space put before by a pre-tokenizer, as newer conversions have it."""
    made = Tokenizer(_bpe(True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_specials(made)


def gemma() -> Tokenizer:
    """Byte fallback without any space put before."""
    made = Tokenizer(_bpe(True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_specials(made)


def unigram() -> Tokenizer:
    """SentencePiece's unigram without byte fallback (T5's)."""
    made = Tokenizer(models.Unigram([(name, -1.0 * i) for i, name in enumerate([*SPECIALS, *pieces()])], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return _with_specials(made)


def wordpiece() -> Tokenizer:
    """BERT's: spaces are between tokens and in none of them."""
    words = [piece.replace("\u2581", "") for piece in pieces()]
    names = dict.fromkeys([*SPECIALS, "[UNK]", *filter(None, words), *(f"##{word}" for word in words if word)])
    made = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return _with_specials(made)
