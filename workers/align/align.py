"""Ours and transformers over the same prompts, in every way that steps come: the first module that differs is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from workers.align.causes import likely_cause
from workers.align.pairing import Pairing, Rows
from workers.align.recording import INPUT, OUTPUT, Event, Recorder
from workers.align.report import AlignReport, Difference, ScenarioReport, Statistics
from workers.align.scenarios import Scenario, blocks_needed, prompts, scenarios
from workers.api.config import EngineConfig, ReplicaConfig
from workers.api.errors import ConfigError
from workers.context import ForwardContext, forward_context
from workers.models.base import CausalModel, read_config
from workers.models.registry import import_model_file
from workers.models.remote_code import remote_file, remote_model
from workers.models.transformers_model import TransformersForCausalLM, causal_class, making
from workers.parallel.group import Groups
from workers.parallel.local import run_ranks
from workers.rank import Rank

TOLERANCE = 2e-4  # of a tensor's root mean square
BLOCK_SIZE = 16
LOGITS = "logits"
Prepare = Callable[[CausalModel, int], None]


@dataclass(frozen=True, slots=True)
class Reference:
    """transformers' model and what it computes for the prompts, alone and whole."""

    model: Any
    ids: tuple[tuple[int, ...], ...]
    rows: Rows


def reference(folder: str, device: torch.device, *, trusted: bool = False) -> Reference:
    """Load and run transformers' model in fp32; with `trusted` that of the checkpoint's own code, if it has some.

    Raises ConfigError where there is none.
    """
    config = read_config(folder)
    own = trusted and remote_file(config) is not None
    cls = remote_model(config, folder).causal_class if own else causal_class(config)
    if cls is None:
        raise ConfigError(
            f"transformers has no causal model for {config.get('architectures')}: nothing to compare with"
        )
    with making():
        model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device).eval()
    ids = prompts(model.config.get_text_config().vocab_size)
    recorder, rows = Recorder(model), []
    with torch.inference_mode():
        for number, one in enumerate(ids):
            with recorder.step(len(one)):
                logits = model(torch.tensor([one], device=device), use_cache=False).logits[0]
                recorder.note(LOGITS, logits)
            rows += [(number, position) for position in range(len(one))]
    return Reference(model, tuple(ids), Rows.of(recorder.recording, rows, len(ids)))


def align(
    config: ReplicaConfig, *, ranks: int = 1, against: Reference | None = None, prepare: Prepare | None = None
) -> AlignReport:
    """Run all scenarios with one rank, and with `ranks` where these are more; all in fp32, in this process.

    `prepare(model, rank)` is called when a rank is loaded. Raises ConfigError, WeightError or OutOfMemory.
    """
    for file in config.model.model_files:
        import_model_file(file)
    source = read_config(config.model.path)
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    against = against or reference(config.model.path, device, trusted=config.model.trust_remote_code)
    engine = EngineConfig(
        block_size=BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=256, num_blocks=blocks_needed(BLOCK_SIZE),
        prefix_caching=False, cuda_graphs=False,
    )  # fmt: skip
    model = replace(config.model, dtype="float32", max_model_len=config.model.max_model_len)
    config = replace(config, model=model, engine=engine)
    reports: list[ScenarioReport] = []
    todo = scenarios(against.ids, BLOCK_SIZE)
    first: list[CausalModel] = []
    for size in sorted({1, ranks}):
        made = _record(replace(config, tensor_parallel=size), size, todo, prepare)
        models = [model for model, _ in made]
        first = models
        pairing = Pairing(models, against.model)
        for n, scenario in enumerate(todo):
            reports.append(_compare(pairing, against, [rows[n] for _, rows in made], scenario.name, size))
    return AlignReport(
        model=config.model.name,
        architecture=", ".join(source.get("architectures") or ["?"]),
        way=way_of(first[0]),
        plan=_plan(first[0]) if ranks > 1 else (),
        patched=tuple(first[0].patches.lines()) if isinstance(first[0], TransformersForCausalLM) else (),
        scenarios=tuple(reports),
    )


def way_of(model: CausalModel) -> str:
    """What runs it, in words."""
    if not isinstance(model, TransformersForCausalLM):
        return f"native ({type(model).__module__}.{type(model).__name__})"
    return "transformers' modules" + (", patched" if model.patches.counts else "")


