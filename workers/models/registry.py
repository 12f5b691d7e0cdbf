"""Which class runs which architecture. Classes are imported when they are needed.

A package adds models of its own by entry points of the group "echelon.models": name = architecture, value = class. So
does a file given to the ranks (`import_model_file`) that calls `register`. An architecture that nobody registered runs
through transformers' own modules, where transformers has it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from workers.api.errors import ConfigError
from workers.models.base import CausalModel

ENTRY_POINT_GROUP = "echelon.models"

log = logging.getLogger("echelon.models")

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


def find(
    config: Mapping[str, Any], implementation: str = "auto", *, trusted_folder: str | None = None
) -> type[CausalModel]:
    """The class for the first known entry of config["architectures"]; failing that, the checkpoint's own code or
    transformers' modules.

    `implementation`: see `ModelConfig`. `trusted_folder`: the checkpoint's, where its code may be run. Raises
    ConfigError where there is none.
    """
    names = config.get("architectures") or []
    if implementation != "transformers":
        for name in names:
            if name in _models:
                return _load(name, _models[name])
            for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
                return _load(name, point.load())
    if implementation != "native":
        from workers.models.remote_code import remote_file, remote_model
        from workers.models.transformers_model import TransformersForCausalLM, causal_class

        if trusted_folder is not None and (file := remote_file(config)) is not None:
            log.warning("%s runs through code of the checkpoint, %s", ", ".join(names), file)
            return remote_model(config, trusted_folder)
        if causal_class(config) is not None:
            if implementation == "auto":
                log.info("no native model for %s: it runs through transformers' modules", ", ".join(names))
            return TransformersForCausalLM
        if trusted_folder is None and (file := remote_file(config)) is not None:
            raise ConfigError(
                f"the code of {', '.join(names)} lies in the checkpoint, in {file}: it runs only with "
                f"trust_remote_code (--trust-remote-code), and may then do whatever this process may"
            )
    raise ConfigError(
        f"no model for architectures {list(names)}: not natively ({', '.join(architectures())}), and transformers has "
        f"no such causal model"
    )


def origin(architecture: str) -> str:
    """Where the class of a known architecture comes from, "module:Class"; it is not imported."""
    model = _models.get(architecture)
    if model is None:
        return next(point.value for point in entry_points(group=ENTRY_POINT_GROUP, name=architecture))
    return model if isinstance(model, str) else f"{model.__module__}:{model.__qualname__}"


def import_model_file(path: str) -> None:
    """Run a Python file that calls `register` or extends the patch map; once a process. Raises ConfigError."""
    file = Path(path)
    name = f"echelon_model_file_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"model file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise ConfigError(f"model file {path} cannot be imported: {type(e).__name__}: {e}") from e


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
