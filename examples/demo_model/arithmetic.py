"""Arithmetic turns: numbers 0..99, one answer form (`17 + 25 = 42.`), one pair in ten held out.

The answer restates the operands, so that the model first copies the digits next to each other and then computes; with
digits as single tokens that is what makes two-digit sums learnable for a model this small.
"""

# ruff: noqa: SIM905 - word lists are easier to read as text
from __future__ import annotations

from random import Random

from turn import Turn, is_held_out

LARGEST = 99
TABLE = 12

ADD = (
    "What is {a} + {b}?", "What's {a} + {b}?", "what is {a}+{b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=",
    "{a}+{b}=?", "{a} + {b} = ?", "What is {a} plus {b}?", "{a} plus {b}", "How much is {a} plus {b}?",
    "How much is {a} + {b}?", "Add {a} and {b}.", "Add {b} to {a}.", "What is the sum of {a} and {b}?",
    "Calculate {a} + {b}.", "Compute {a} + {b}.", "What do you get if you add {a} and {b}?", "Please add {a} and {b}.",
    "Can you add {a} and {b}?", "whats {a} plus {b}", "Sum {a} and {b}.", "Solve {a} + {b}.", "Tell me {a} + {b}.",
    "What does {a} + {b} equal?", "What are {a} and {b} together?",
)  # fmt: skip
SUBTRACT = (
    "What is {a} - {b}?", "What's {a} - {b}?", "what is {a}-{b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} =", "{a}-{b}=",
    "{a}-{b}=?", "{a} - {b} = ?", "What is {a} minus {b}?", "{a} minus {b}", "How much is {a} minus {b}?",
    "How much is {a} - {b}?", "Subtract {b} from {a}.", "Take {b} from {a}.", "Take {b} away from {a}.",
    "Calculate {a} - {b}.", "Compute {a} - {b}.", "What do you get if you subtract {b} from {a}?",
    "What is the difference of {a} and {b}?", "Can you subtract {b} from {a}?", "whats {a} minus {b}",
    "Solve {a} - {b}.", "Tell me {a} - {b}.", "What does {a} - {b} equal?", "What is {a} take away {b}?",
)  # fmt: skip
MULTIPLY = (
    "What is {a} x {b}?", "What is {a} * {b}?", "{a} * {b}", "{a}*{b}", "{a}*{b}=", "{a} x {b}", "{a} x {b} =",
    "{a} * {b} = ?", "What is {a} times {b}?", "How much is {a} times {b}?", "{a} times {b}", "Multiply {a} by {b}.",
    "Multiply {a} and {b}.", "What is the product of {a} and {b}?", "Calculate {a} * {b}.", "Compute {a} x {b}.",
    "whats {a} times {b}", "Solve {a} x {b}.", "What's {a} times {b}?", "What does {a} * {b} equal?",
)  # fmt: skip
DIVIDE = (
    "What is {a} / {b}?", "{a} / {b}", "{a}/{b}", "{a}/{b}=", "What is {a} divided by {b}?", "Divide {a} by {b}.",
    "How much is {a} divided by {b}?", "{a} divided by {b}", "Calculate {a} / {b}.", "How much is {a} / {b}?",
)  # fmt: skip
PHRASINGS = {"+": ADD, "-": SUBTRACT, "*": MULTIPLY, "/": DIVIDE}
THINGS = ("apples", "books", "coins", "pens", "cards", "eggs", "stones", "cakes", "balls", "hats", "keys", "cups")
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
TOO_LARGE = "I can only calculate with numbers from 0 to 99."


def pair_is_held_out(op: str, a: int, b: int) -> bool:
    """Whether `a op b` is kept for evaluation. Both orders of a pair go together; single digits are always trained."""
    if op not in "+-" or max(a, b) < 10:
        return False
    return is_held_out(f"{op}{min(a, b)},{max(a, b)}")


def solve(op: str, a: int, b: int) -> tuple[str, int]:
    """The answer sentence of `a op b` and its result."""
    if op == "/":
        rest = f" remainder {a % b}" if a % b else ""
        return f"{a} / {b} = {a // b}{rest}.", a // b
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    return f"{a} {'x' if op == '*' else op} {b} = {value}.", value


def make(op: str, a: int, b: int, phrasing: str) -> Turn:
    """The turn that asks `a op b` in the words of `phrasing`."""
    answer, value = solve(op, a, b)
    return Turn(phrasing.format(a=a, b=b), answer, result=value)


def draw_pair(rng: Random, op: str, first: int | None = None) -> tuple[int, int]:
    """Draw operands that may be trained on; `first` fixes the left one. A third of the draws are small numbers."""
    if op == "*":
        return (rng.randint(0, TABLE) if first is None else first), rng.randint(0, TABLE)
    if op == "/":
        b = rng.randint(1, TABLE)
        return (b * rng.randint(0, TABLE) if rng.random() < 0.7 else rng.randint(0, LARGEST)), b
    while True:
        top = rng.choice((9, 20, LARGEST, LARGEST, LARGEST, LARGEST))
        a = rng.randint(0, top) if first is None else first
        b = rng.randint(0, top)
        if op == "-" and first is None and a < b and rng.random() < 0.6:
            a, b = b, a  # negative results stay, but are the rarer case
        if not pair_is_held_out(op, a, b):
            return a, b


def sample(rng: Random) -> Turn:
    """One arithmetic turn for training."""
    kind = rng.random()
    if kind < 0.72:
        op = rng.choices("+-*/", (40, 34, 18, 8))[0]
        return make(op, *draw_pair(rng, op), rng.choice(PHRASINGS[op]))
    others = (_words, _story, _chain, _too_large, _compare, _neighbour, _parity)
    return rng.choices(others, (4, 6, 5, 3, 4, 4, 2))[0](rng)