def _plan(model: CausalModel) -> tuple[str, ...]:
    if not isinstance(model, TransformersForCausalLM):
        return ()
    plan = model.plan.without(model.patches.distributed)
    return tuple(f"{line} [{plan.source}]" for line in plan.summary())


def _record(
    config: ReplicaConfig, size: int, todo: Sequence[Scenario], prepare: Prepare | None
) -> list[tuple[CausalModel, list[Rows]]]:
    """Of each rank its model, and what it recorded in each scenario."""

    def work(number: int, groups: Groups) -> tuple[CausalModel, list[Rows]]:
        rank = Rank(config, rank=number, groups=groups)
        if prepare is not None:
            prepare(rank.model, number)
        found = []
        for scenario in todo:
            for cache in rank.runner.caches:  # what nobody wrote must not matter
                cache.key.fill_(torch.nan)
                cache.value.fill_(torch.nan)
            recorder = Recorder(rank.model)
            for plan in scenario.plans:
                with recorder.step(plan.num_tokens), torch.inference_mode(), _device(rank):
                    inputs = rank.runner.state.prepare(plan)
                    with forward_context(
                        ForwardContext((inputs.attention,) * len(rank.runner.caches), rank.runner.caches)
                    ):
                        hidden = rank.model(inputs.input_ids, inputs.positions)
                        recorder.note(LOGITS, rank.model.compute_logits(hidden))
            found.append(Rows.of(recorder.recording, scenario.rows, len(scenario.plans)))
        rank.close()
        return rank.model, found

    return run_ranks(size, work)


def _device(rank: Rank) -> AbstractContextManager[Any]:
    return torch.cuda.device(rank.device) if rank.device.type == "cuda" else nullcontext()


def _compare(pairing: Pairing, against: Reference, ranks: Sequence[Rows], scenario: str, size: int) -> ScenarioReport:
    """Transformers' events in their order; the first that differs, unless what follows from it agrees again."""
    compared: list[tuple[Event, torch.Tensor, torch.Tensor, float]] = []
    for event, wanted in against.rows.tensors.items():
        if event.name == LOGITS:
            have = [rows.tensors[event] for rows in ranks]
        else:
            have = pairing.candidates(event, wanted, ranks)
        if have:
            errors = [_error(one, wanted) for one in have]
            worst = max(range(len(have)), key=lambda i: errors[i])
            compared.append((event, have[worst], wanted, errors[worst]))
    final = next(error for event, _, _, error in compared if event.name == LOGITS)
    difference = None
    if final > TOLERANCE:
        layers = [_layer(event.name) for event, *_ in compared]
        agreed = [layer for layer, (*_, error) in zip(layers, compared, strict=True) if error <= TOLERANCE]
        event, ours, theirs, _ = next(
            found for layer, found in zip(layers, compared, strict=True)
            if found[3] > TOLERANCE and not any(other > layer for other in agreed)
        )  # fmt: skip
        difference = _difference(pairing, against, event, ours, theirs, scenario, size)
    return ScenarioReport(scenario, size, len(compared), final, difference)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The greatest difference, in root mean squares of theirs."""
    if not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.pow(2).mean().sqrt().clamp(min=1e-12))


def _layer(name: str) -> int:
    """The number of the decoder layer that a module is in; -1 before them, a great one behind."""
    match = re.search(r"\.(\d+)(\.|$)", name)
    if match is not None:
        return int(match.group(1))
    return -1 if re.search(r"embed|wte|wpe|word_", name) else 1 << 30


def _difference(
    pairing: Pairing,
    against: Reference,
    event: Event,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    scenario: str,
    size: int,
) -> Difference:
    inside = event.side == INPUT
    module = event.name.rpartition(".")[0] if inside else event.name
    if event.name == LOGITS or not module:
        module = event.name if event.name != LOGITS else "lm_head"
    worst = int((ours - theirs).abs().nan_to_num(torch.inf).flatten(1).max(1).values.argmax())
    places = [(n, at) for n, one in enumerate(against.ids) for at in range(len(one))]
    return Difference(
        module=module,
        our_module=pairing.path(module),
        side="inside" if inside else OUTPUT,
        greatest=float((ours - theirs).abs().max()),
        prompt=places[worst][0],
        position=places[worst][1],
        ours=Statistics.of(ours),
        theirs=Statistics.of(theirs),
        cause=likely_cause(pairing, module, ours, theirs, scenario=scenario, ranks=size, inside=inside),
    )
