"""Facts: tables of small categories, asked in several phrasings each; one phrasing of every fact is held out."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from fact_tables import (
    BABIES,
    CAPITALS,
    COLOURS,
    CONTINENTS,
    CURRENCIES,
    DAYS,
    ELEMENTS,
    LEGS,
    MISC,
    MONTH_DAYS,
    MONTHS,
    OPPOSITES,
    ORDINALS,
    PLANETS,
    PLURALS,
    SHAPES,
    SOUNDS,
    TRANSLATIONS,
)
from turn import Turn, bucket


@dataclass(frozen=True, slots=True)
class Category:
    """Facts of one kind: each row of `rows` fills `asks` (first: the plainest) and `answer` by position.

    `more` are follow-ups (`And of {0}?`) that make sense only after a question of the same category.
    """

    name: str
    asks: tuple[str, ...]
    answer: str
    rows: tuple[tuple[str, ...], ...]
    more: tuple[str, ...] = ()

    def held_out_ask(self, row: tuple[str, ...]) -> int:
        """Index of the phrasing that training never shows for `row`; the plainest one (0) is always trained."""
        return 1 + bucket(f"{self.name}:{'/'.join(row)}", len(self.asks) - 1)

    def turn(self, row: tuple[str, ...], ask: str) -> Turn:
        """The turn that asks for `row` with the template `ask`."""
        first_up = self.answer.format(*row)
        return Turn(ask.format(*row), first_up[0].upper() + first_up[1:], topic=self.name)


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(part.strip() for part in row.split(":")) for row in text.split(",") if row.strip())


def _neighbours(names: list[str], step: int) -> tuple[tuple[str, ...], ...]:
    return tuple((name, names[(i + step) % len(names)]) for i, name in enumerate(names))


CATEGORIES: tuple[Category, ...] = (
    Category("capital", (
        "What is the capital of {0}?", "What's the capital of {0}?", "Which city is the capital of {0}?",
        "Tell me the capital of {0}.", "Capital of {0}?", "Name the capital of {0}.", "{0}: what is its capital?",
        "Do you know the capital of {0}?", "What is the capital city of {0}?",
    ), "The capital of {0} is {1}.", _rows(CAPITALS), ("And of {0}?", "And {0}?", "What about {0}?", "And for {0}?")),
    Category("city", (
        "What is {1}?", "{1} is", "Tell me about {1}.", "Which country is {1} the capital of?",
        "{1} is the capital of which country?", "Where is {1}?",
    ), "{1} is the capital of {0}.", tuple(r for r in _rows(CAPITALS) if r[0] != "England"), ("And {1}?",)),
    Category("continent", (
        "Which continent is {0} in?", "What continent is {0} in?", "On which continent is {0}?",
        "Where is {0}?", "{0} is in which continent?", "Tell me the continent of {0}.",
    ), "{0} is in {1}.", _rows(CONTINENTS), ("And {0}?", "What about {0}?")),
    Category("currency", (
        "What is the currency of {0}?", "Which money do they use in {0}?", "What do people pay with in {0}?",
        "Tell me the currency of {0}.", "Currency of {0}?",
    ), "The currency of {0} is the {1}.", _rows(CURRENCIES), ("And of {0}?", "What about {0}?")),
    Category("colour", (
        "What colour {1} {0}?", "What color {1} {0}?", "Which colour {1} {0}?", "Tell me the colour of {0}.",
        "What is the colour of {0}?", "What is the color of {0}?",
    ), "{0} {1} {2}.", _rows(COLOURS), ("And {0}?", "What about {0}?")),
    Category("sound", (
        "What sound does {0} make?", "What does {0} do to make a sound?", "Which sound does {0} make?",
        "What noise does {0} make?", "How does {0} sound?",
    ), "{0} {1}.", _rows(SOUNDS), ("And {0}?", "What about {0}?")),
    Category("baby", (
        "What is a baby {0} called?", "What do you call a baby {0}?", "What is the young of a {0} called?",
        "Name for a baby {0}?", "How do you call a young {0}?",
    ), "A baby {0} is called a {1}.", _rows(BABIES), ("And a baby {0}?",)),
    Category("legs", (
        "How many legs does {0} have?", "How many legs has {0} got?", "Tell me how many legs {0} has.",
        "What is the number of legs of {0}?",
    ), "{0} has {1} legs.", _rows(LEGS), ("And {0}?", "What about {0}?")),
    Category("day after", (
        "What day comes after {0}?", "Which day comes after {0}?", "What day is after {0}?",
        "What comes after {0}?", "Which day follows {0}?",
    ), "{1} comes after {0}.", _neighbours(DAYS, 1), ("And after {0}?",)),
    Category("day before", (
        "What day comes before {0}?", "Which day comes before {0}?", "What day is before {0}?",
        "What comes before {0}?",
    ), "{1} comes before {0}.", _neighbours(DAYS, -1), ("And before {0}?",)),
    Category("month after", (
        "What month comes after {0}?", "Which month comes after {0}?", "What month is after {0}?",
        "What comes after {0}?", "Which month follows {0}?",
    ), "{1} comes after {0}.", _neighbours(MONTHS, 1), ("And after {0}?",)),
    Category("month before", (
        "What month comes before {0}?", "Which month comes before {0}?", "What month is before {0}?",
        "What comes before {0}?",
    ), "{1} comes before {0}.", _neighbours(MONTHS, -1), ("And before {0}?",)),
    Category("nth month", (
        "What is the {1} month of the year?", "Which month is the {1} one?", "Name the {1} month.",
        "Tell me the {1} month of the year.",
    ), "The {1} month is {0}.", tuple(zip(MONTHS, ORDINALS, strict=True)), ("And the {1}?",)),
    Category("month days", (
        "How many days does {0} have?", "How many days are in {0}?", "How many days are there in {0}?",
        "How long is {0}?",
    ), "{0} has {1} days.", tuple(zip(MONTHS, MONTH_DAYS, strict=True)), ("And {0}?", "What about {0}?")),
    Category("planet", (
        "What is the {1} planet from the Sun?", "Which planet is the {1} from the Sun?", "Name the {1} planet.",
        "Which planet is number {2} from the Sun?",
    ), "The {1} planet from the Sun is {0}.",
        tuple((p, ORDINALS[i], str(i + 1)) for i, p in enumerate(PLANETS)), ("And the {1}?",)),
    Category("symbol", (
        "What is the chemical symbol for {0}?", "What is the symbol of {0}?", "Chemical symbol of {0}?",
        "Which symbol does {0} have?", "Tell me the chemical symbol of {0}.",
    ), "The chemical symbol for {0} is {1}.", _rows(ELEMENTS), ("And for {0}?", "And {0}?", "What about {0}?")),
    Category("element", (
        "Which element has the symbol {1}?", "What element is {1}?", "What does the chemical symbol {1} stand for?",
        "Which chemical element is {1}?",
    ), "{1} is the chemical symbol for {0}.", _rows(ELEMENTS)),
    Category("opposite", (
        "What is the opposite of {0}?", "What's the opposite of {0}?", "Opposite of {0}?",
        "Tell me the opposite of {0}.", "Which word is the opposite of {0}?", "What is the antonym of {0}?",
    ), "The opposite of {0} is {1}.",
        tuple(p for a, b in _rows(OPPOSITES) for p in ((a, b), (b, a))), ("And of {0}?", "And {0}?")),
    Category("plural", (
        "What is the plural of {0}?", "What's the plural of {0}?", "Plural of {0}?", "Tell me the plural of {0}.",
        "How do you write more than one {0}?", "One {0}, two what?",
    ), "The plural of {0} is {1}.", _rows(PLURALS), ("And of {0}?", "And {0}?")),
    Category("shape", (
        "How many sides does a {0} have?", "How many sides has a {0} got?", "Tell me how many sides a {0} has.",
        "What is the number of sides of a {0}?",
    ), "A {0} has {1} sides.", _rows(SHAPES), ("And a {0}?", "What about a {0}?")),
    Category("translation", (
        "How do you say {0} in {1}?", "What is {0} in {1}?", "Translate {0} to {1}.", "Say {0} in {1}.",
        "What is the {1} word for {0}?",
    ), "In {1}, {0} is {2}.", _rows(TRANSLATIONS), ()),
)  # fmt: skip
BY_NAME = {category.name: category for category in CATEGORIES}
# Two categories may ask in the same words ("Where is France?", "Where is Paris?"): their rows differ, so no clash.
COUNT = sum(len(category.rows) for category in CATEGORIES) + len(MISC)


def sample(rng: Random) -> Turn:
    """One fact for training, never in its held-out phrasing."""
    if rng.random() < 0.16:
        asks, answer = rng.choice(MISC)
        return Turn(rng.choice(asks[:-1]), answer)
    weights = [len(category.rows) ** 0.7 for category in CATEGORIES]  # small categories are seen more often per fact
    category = rng.choices(CATEGORIES, weights)[0]
    row = rng.choice(category.rows)
    if rng.random() < 0.25:
        return category.turn(row, category.asks[0])
    hidden = category.held_out_ask(row)
    return category.turn(row, rng.choice([ask for i, ask in enumerate(category.asks) if i != hidden]))


def follow_up(rng: Random, topic: str) -> Turn | None:
    """`And of Spain?`: another fact of the category `topic`; None where the category has no such phrasing."""
    category = BY_NAME.get(topic)
    if category is None or not category.more:
        return None
    return category.turn(rng.choice(category.rows), rng.choice(category.more))


def held_out() -> list[Turn]:
    """Every fact once, in the phrasing that training never shows for it."""
    turns = [c.turn(row, c.asks[c.held_out_ask(row)]) for c in CATEGORIES for row in c.rows]
    return turns + [Turn(asks[-1], answer) for asks, answer in MISC]


def plain() -> list[Turn]:
    """Every fact once, in its plainest phrasing."""
    turns = [c.turn(row, c.asks[0]) for c in CATEGORIES for row in c.rows]
    return turns + [Turn(asks[0], answer) for asks, answer in MISC]
