"""Which class runs which architecture. Classes are imported when they are needed.

A package adds models of its own by entry points of the group "echelon.models": name = architecture, value = class.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from workers.api.errors import ConfigError
from workers.models.base import CausalModel

ENTRY_POINT_GROUP = "echelon.models"

_models: dict[str, str | type[CausalModel]] = {
    "BaichuanForCausalLM": "workers.models.baichuan:BaichuanForCausalLM",
    "BaiChuanForCausalLM": "workers.models.baichuan:BaichuanForCausalLM",
    "ChatGLMForConditionalGeneration": "workers.models.chatglm:ChatGLMModel",
    "ChatGLMModel": "workers.models.chatglm:ChatGLMModel",
    "Cohere2ForCausalLM": "workers.models.cohere:Cohere2ForCausalLM",
    "CohereForCausalLM": "workers.models.cohere:CohereForCausalLM",
    "DbrxForCausalLM": "workers.models.dbrx:DbrxForCausalLM",
    "DeepseekForCausalLM": "workers.models.deepseek:DeepseekForCausalLM",
    "DeepseekV2ForCausalLM": "workers.models.deepseek:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "workers.models.deepseek:DeepseekV3ForCausalLM",
    "FalconForCausalLM": "workers.models.falcon:FalconForCausalLM",
    "Gemma2ForCausalLM": "workers.models.gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "workers.models.gemma:Gemma3ForCausalLM",
    "GemmaForCausalLM": "workers.models.gemma:GemmaForCausalLM",
    "Glm4ForCausalLM": "workers.models.glm:Glm4ForCausalLM",
    "GlmForCausalLM": "workers.models.glm:GlmForCausalLM",
    "GPTNeoXForCausalLM": "workers.models.gpt_neox:GPTNeoXForCausalLM",
    "GptOssForCausalLM": "workers.models.gpt_oss:GptOssForCausalLM",
    "GraniteForCausalLM": "workers.models.granite:GraniteForCausalLM",
    "InternLM2ForCausalLM": "workers.models.internlm2:InternLM2ForCausalLM",
    "InternLMForCausalLM": "workers.models.llama:InternLMForCausalLM",
    "LlamaForCausalLM": "workers.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "workers.models.llama:MistralForCausalLM",
    "MixtralForCausalLM": "workers.models.mixtral:MixtralForCausalLM",
    "Olmo2ForCausalLM": "workers.models.olmo2:Olmo2ForCausalLM",
    "Olmo3ForCausalLM": "workers.models.olmo2:Olmo3ForCausalLM",
    "Phi3ForCausalLM": "workers.models.phi3:Phi3ForCausalLM",
    "PhiForCausalLM": "workers.models.phi:PhiForCausalLM",
    "Qwen2ForCausalLM": "workers.models.llama:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": "workers.models.qwen_moe:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": "workers.models.llama:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "workers.models.qwen_moe:Qwen3MoeForCausalLM",
    "QWenLMHeadModel": "workers.models.qwen:QWenLMHeadModel",
    "Starcoder2ForCausalLM": "workers.models.starcoder2:Starcoder2ForCausalLM",
    "YiForCausalLM": "workers.models.llama:LlamaForCausalLM",
}


def register(architecture: str, model: str | type[CausalModel]) -> None:
    """Run `architecture` with `model`: a class, or "module:Class". Later calls replace earlier ones."""
    _models[architecture] = model


def architectures() -> tuple[str, ...]:
    """All that can be run, entry points included, sorted."""
    return tuple(sorted({*_models, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def find(config: Mapping[str, Any]) -> type[CausalModel]:
    """The class for the first known entry of config["architectures"]. Raises ConfigError where there is none."""
    names = config.get("architectures") or []
    for name in names:
        if name in _models:
            return _load(name, _models[name])
        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            return _load(name, point.load())
    raise ConfigError(f"no model for architectures {list(names)}; there are: {', '.join(architectures())}")


def _load(name: str, model: Any) -> type[CausalModel]:
    if isinstance(model, str):
        module, _, attribute = model.partition(":")
        try:
            model = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise ConfigError(f"the model of {name}, {module}:{attribute}, cannot be imported: {e}") from e
    if not (isinstance(model, type) and issubclass(model, CausalModel)):
        raise ConfigError(f"the model of {name} is {model!r}, not a subclass of CausalModel")
    return model