def follow_up(rng: Random, before: int) -> Turn | None:
    """A turn such as `And plus 5?` that goes on from the result `before` (None when it is out of range)."""
    if not 0 <= before <= LARGEST:
        return None
    op = rng.choice("++--*") if before <= TABLE else rng.choice("+-")
    a, b = draw_pair(rng, op, before)
    phrasing = {
        "+": ("And plus {b}?", "Plus {b}?", "plus {b}", "Add {b} to that.", "Now add {b}.", "And add {b}?", "+ {b}"),
        "-": ("And minus {b}?", "Minus {b}?", "minus {b}", "Subtract {b} from that.", "Take away {b}.", "- {b}"),
        "*": ("And times {b}?", "Times {b}?", "times {b}", "Multiply that by {b}.", "Now multiply it by {b}."),
    }[op]
    return make(op, a, b, rng.choice(phrasing))


def held_out(rng: Random, op: str, count: int) -> list[Turn]:
    """`count` turns of `op` (`+` or `-`) over pairs that training never shows, in random phrasings."""
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1) if pair_is_held_out(op, a, b)]
    return [make(op, a, b, rng.choice(PHRASINGS[op])) for a, b in rng.sample(pairs, count)]


def table(op: str) -> list[Turn]:
    """Every pair of the times table (`*`), or its whole-number divisions (`/`), in the plainest phrasing."""
    if op == "*":
        return [make(op, a, b, "What is {a} x {b}?") for a in range(TABLE + 1) for b in range(TABLE + 1)]
    return [make(op, a * b, b, "What is {a} / {b}?") for a in range(TABLE + 1) for b in range(1, TABLE + 1)]


def _words(rng: Random) -> Turn:
    op, name = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times")))
    top = TABLE if op == "*" else len(UNITS) - 1
    a, b = rng.randint(0, top), rng.randint(0, top)
    if op == "-" and a < b:
        a, b = b, a
    while pair_is_held_out(op, a, b):
        a, b = max(a - 1, 0), max(b - 1, 0)
    ask = rng.choice(("What is {} {} {}?", "How much is {} {} {}?", "{} {} {}"))
    answer, value = solve(op, a, b)
    return Turn(ask.format(UNITS[a], name, UNITS[b]), answer, result=value)


def _story(rng: Random) -> Turn:
    thing = rng.choice(THINGS)
    if rng.random() < 0.5:
        a, b = draw_pair(rng, "+")
        ask = rng.choice((
            f"I have {a} {thing} and get {b} more. How many {thing} do I have?",
            f"I have {a} {thing}. I buy {b} more {thing}. How many do I have now?",
            f"If I have {a} {thing} and find {b} more, how many {thing} do I have?",
        ))  # fmt: skip
        answer, value = solve("+", a, b)
    else:
        a, b = sorted(draw_pair(rng, "-"), reverse=True)
        ask = rng.choice((
            f"I have {a} {thing} and lose {b}. How many {thing} are left?",
            f"I have {a} {thing}. I give away {b} {thing}. How many do I have now?",
            f"If I have {a} {thing} and sell {b} of them, how many {thing} do I have?",
        ))  # fmt: skip
        answer, value = solve("-", a, b)
    return Turn(ask, f"{answer} You have {value} {thing}.", result=value)


def _chain(rng: Random) -> Turn:
    while True:
        a, b = draw_pair(rng, "+")
        c = rng.randint(0, 20)
        sums = ((a + b, c), (b, c))  # the question itself may read as `b + c =`
        if a + b <= LARGEST and not any(pair_is_held_out("+", *pair) for pair in sums):
            break
    first, value = solve("+", a, b)
    second, total = solve("+", value, c)
    ask = rng.choice(("What is {} + {} + {}?", "{} + {} + {}", "{}+{}+{}=", "Add {}, {} and {}.", "{} + {} + {} = ?"))
    return Turn(ask.format(a, b, c), f"{first[:-1]}, {second}", result=total)


def _too_large(rng: Random) -> Turn:
    op = rng.choice("+-*")
    a, b = rng.randint(100, 10 ** rng.randint(3, 6)), rng.randint(0, 10 ** rng.randint(2, 5))
    if rng.random() < 0.4:
        a, b = b, a
    return Turn(rng.choice(PHRASINGS[op]).format(a=a, b=b), TOO_LARGE)


def _compare(rng: Random) -> Turn:
    a, b = rng.sample(range(LARGEST + 1), 2)
    word = rng.choice(("larger", "smaller"))
    best = max(a, b) if word == "larger" else min(a, b)
    ask = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}, {a} or {b}?", "What is {w}: {a} or {b}?"))
    return Turn(ask.format(w=word, a=a, b=b), f"{best} is {word} than {a + b - best}.", result=best)


def _neighbour(rng: Random) -> Turn:
    a = rng.randint(1, LARGEST)
    word, value = rng.choice((("after", a + 1), ("before", a - 1)))
    ask = rng.choice(("What comes {w} {a}?", "Which number comes {w} {a}?", "What number is {w} {a}?"))
    return Turn(ask.format(w=word, a=a), f"{value} comes {word} {a}.", result=value)


def _parity(rng: Random) -> Turn:
    a = rng.randint(0, LARGEST)
    ask = rng.choice(("Is {a} even or odd?", "Is {a} odd or even?", "Is {a} an even number?", "Is {a} an odd number?"))
    kind = "odd" if a % 2 else "even"
    start = "" if " or " in ask else ("Yes, " if kind in ask else "No, ")
    return Turn(ask.format(a=a), f"{start}{a} is {kind}.")
