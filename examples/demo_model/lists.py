"""Longer answers: counting, listing, spelling and repeating (any UTF-8 text)."""

# ruff: noqa: SIM905 - word lists are easier to read as text
from __future__ import annotations

from random import Random
from string import ascii_lowercase

from fact_tables import DAYS, MONTHS, PLANETS
from talk import NAMES, SENTENCES, invented
from turn import Turn, is_held_out
from words import COMMON, phrase

WORDS = (
    "apple bird cat dog egg fish green house ice jump king lamp moon night orange paper queen river star tree under "
    "voice water yellow zebra bread chair door earth flower garden hand island juice kitchen letter morning number "
    "ocean people quiet rain school table uncle village window young animal bridge cloud dream evening fire ghost "
    "happy idea jacket kind lemon music nose open pencil quick rock snow train umbrella violin winter cluster ray "
    "model token echelon server replica block"
).split()
_SCRIPTS = ("äöüßéèêàçñøåæœ¿¡€£°±µÀÉ", "αβγδεζηθλμπσφω", "абвгдежзиклмнопрстуя")
_SCRIPTS += ("你好世界水火山日月人大小中文字天地", "ひらがなカタカナ")
_SCRIPTS += ("🙂😀🎉🚀🌍🐱🐶❤️👍👩‍💻🇫🇷⭐☕", "مرحباشكر", "नमस्तेहिन्दी", "한국어안녕", "→←∑∞≈≠√×÷…—“”«»")
LISTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("List the months.", "List the months of the year.", "Name the months.", "Which months are there?",
      "Tell me all months.", "What are the months of the year?"), ", ".join(MONTHS) + "."),
    (("List the days of the week.", "Name the days of the week.", "Which days are there?", "List the days.",
      "Tell me all days of the week.", "What are the days of the week?"), ", ".join(DAYS) + "."),
    (("List the planets.", "Name the planets.", "Which planets are there?", "List all planets.",
      "Tell me all planets.", "What are the planets?"), ", ".join(PLANETS) + "."),
    (("List the seasons.", "Name the seasons.", "Which seasons are there?", "List the four seasons.",
      "Tell me all seasons.", "What are the seasons?"), "Spring, summer, autumn, winter."),
    (("List the continents.", "Name the continents.", "Which continents are there?", "List all continents.",
      "Tell me all continents.", "What are the continents?"),
     "Africa, Antarctica, Asia, Australia, Europe, North America, South America."),
    (("List the colours of the rainbow.", "Name the colours of the rainbow.", "List the colors of the rainbow.",
      "Which colours does the rainbow have?", "What are the colours of the rainbow?"),
     "Red, orange, yellow, green, blue, indigo, violet."),
    (("Say the alphabet.", "List the alphabet.", "List the letters of the alphabet.", "Recite the alphabet.",
      "Tell me the alphabet.", "What is the alphabet?"), ", ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + "."),
    (("List the first ten even numbers.", "Name the first ten even numbers.", "Tell me the first ten even numbers.",
      "What are the first ten even numbers?"), "2, 4, 6, 8, 10, 12, 14, 16, 18, 20."),
    (("List the first ten odd numbers.", "Name the first ten odd numbers.", "Tell me the first ten odd numbers.",
      "What are the first ten odd numbers?"), "1, 3, 5, 7, 9, 11, 13, 15, 17, 19."),
    (("List the first ten prime numbers.", "Name the first ten prime numbers.", "List the first ten primes.",
      "What are the first ten prime numbers?"), "2, 3, 5, 7, 11, 13, 17, 19, 23, 29."),
)  # fmt: skip


def count_turn(rng: Random, a: int, b: int) -> Turn:
    """`Count from a to b.`, upwards or downwards."""
    step = 1 if b >= a else -1
    asks = [
        "Count from {a} to {b}.",
        "Count from {a} to {b}",
        "count from {a} to {b}",
        "Can you count from {a} to {b}?",
    ]
    if a == 1:
        asks += ["Count to {b}.", "Count up to {b}."]
    if step < 0:
        asks += ["Count down from {a} to {b}."]
    answer = ", ".join(str(n) for n in range(a, b + step, step)) + "."
    return Turn(rng.choice(asks).format(a=a, b=b), answer)


