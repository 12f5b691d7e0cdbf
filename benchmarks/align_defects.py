"""How many planted defects `echelon align` names rightly: N of 50.

Each is drawn by a seeded generator: a family, a decoder layer, a kind of defect. It is planted in the loaded model, and
counts as found when the module that `align` names is the one that it is in.

    python benchmarks/align_defects.py [--count 50] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from workers.align.align import Reference, align, reference
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.layers.attention import Attention
from workers.layers.rotary import RotaryEmbedding

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
# What runs it: our native file, or transformers' modules (patched for Llama).
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {"attention_bias": True}, "native"),
    "mistral": ("Mistral", {"sliding_window": 24}, "native"),
    "qwen2": ("Qwen2", {}, "native"),
    "qwen3": ("Qwen3", {"head_dim": 16}, "native"),
    "llama-patched": ("Llama", {"attention_bias": True}, "transformers"),
    "qwen2-by-transformers": ("Qwen2", {}, "transformers"),
    "mixtral-by-transformers": ("Mixtral", {"num_local_experts": 4}, "transformers"),
}


@dataclass(frozen=True, slots=True)
class Site:
    """Where a defect goes: the modules of one decoder layer of ours, by what they are; `rank` of so many."""

    model: Any
    layer: int
    rank: int

    @property
    def path(self) -> str:
        return f"model.layers.{self.layer}"

    def part(self, name: str) -> Any:
        return self.model.get_submodule(f"{self.path}.{name}")

    @property
    def attention(self) -> Attention:
        return next(m for m in self.part("self_attn").modules() if isinstance(m, Attention))

    def rows(self, name: str) -> torch.Tensor:
        """The weight of q_proj, gate_proj and so on, wherever it is held."""
        attention, mlp = self.part("self_attn"), getattr(self.part("mlp"), "gate_up_proj", None)
        if name in "q_proj k_proj v_proj" and hasattr(attention, "qkv_proj"):
            return attention.qkv_proj.weight.split(attention.qkv_proj.sizes)["qkv".index(name[0])]
        if name in "gate_proj up_proj" and isinstance(mlp, nn.Module):
            return mlp.weight.chunk(2)[name == "up_proj"]
        return self.part(("mlp." if name in "gate_proj up_proj down_proj" else "self_attn.") + name).weight


@dataclass(frozen=True, slots=True)
class Kind:
    """`plant(site)` breaks it; `where` names the module that is then wrong. `ranks`: how many it takes to see it."""

    plant: Callable[[Site], None]
    where: str
    families: tuple[str, ...]
    ranks: int = 1


NATIVE = ("llama", "mistral", "qwen2", "qwen3")
DENSE = (*NATIVE, "llama-patched", "qwen2-by-transformers")
ALL = tuple(FAMILIES)


def new_table(site: Site, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """This layer alone gets another table of cosines and sines."""
    attention = site.attention
    other = RotaryEmbedding.__new__(RotaryEmbedding)
    nn.Module.__init__(other)
    other.__dict__.update({k: v for k, v in attention.rotary.__dict__.items() if not k.startswith("_")})
    other.register_buffer("cos_sin", change(attention.rotary.cos_sin), persistent=False)
    attention.rotary = other


def by_base(table: torch.Tensor) -> torch.Tensor:
    half = table.shape[1] // 2
    angles = torch.arange(len(table))[:, None] * 500.0 ** (-torch.arange(half) / half)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def skip_one(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table[:1], table[2:], table[-1:]])


def scale_up(site: Site) -> None:
    site.attention.scale *= 1.25


def narrow_window(site: Site) -> None:
    site.attention.window = 7


def worse_epsilon(site: Site) -> None:
    norm = site.part("post_attention_layernorm")
    setattr(norm, next(k for k in ("eps", "variance_epsilon") if hasattr(norm, k)), 0.5)


def swap_gate_and_up(site: Site) -> None:
    gate, up = site.rows("gate_proj"), site.rows("up_proj")
    kept = gate.clone()
    gate.copy_(up)
    up.copy_(kept)


def drop_bias(site: Site) -> None:
    attention = site.part("self_attn")
    for name in ("qkv_proj", "q_proj"):
        if hasattr(attention, name):
            bias = getattr(attention, name).bias
            bias[: attention.head_size * 4 if name == "qkv_proj" else None].zero_()
    if getattr(attention, "qkv_bias", None) is not None:  # the patched one holds them together
        attention.qkv_bias[: attention.qkv_sizes[0]].zero_()


def swap_kv_heads(site: Site) -> None:
    attention = site.attention
    plain = attention.forward

    def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        return plain(q.view(len(q), attention.num_heads, -1).flip(1).flatten(1), k, v, *rest, **named).view(
            len(q), attention.num_heads, -1).flip(1).flatten(1)  # fmt: skip

    attention.forward = swapped  # type: ignore[method-assign]


def permute_rows(name: str) -> Callable[[Site], None]:
    def plant(site: Site) -> None:
        rows = site.rows(name)
        rows.copy_(rows.flip(0).clone())

    return plant


def transpose_shard(site: Site) -> None:
    """The ranks' halves of the input channels stand in the other order."""
    weight = site.rows("o_proj")
    weight.copy_(weight.flip(1).clone())


def no_all_reduce(name: str) -> Callable[[Site], None]:
    def plant(site: Site) -> None:
        module = site.part(name)
        for holder in (module, site.part(name.partition(".")[0])):
            group = getattr(holder, "group", None) or getattr(holder, "tensor_group", None)
            if group is not None:
                still = Silent(group)
                setattr(holder, "group" if hasattr(holder, "group") else "tensor_group", still)

    return plant


