"""Why a module differs, as far as weights, settings and the difference itself tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from workers.align.pairing import Pairing
from workers.layers.attention import Attention

_CLOSE = 1e-4
_EPSILONS = ("eps", "variance_epsilon", "epsilon")


def likely_cause(
    pairing: Pairing, module: str, ours: torch.Tensor, theirs: torch.Tensor, *, scenario: str, ranks: int, inside: bool
) -> str:
    """One sentence, or several guesses; `inside`: the module's parts agree, what it does between them does not."""
    reasons = [
        *_of_weights(pairing, module),
        *_of_epsilon(pairing, module),
        *(_of_attention(pairing, module) if inside else ()),
        *_of_difference(ours, theirs, ranks),
    ]
    if not reasons and scenario == "alone" and inside:
        reasons = ["what it computes between its parts: rotation, positions, mask, scale, or order of heads"]
    if not reasons and scenario != "alone":
        hints = {
            "ragged batch": "tokens of other sequences are seen: the borders of sequences in the batch",
            "paged": "the block table, or positions of decodes",
            "chunked": "the length of what came before, or positions after the first chunk",
        }
        reasons = [hints.get(scenario, "how the module is cut over the ranks, or what they exchange")]
    return "; ".join(dict.fromkeys(reasons)) or "unknown"


def _of_weights(pairing: Pairing, module: str) -> Iterator[str]:
    found = dict(pairing.reference.get_submodule(module).named_parameters(recurse=False)) if module else {}
    for name, parameter in found.items():
        ours, theirs = pairing.weight(f"{module}.{name}"), parameter.detach().float()
        if ours is None or ours.shape != theirs.shape or torch.allclose(ours.to(theirs.device), theirs, atol=1e-6):
            continue
        yield f"{name} is not the checkpoint's: {_how(pairing, module, name, ours.to(theirs.device), theirs)}"
    if found and "bias" not in found and pairing.weight(f"{module}.bias") is not None:
        yield "it has a bias that transformers' has not"


def _how(pairing: Pairing, module: str, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    if not ours.any():
        return "it is all zeros (dropped)"
    for other, sibling in _siblings(pairing.reference, module):
        twin = getattr(sibling, name, None)
        if isinstance(twin, torch.Tensor) and twin.shape == ours.shape and torch.allclose(ours, twin.float()):
            return f"it is that of {other}"
    if ours.dim() >= 1:
        first, second = (t.flatten(1).sum(1) if t.dim() > 1 else t for t in (ours, theirs))
        if torch.allclose(first.sort()[0], second.sort()[0], atol=1e-4):
            return "its rows stand in another order (heads, experts, or shards of ranks)"
    if ours.dim() == 2:
        first, second = ours.sum(0).sort()[0], theirs.sum(0).sort()[0]
        if torch.allclose(first, second, atol=1e-4):
            return "its columns stand in another order (heads, or shards of ranks)"
        if ours.shape[0] == ours.shape[1] and torch.allclose(ours.t(), theirs):
            return "it is transposed"
    return "its numbers differ"


def _siblings(model: nn.Module, module: str) -> Iterator[tuple[str, nn.Module]]:
    parent = module.rpartition(".")[0]
    for name, sibling in model.get_submodule(parent).named_children():
        path = f"{parent}.{name}" if parent else name
        if path != module:
            yield path, sibling
    if module == "lm_head":
        for name, other in model.named_modules():
            if isinstance(other, nn.Embedding):
                yield name, other


def _of_epsilon(pairing: Pairing, module: str) -> Iterator[str]:
    ours, theirs = _ours(pairing, module), pairing.reference.get_submodule(module)
    a, b = (next((getattr(m, k) for k in _EPSILONS if isinstance(getattr(m, k, None), float)), None)
            for m in (ours, theirs))  # fmt: skip
    if a is not None and b is not None and a != b:
        yield f"its epsilon is {a:g}, transformers' {b:g}"


def _of_attention(pairing: Pairing, module: str) -> Iterator[str]:
    ours, theirs = _ours(pairing, module), pairing.reference.get_submodule(module)
    found = None if ours is None else next((m for m in ours.modules() if isinstance(m, Attention)), None)
    if found is None:
        return
    scale = getattr(theirs, "scaling", None)
    if isinstance(scale, float) and abs(found.scale - scale) > _CLOSE * scale:
        yield f"its scale is {found.scale:.5g}, transformers' {scale:.5g}"
    window = getattr(theirs, "sliding_window", None) or 0
    if hasattr(theirs, "sliding_window") and found.window != window:
        yield f"its window is {found.window}, transformers' {window}"
    groups = getattr(theirs, "num_key_value_groups", None)
    if isinstance(groups, int) and found.num_heads != groups * found.num_kv_heads:
        yield f"it has {found.num_heads} query heads over {found.num_kv_heads} KV heads, transformers' {groups} to one"
    yield from _of_rotation(pairing, found)


def _of_rotation(pairing: Pairing, attention: Attention) -> Iterator[str]:
    rotary: Any = getattr(pairing.reference.get_submodule(pairing.reference.base_model_prefix), "rotary_emb", None)  # type: ignore[arg-type]
    table = None if attention.rotary is None else attention.rotary.cos_sin
    if rotary is None or table is None or not isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        return
    cosines = table[:, : table.shape[1] // 2]
    positions = torch.arange(min(len(table), 64), device=table.device)
    with torch.inference_mode():
        wanted = rotary(table[:1, None], positions[None])[0][0, :, : cosines.shape[1]]
    if wanted.shape != cosines[: len(wanted)].shape:
        return
    if torch.allclose(cosines[: len(wanted)], wanted.float(), atol=1e-4):
        return
    if torch.allclose(cosines[: len(wanted) - 1], wanted[1:].float(), atol=1e-4):
        yield "positions are one too far in its rotation"
    else:
        yield "its rotation turns by other angles: base, scaling, or positions"


def _of_difference(ours: torch.Tensor, theirs: torch.Tensor, ranks: int) -> Iterator[str]:
    difference = ours - theirs
    if not torch.isfinite(ours).all():
        yield "it is not finite: memory that nobody wrote is read"
        return
    ratio = float((ours * theirs).sum() / theirs.pow(2).sum().clamp(min=1e-30))
    if torch.allclose(ours, theirs * ratio, atol=_CLOSE * float(theirs.abs().max())) and abs(ratio - 1) > _CLOSE:
        yield f"it is transformers' times {ratio:.4g}"
    elif len(ours) > 2 and float((difference - difference[:1]).abs().max()) < _CLOSE * float(theirs.abs().max()):
        yield "the difference is the same for every token: a bias is missing, or added more than once"
    elif ranks > 1:
        yield "with several ranks only: its share of the weights, or a sum over the ranks that is missing"


def _ours(pairing: Pairing, module: str) -> nn.Module | None:
    path = pairing.path(module)
    return None if path is None else pairing.ours[0].get_submodule(path)