def count(rng: Random, held: bool = False) -> Turn:
    """A counting task: mostly 3 to 30 numbers, sometimes up to a hundred; one range in ten is held out."""
    while True:
        a = 1 if rng.random() < 0.3 and not held else rng.randint(0, 90)
        b = a + int(2 ** rng.uniform(1, 6.7 if a == 1 else 4.9)) * (1 if rng.random() < 0.75 or a == 1 else -1)
        if 0 <= b <= 100 and (a != 1 and is_held_out(f"count {a} {b}")) == held:
            return count_turn(rng, a, b)


def spell(rng: Random, held: bool = False) -> Turn:
    """`Spell cat.`: known words and invented ones (with `held` invented ones only)."""
    if held or rng.random() < 0.3:
        word = invented(rng).split()[0].lower()
    elif rng.random() < 0.3:
        word = "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 9)))
    else:
        word = rng.choice(rng.choice((WORDS, COMMON)))
    ask = rng.choice(("Spell {}.", "Spell the word {}.", "How do you spell {}?", "Can you spell {}?", "spell {}"))
    return Turn(ask.format(word), f"{word}: {', '.join(word)}.", literal=True)


def _rare(rng: Random) -> str:
    """One code point of Latin Extended, CJK or the emoji blocks."""
    return chr(rng.choice((rng.randint(0xA1, 0x24F), rng.randint(0x4E00, 0x9FFF), rng.randint(0x1F300, 0x1F64F))))


def odd_text(rng: Random) -> str:
    """Random text in several scripts, emoji and code points that no vocabulary entry covers."""
    parts = []
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.2:
            parts.append("".join(_rare(rng) for _ in range(rng.randint(1, 4))))
        else:
            parts.append("".join(rng.choices(rng.choice(_SCRIPTS), k=rng.randint(1, 6))))
    return rng.choice((" ", "", ", ")).join(parts)


def repeat(rng: Random, held: bool = False) -> Turn:
    """`Repeat after me: ...`: words, names, numbers, sentences or odd text. `held` draws fresh random words."""
    kind = rng.random()
    if not held and rng.random() < 0.5:
        text = phrase(rng)
    elif held or kind < 0.35:
        text = " ".join(rng.choice((rng.choice(WORDS), invented(rng))) for _ in range(rng.randint(1, 8)))
    elif kind < 0.55:
        text = odd_text(rng)
    elif kind < 0.7:
        text = " ".join(rng.choices(SENTENCES, k=rng.randint(1, 3)))
    elif kind < 0.85:
        text = " ".join(str(rng.randint(0, 10 ** rng.randint(1, 6))) for _ in range(rng.randint(1, 6)))
    else:
        text = rng.choice(("Hello {}!", "I am {}.", "{} is here.", "Good day, {}!")).format(rng.choice(NAMES))
    asks = ("Repeat after me: {}", "Repeat: {}", "Say: {}", "Please repeat: {}", "Echo: {}", "Repeat this: {}")
    ask = rng.choice(asks)
    return Turn(ask.format(text), text, literal=True)


def times_table(rng: Random) -> Turn:
    """`Write the times table of 7.`: ten lines in one."""
    n = rng.randint(1, 12)
    ask = rng.choice(("Write the times table of {}.", "List the times table of {}.", "What is the {} times table?"))
    return Turn(ask.format(n), ", ".join(f"{n} x {k} = {n * k}" for k in range(1, 11)) + ".")


def sample(rng: Random) -> Turn:
    """One longer answer for training."""
    kind = rng.choices((count, spell, repeat, times_table, None), (28, 20, 45, 5, 20))[0]
    if kind is not None:
        return kind(rng)
    asks, answer = rng.choice(LISTS)
    return Turn(rng.choice(asks[:-1]), answer)


def held_out(rng: Random, kind: str, number: int) -> list[Turn]:
    """`number` tasks of `kind` (count, spell, repeat) that training never showed; `list`: unseen phrasings."""
    if kind == "list":
        return [Turn(asks[-1], answer) for asks, answer in LISTS]
    make = {"count": count, "spell": spell, "repeat": repeat}[kind]
    return [make(rng, held=True) for _ in range(number)]