class Silent:
    """A group that forgets to sum."""

    def __init__(self, group: Any) -> None:
        self.name, self.rank, self.size = group.name, group.rank, group.size
        self.all_gather = group.all_gather

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def swap_experts(site: Site) -> None:
    experts = site.part("mlp.experts")
    experts.down_proj.copy_(experts.down_proj.flip(0).clone())


def wrong_head(site: Site) -> None:
    head, embedding = site.model.lm_head.weight, site.model.model.embed_tokens.weight
    head[: len(embedding)].copy_(embedding[: len(head)])


def wrong_norm_weight(site: Site) -> None:
    site.part("input_layernorm").weight.mul_(1.5)


KINDS: dict[str, Kind] = {
    "wrong rope base": Kind(lambda s: new_table(s, by_base), "self_attn", NATIVE),
    # From the second token on: where all positions are off by one, relative ones are right.
    "off-by-one position": Kind(lambda s: new_table(s, skip_one), "self_attn", NATIVE),
    "wrong scale": Kind(scale_up, "self_attn", ALL),
    "wrong window": Kind(narrow_window, "self_attn", ALL),
    "wrong head grouping": Kind(swap_kv_heads, "self_attn", ALL),
    "wrong norm epsilon": Kind(worse_epsilon, "post_attention_layernorm", ALL),
    "wrong norm weight": Kind(wrong_norm_weight, "input_layernorm", ALL),
    "swapped gate and up": Kind(swap_gate_and_up, "mlp.gate_proj", DENSE),
    "dropped bias": Kind(drop_bias, "self_attn.q_proj", ("llama", "qwen2", "llama-patched", "qwen2-by-transformers")),
    "permuted rows of k": Kind(permute_rows("k_proj"), "self_attn.k_proj", ALL),
    "permuted rows of down": Kind(permute_rows("down_proj"), "mlp.down_proj", DENSE),
    "transposed shard": Kind(transpose_shard, "self_attn.o_proj", ALL, ranks=2),
    "missing all_reduce after attention": Kind(no_all_reduce("self_attn.o_proj"), "self_attn.o_proj", NATIVE, ranks=2),
    "missing all_reduce after the MLP": Kind(no_all_reduce("mlp.down_proj"), "mlp.down_proj", NATIVE, ranks=2),
    "permuted experts": Kind(swap_experts, "mlp.experts", ("mixtral-by-transformers",)),
    "head tied that is not": Kind(wrong_head, "lm_head", ALL),
}


@dataclass(frozen=True, slots=True)
class Draw:
    """One defect."""

    family: str
    layer: int
    kind: str

    @property
    def module(self) -> str:
        where = KINDS[self.kind].where
        return where if where == "lm_head" else f"model.layers.{self.layer}.{where}"


def draws(count: int, seed: int) -> list[Draw]:
    """Every kind at least once where `count` allows, then at random."""
    generator, kinds = random.Random(seed), list(KINDS)
    generator.shuffle(kinds)
    chosen = [kinds[n] if n < len(kinds) else generator.choice(kinds) for n in range(count)]
    return [Draw(generator.choice(KINDS[kind].families), generator.randrange(2), kind) for kind in chosen]


def write(family: str, folder: Path) -> None:
    """A tiny seeded checkpoint."""
    prefix, changes, _ = FAMILIES[family]
    torch.manual_seed(sum(family.encode()))
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**SIZES, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)


class Bench:
    """Checkpoints and what transformers computes with them, made when first needed."""

    def __init__(self, root: Path) -> None:
        self._root, self._references = root, dict[str, Reference]()

    def reference(self, family: str) -> Reference:
        if family not in self._references:
            write(family, self._root / family)
            self._references[family] = reference(str(self._root / family), torch.device("cpu"))
        return self._references[family]

    def try_one(self, draw: Draw | None, family: str, ranks: int) -> tuple[str | None, str]:
        """(module that `align` names, its likely cause); None where it finds no difference."""
        against = self.reference(family)
        model = ModelConfig(str(self._root / family), family, implementation=FAMILIES[family][2])
        config = ReplicaConfig(model, EngineConfig(), device="cpu")

        @torch.inference_mode()
        def prepare(loaded: Any, rank: int) -> None:
            if draw is not None:
                KINDS[draw.kind].plant(Site(loaded, draw.layer, rank))

        found = align(config, ranks=ranks, against=against, prepare=prepare).difference
        return (None, "") if found is None else (found.module, found.cause)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    right, lines = 0, []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for draw in draws(options.count, options.seed):
            named, cause = bench.try_one(draw, draw.family, KINDS[draw.kind].ranks)
            good = named == draw.module
            right += good
            lines.append({**asdict(draw), "module": draw.module, "named": named, "cause": cause, "right": good})
            print(f"{'ok ' if good else 'BAD'} {draw.family:24} {draw.kind:36} {named}  ({cause})", flush=True)
        healthy = {family: bench.try_one(None, family, 2)[0] for family in FAMILIES}
    kinds = len({line["kind"] for line in lines})
    print(f"{right} of {options.count} named; {kinds} kinds")
    print(f"without a defect: {healthy}")
    if options.json is not None:
        options.json.write_text(json.dumps({"right": right, "draws": lines, "healthy": healthy}, indent=1))
    sys.exit(0 if right >= 0.96 * options.count and not any(healthy.values()) else 1)


if __name__ == "__main__":
    main()
