"""Any decoder of transformers, through its own modules: with our paged attention, and the patch map's rewrites.

The modules are made without storage, patched, cut over the ranks, and then filled; transformers itself reads the
checkpoint, since it knows how names and layouts of files become those of its modules. The tokens of a step go in as one
row [1, T] with explicit positions; there is no mask and no cache of transformers'.

Shapes: T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from workers.api.config import KVCacheSpec
from workers.api.errors import ConfigError, EchelonError, WeightError
from workers.context import AttentionMetadata, DecodeBatch, ForwardContext, current
from workers.layers.build import Build
from workers.models.base import CausalModel
from workers.models.paged import CHILD, NAME, Asked, attend, probing
from workers.models.patch import PatchReport, patch_model, update_model
from workers.models.sharding import note_kv_heads
from workers.models.step_context import StepContext
from workers.models.tensor_plan import TensorPlan, apply, derive

log = logging.getLogger("echelon.transformers")

_making = threading.Lock()
# Rotary settings under which transformers turns keys by what else is in the batch.
_BY_LENGTH = ("dynamic", "longrope")


class TransformersForCausalLM(CausalModel):
    """A causal model of transformers. Its modules have the names that they have there.

    `causal_class`: the transformers class, where it is known already (code that came with a checkpoint).
    """

    captures = False  # what its modules do between kernels is not known: no CUDA graphs
    causal_class: ClassVar[Any] = None
    # Not modules of this one: their parts are, under the names that the checkpoint gives them.
    _causal: Any
    _base: Any
    _hidden: _Hidden

    def __init__(self, config: Mapping[str, Any], *, max_model_len: int, build: Build) -> None:
        super().__init__(config, max_model_len=max_model_len, build=build)
        self._source, self._build = dict(config), build
        settings = hf_config(config, self.causal_class)
        text = settings.get_text_config()
        _check_rotary(text, max_model_len)
        cls = self.causal_class or causal_class(config)
        with _without_storage():
            made = make(cls, settings, build.dtype)
        self.group = build.groups.tp
        if isinstance(heads := getattr(text, "num_key_value_heads", None), int):
            note_kv_heads(made, heads)
        self.patches: PatchReport = patch_model(made, self.group)
        self.plan: TensorPlan = derive(made)
        apply(self.plan.without(self.patches.distributed), made, self.group)
        _materialize(made, build.device)
        made.eval()
        self.vocab_size, self.num_layers = int(text.vocab_size), int(text.num_hidden_layers)
        self.max_positions = self.context_length(config)
        # The base model is called here; the rest of the causal one, for logits, finds what it returned in its place.
        prefix = made.base_model_prefix
        for name, child in list(made.named_children()):
            self.add_module(name, child)
        base = getattr(made, prefix, None)
        if base is None or base is made:
            raise ConfigError(f"{cls.__name__} has no base model {prefix!r}: it needs a native file or a rewrite")
        hidden = made._modules[prefix] = _Hidden()
        object.__setattr__(self, "_hidden", hidden)
        object.__setattr__(self, "_causal", made)
        object.__setattr__(self, "_base", base)
        # A mask of four axes is taken for ready, so that none is made where our attention function is not asked.
        self._mask = None if settings._attn_implementation == NAME else torch.zeros(1, 1, 1, 1, device=build.device)
        self._asked: dict[int, tuple[nn.Module, Asked]] = {}
        self.dtype = build.dtype
        self._log(cls)

    def _log(self, cls: type) -> None:
        way = "transformers' modules" + (", patched" if self.patches.counts else "")
        log.info("%s runs through %s; paged attention is ours", cls.__name__, way)
        if self.group.size > 1:
            own = self.plan.without(self.patches.distributed)
            log.info("tensor-parallel plan, from %s: %s", own.source, "; ".join(own.summary()))

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """See `CausalModel`."""
        text = hf_config(config, cls.causal_class).get_text_config()
        for key in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"):
            if isinstance(value := getattr(text, key, None), int):
                return value
        raise ConfigError("the config does not say how long a context the model was trained for")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`."""
        step = StepContext(input_ids, positions, current(), world_size=self.group.size, json_config=self._source)
        with step.active():
            return self._run(input_ids, positions)

    def _run(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self._base(
            input_ids=input_ids.long()[None], position_ids=positions[None], attention_mask=self._mask, use_cache=False,
            return_dict=True,
        )  # fmt: skip
        return out.last_hidden_state[0]

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`; all of them on every rank, with what transformers does to them: soft caps, scales."""
        self._hidden.value = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        try:
            return self._causal(input_ids=ids, use_cache=False, return_dict=True).logits[0][:, : self.vocab_size]
        finally:
            self._hidden.value = None

    def read_tensors(self, folder: Path) -> Iterator[tuple[Path, str, Any]]:
        """The checkpoint as transformers reads it, all of it on the CPU; buffers that it holds are filled here."""
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        try:
            with making():
                whole, told = type(self._causal).from_pretrained(
                    folder, dtype=self.dtype, attn_implementation="eager", local_files_only=True, use_safetensors=True,
                    output_loading_info=True,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as e:
            raise WeightError(f"transformers cannot read {folder}: {e}") from e
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if told.get(kind):
                raise WeightError(f"{kind.replace('_', ' ')} in {folder}: {', '.join(map(str, sorted(told[kind])))}")
        persistent = set(whole.state_dict())
        for name, buffer in self.named_buffers():
            if name in persistent:
                buffer.copy_(whole.get_buffer(name))
        for name, parameter in whole.named_parameters():
            yield folder, name, _View(parameter.detach())

    def finish_loading(self) -> None:
        """Call the rewrites' `_update_model_fn`, then see in one pass what attention each layer asks for.

        Raises ConfigError where a layer has none that goes to the cache, or where the ranks cannot share it.
        """
        update_model(self)
        device = next(self.parameters()).device
        one = torch.zeros(1, dtype=torch.long, device=device)
        step = StepContext(
            one, one, _one_token(device, self.num_layers), world_size=self.group.size, json_config=self._source
        )
        with probing() as seen, step.active():
            try:
                self._run(one, one)
            except EchelonError:
                raise
            except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as e:
                raise ConfigError(
                    f"{type(self._causal).__name__} does not run as it is: {type(e).__name__}: {e}"
                ) from e
        if sorted(seen) != list(range(self.num_layers)):
            without = sorted(set(range(self.num_layers)) - set(seen))
            raise ConfigError(
                f"layers {without} of {type(self._causal).__name__} do not attend through transformers' attention "
                f"functions: they need a native file or an entry in the patch map"
            )
        self._asked = seen
        for layer, (module, asked) in seen.items():
            module.add_module(CHILD, asked.make(layer))

    def kv_cache_specs(self) -> tuple[KVCacheSpec, ...]:
        """One group for each shape and window."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for layer, (_, asked) in sorted(self._asked.items()):
            groups.setdefault((asked.kv_heads, asked.head_size, asked.window), []).append(layer)
        dtype = str(self.dtype).removeprefix("torch.")
        return tuple(
            KVCacheSpec(tuple(layers), heads, size, dtype, window=window)
            for (heads, size, window), layers in groups.items()
        )


def _one_token(device: torch.device, layers: int) -> ForwardContext:
    """A step of the first token of one sequence, without caches."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    decode = DecodeBatch(zero.int().view(1, 1), (zero + 1).int(), 1)
    return ForwardContext((AttentionMetadata(zero, 1, decode, None),) * layers, ())


class _Hidden(nn.Module):
    """Stands for the base model while the causal model's own forward makes logits."""

    value: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self  # some heads ask a part of the base model (`model.decoder`)

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output((self.value,))


class _Output(tuple[Any, ...]):
    """A base model's output that has nothing but hidden states."""

    @property
    def last_hidden_state(self) -> Any:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _View:
    """A tensor in memory, read as one in a file is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        return self._tensor[index]


def hf_config(config: Mapping[str, Any], causal: Any = None) -> Any:
    """transformers' config object. Raises ConfigError on a model_type that it does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if causal is not None:
        cls = causal.config_class
    elif kind in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[kind]
    else:
        raise ConfigError(f"transformers knows no model_type {kind!r}")
    if config.get("quantization_config"):
        raise ConfigError("the checkpoint is quantized; through transformers' modules that is not supported")
    try:
        return cls.from_dict(dict(config))
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"transformers refuses the config: {e}") from e


def causal_class(config: Mapping[str, Any]) -> Any:
    """transformers' class for the first architecture that it has as a causal model, or None."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known |= {names} if isinstance(names, str) else set(names)
    import transformers

    for name in config.get("architectures") or ():
        if name in known:
            return getattr(transformers, name)
    return None


def make(cls: Any, settings: Any, dtype: torch.dtype) -> Any:
    """The model, its weights not initialized. Our attention function where the class asks for one, by name."""
    from transformers import AttentionInterface
    from transformers.initialization import no_init_weights

    AttentionInterface.register(NAME, attend)
    name = NAME if cls._can_set_attn_implementation() else "eager"
    with no_init_weights():
        model = cls._from_config(settings, dtype=dtype, attn_implementation=name)
    model.tie_weights()
    return model


def _check_rotary(text: Any, max_model_len: int) -> None:
    """transformers picks these frequencies by the longest position of a batch; cached keys keep what they had."""
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope, *(v for v in rope.values() if isinstance(v, Mapping))]:
        limit: Any = one.get("original_max_position_embeddings")
        trained = int(limit or getattr(text, "max_position_embeddings", 0))
        if one.get("rope_type") in _BY_LENGTH and max_model_len > trained:
            raise ConfigError(
                f"{one['rope_type']} rope scaling through transformers' modules is right up to {trained} tokens only; "
                f"set max_model_len to at most that (it is {max_model_len})"
            )


@contextmanager
def making() -> Iterator[None]:
    """transformers sets things of the whole process while it makes or reads a model: one thread at a time."""
    with _making:
        yield


@contextmanager
def _without_storage() -> Iterator[None]:
    """Parameters that modules of this thread register have no storage; buffers are real, since they are computed."""
    owner = threading.get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == owner and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        plain(module, name, parameter)

    with making():
        plain = nn.Module.register_parameter
        nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Storage for all parameters on `device`, zeros; shared ones stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # by identity, which lives as long as its key
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                if old not in made:
                    zeros = torch.zeros(old.shape, dtype=old.dtype, device=device)
                    made[old] = nn.Parameter(zeros, requires_grad=False)
                module._parameters[name] = made[old]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
