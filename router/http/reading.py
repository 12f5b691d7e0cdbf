"""The answer to one job as it comes in: every delta to its choice, the bill, and what is missing at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from router.generation import Batch, ChoiceDelta, Generator
from router.http.batches import generate_all
from router.http.best import best
from router.http.job import Job
from router.metrics import Meter
from router.parsers.pieces import ParsedMessage
from router.protocol.answers import ChoiceAnswer, PartsFormat, ShownToken, Usage
from workers.api.errors import EngineFault


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `token_ids[i]` are all ids that choice i emitted, the one that ended it included."""

    choices: tuple[ChoiceAnswer, ...]
    token_ids: tuple[tuple[int, ...], ...]
    usage: Usage


class Reading:
    """Reads `job`'s deltas; `meter`, if any, hears of tokens and ends. `left` choices are unfinished."""

    def __init__(self, job: Job, meter: Meter | None = None) -> None:
        self.left = len(job.choices)
        self._job, self._meter = job, meter
        self._choices, self._format, self._logprobs = job.choices, job.format, job.logprobs
        self._prompt_event = job.prompt_event
        self._parts = job.format.parts if isinstance(job.format, PartsFormat) else None

    def push(self, item: ChoiceDelta) -> str:
        """New text of `item.choice`, which is not over. Raises EngineFault."""
        choice = self._choices[item.choice]
        before = choice.token_count
        text = choice.push(item.delta)
        meter = self._meter
        if meter is not None:
            meter.tokens(item.choice, choice.token_count - before)
        if choice.finish is not None:
            self.left -= 1
            if meter is not None:
                meter.finished(choice.finish)
        return text

    def events(self, batch: Batch) -> str:
        """The stream's events for one batch, joined; may be empty. Raises EngineFault."""
        events = ""
        for item in batch:
            choice = self._choices[item.choice]
            if choice.is_over():
                continue
            first = self._prompt_event is not None and choice.token_count == 0
            text = self.push(item)
            if first and self._prompt_event is not None:
                events += self._prompt_event(choice.index, choice.prompt_logprobs)
            tokens = choice.take_tokens() if self._logprobs else None
            if choice.parser is not None:
                assert self._parts is not None, "this answer's format knows no parts"
                events += self._parts(choice.index, choice.parse(text), tokens)
            elif text or tokens:
                events += self._format.text(choice.index, text, tokens)
            if choice.finish is not None:
                events += self._format.finish(choice.index, choice.reason)
        return events

    async def collect(self, generator: Generator) -> Answer:
        """The whole answer. Cancelling it aborts the sequences. Raises EngineFault, and what the generator raises."""
        job = self._job
        texts: list[list[str]] = [[] for _ in job.choices]
        tokens: list[list[ShownToken]] = [[] for _ in job.choices]
        ids: list[list[int]] = [[] for _ in job.choices]
        messages = [None if choice.parser is None else ParsedMessage() for choice in job.choices]

        def take(batch: Batch) -> bool:
            for item in batch:
                if job.choices[item.choice].is_over():
                    continue
                text = self.push(item)
                texts[item.choice].append(text)
                message = messages[item.choice]
                if message is not None:
                    message.add(job.choices[item.choice].parse(text))
                tokens[item.choice] += job.choices[item.choice].take_tokens() or ()
                ids[item.choice] += item.delta.token_ids
            return self.left > 0

        await generate_all(generator, job.requests, take)
        self.check_finished()
        n = len(job.requests[0].samplings)
        kept = list(range(len(job.choices)))
        answers = [
            ChoiceAnswer(
                c.index,
                "".join(texts[c.index]),
                c.reason,
                tokens[c.index],
                job.choices[c.index - c.index % n].prompt_logprobs,
                messages[c.index],
                tuple(ids[c.index][: c.token_count]),
            )
            for c in job.choices
        ]
        if job.shown is not None:
            kept, answers = best(answers, n, job.shown, ranked=job.requests[0].beams is not None)
        if not job.logprobs:
            answers = [replace(a, tokens=None) for a in answers]
        return Answer(tuple(answers), tuple(tuple(ids[i][: job.choices[i].token_count]) for i in kept), self.usage())

    def check_finished(self) -> None:
        """Raises EngineFault while choices are unfinished."""
        if self.left:
            raise EngineFault(f"The generation ended with {self.left} of {len(self._job.choices)} choices unfinished.")

    def usage(self) -> Usage:
        """The bill so far."""
        return self._job.usage()
