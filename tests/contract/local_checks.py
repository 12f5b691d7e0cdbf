"""Counterparts of the documents' Python blocks, in this process (and over two ranks, which Ray places)."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import random
import subprocess
import sys
from typing import Any

import echelon
from cluster.config import ClusterConfig, checked_config, resolve_model
from contract.site import Site
from echelon import (
    MODELS,
    BaseChatTemplate,
    ChatTemplateConfig,
    GenerationConfig,
    PytorchEngineConfig,
    TurbomindEngineConfig,
)
from router.text.chat_form import ChatForm
from workers.api.config import KVCacheSpec

PROMPTS = ["Hi, pls intro yourself", "Shanghai is"]
MESSAGES = [[{"role": "user", "content": text}] for text in PROMPTS]
SAMPLING = GenerationConfig(top_p=0.8, top_k=40, temperature=0.8, max_new_tokens=1024)
CHATML = {
    "model_name": "your own",
    "system": "<|im_start|>system\n",
    "meta_instruction": "You are a robot.",
    "eosys": "<|im_end|>\n",
    "user": "<|im_start|>user\n",
    "eoh": "<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "eoa": "<|im_end|>",
    "separator": "\n",
    "capability": "chat",
    "stop_words": ["<|im_end|>"],
}


def _answered(responses: Any, count: int = 2) -> None:
    assert len(responses) == count
    for r in responses:
        assert r.text
        assert r.finish_reason in ("stop", "length")
        assert r.generate_token_len == len(r.token_ids) > 0


def pipeline_list(site: Site) -> None:
    _answered(site.pipe(PROMPTS))


def pipeline_cache(site: Site) -> None:
    with echelon.pipeline("demo", backend_config=TurbomindEngineConfig(cache_max_entry_count=0.2)) as pipe:
        _answered(pipe(PROMPTS))


def pipeline_pytorch(site: Site) -> None:
    with echelon.pipeline("demo", backend_config=PytorchEngineConfig(session_len=2048)) as pipe:
        _answered(pipe(MESSAGES, gen_config=SAMPLING))


def pipeline_tp(site: Site) -> None:
    responses = site.pipe_of_two(PROMPTS)
    _answered(responses)
    assert [r.token_ids for r in responses] == [r.token_ids for r in site.pipe(PROMPTS)]


def pipeline_tp_sampling(site: Site) -> None:
    _answered(site.pipe_of_two(PROMPTS, gen_config=SAMPLING))


def pipeline_tp_messages(site: Site) -> None:
    _answered(site.pipe_of_two(MESSAGES, gen_config=SAMPLING))


def pipeline_tp_stream(site: Site) -> None:
    pieces = list(site.pipe_of_two.stream_infer(MESSAGES, gen_config=SAMPLING))
    assert {p.index for p in pieces} == {0, 1}
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop"] * 2
    assert len(pieces) > 4


def main_guard(site: Site) -> None:
    file = site.folder / "script.py"
    file.write_text(
        "import echelon\n\nif __name__ == '__main__':\n"
        "    with echelon.pipeline('demo') as pipe:\n        print(pipe('What is 3 + 4?').text)\n"
    )
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True, timeout=300)
    assert "3 + 4 = 7." in done.stdout


def opencompass_settings(site: Site) -> None:
    engine = TurbomindEngineConfig(**{"session_len": 2048, "max_batch_size": 8, "rope_scaling_factor": 1.0})
    config = GenerationConfig(**{"top_k": 1, "top_p": 0.8, "temperature": 1.0, "max_new_tokens": 100})
    with echelon.pipeline("demo", backend_config=engine) as pipe:
        _answered(pipe(PROMPTS, gen_config=config))


def opencompass_template(site: Site) -> None:
    pieces = {"user": "<|User|>:", "eoh": "\n", "assistant": "<|Bot|>:", "eoa": "<eoa>", "separator": "\n"}
    form = ChatTemplateConfig("of an evaluation", stop_words=["<eoa>"], **pieces).chat_template
    own = ChatTemplateConfig("internlm").chat_template
    assert isinstance(form, ChatForm)
    assert isinstance(own, ChatForm)
    assert {n: getattr(own, n) for n in pieces} == pieces
    assert own.stop_words == form.stop_words


def long_context(site: Site) -> None:
    config = TurbomindEngineConfig(rope_scaling_factor=2.0, session_len=4096)
    with echelon.pipeline("demo", backend_config=config) as pipe:
        assert pipe.session_len == 4096
        answer = pipe("a long prompt " * 300, gen_config=GenerationConfig(max_new_tokens=8))
        assert answer.generate_token_len > 0


def passkey(site: Site) -> None:
    draw = random.Random(0)
    pipe, session_len = site.pipe, 512
    garbage = "The grass is green. The sky is blue. The sun is yellow."
    times = (session_len - 200) // len(pipe.tokenizer.encode(garbage))
    before = draw.randrange(times)
    key = draw.randrange(1, 50000)
    said = [garbage] * before + [f"The pass key is {key}."] + [garbage] * (times - before) + ["What is the pass key?"]
    (answer,) = pipe([" ".join(said)], GenerationConfig(max_new_tokens=16))
    assert answer.text  # whether it is the key is the model's affair: benchmarks/passkey.py measures it


def perplexity(site: Site) -> None:
    ids = site.pipe.tokenizer.encode("The capital of France is Paris.")
    loss = site.pipe.get_ppl(ids)[0]
    assert 1 < math.exp(loss) < math.exp(site.pipe.get_ppl(ids[::-1])[0])


def template_json(site: Site) -> None:
    file = site.folder / "template.json"
    file.write_text(json.dumps(CHATML))
    config = ChatTemplateConfig.from_json(str(file))
    assert config.to_dict() == CHATML
    with echelon.pipeline("demo", chat_template_config=config) as pipe:
        asked = pipe("hi", GenerationConfig(max_new_tokens=1))
        text = "<|im_start|>system\nYou are a robot.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert asked.input_token_len in (n := len(pipe.tokenizer.encode(text)), n + 1)


def template_class(site: Site) -> None:
    @MODELS.register_module(name="customized_model")
    class CustomizedModel(BaseChatTemplate):
        def __init__(
            self,
            system="<|begin|><|system|>",
            meta_instruction="You are a robot.",
            user="<|user|>",
            assistant="<|assistant|>",
            eosys="<|end|>",
            eoh="<|end|>",
            eoa="<|end|>",
            separator="",
            stop_words=("<|end|>",),
        ):
            super().__init__(
                system=system, meta_instruction=meta_instruction, eosys=eosys, user=user, eoh=eoh,
                assistant=assistant, eoa=eoa, separator=separator, stop_words=stop_words,
            )  # fmt: skip

    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    with echelon.pipeline("demo", chat_template_config=ChatTemplateConfig("customized_model")) as pipe:
        assert "".join(r.text for r in pipe.stream_infer(messages)) == "3 + 4 = 7."


def signatures(site: Site) -> None:
    defaults = {
        PytorchEngineConfig: {
            "model_name": "", "tp": 1, "session_len": None, "max_batch_size": 128, "cache_max_entry_count": 0.8,
            "eviction_type": "recompute", "prefill_interval": 16, "block_size": 64, "num_cpu_blocks": 0,
            "num_gpu_blocks": 0, "adapters": None, "max_prefill_token_num": 4096, "thread_safe": False,
            "enable_prefix_caching": False, "download_dir": None, "revision": None,
        },
        TurbomindEngineConfig: {
            "model_name": None, "model_format": None, "tp": 1, "session_len": None, "max_batch_size": 128,
            "cache_max_entry_count": 0.8, "cache_block_seq_len": 64, "enable_prefix_caching": False, "quant_policy": 0,
            "rope_scaling_factor": 0.0, "use_logn_attn": False, "download_dir": None, "revision": None,
            "max_prefill_token_num": 8192, "num_tokens_per_iter": 0, "max_prefill_iters": 1,
        },
        GenerationConfig: {
            "n": 1, "max_new_tokens": 512, "top_p": 1.0, "top_k": 1, "temperature": 0.8, "repetition_penalty": 1.0,
            "ignore_eos": False, "random_seed": None, "stop_words": None, "bad_words": None, "min_new_tokens": None,
            "skip_special_tokens": True, "logprobs": None,
        },
        ChatTemplateConfig: dict.fromkeys((
            "system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "separator", "capability",
            "stop_words",
        )),
    }  # fmt: skip
    for kind, wanted in defaults.items():
        found = {f.name: f.default for f in dataclasses.fields(kind) if f.name != "model_name" or f.name in wanted}
        assert {name: found[name] for name in wanted} == wanted, kind
    for function, names in (
        (echelon.pipeline, "model_path model_name backend_config chat_template_config log_level"),
        (
            echelon.serve,
            "model_path model_name backend backend_config chat_template_config server_name server_port log_level "
            "api_keys ssl",
        ),
        (echelon.client, "api_server_url api_key"),
    ):
        assert list(inspect.signature(function).parameters)[: len(names.split())] == names.split()


def config_ini(site: Site) -> None:
    said = {
        "model": {"path": "demo", "name": "llama2", "tensor_parallel": 1, "max_model_len": 1024},
        "engine": {"max_num_seqs": 64, "cache_fraction": 0.5, "block_size": 128},
    }
    config = checked_config(said, "what config.ini says")
    assert isinstance(config, ClusterConfig)
    assert config.replica_config("cpu").engine.block_size == 128
    by_name = TurbomindEngineConfig(max_batch_size=32, cache_max_entry_count=48, cache_block_seq_len=128).sections()
    assert by_name[1]["num_blocks"] == 48


def config_ini_model(site: Site) -> None:
    facts = json.loads((resolve_model("demo") / "config.json").read_text())
    documented = {
        "head_num": "num_attention_heads", "kv_head_num": "num_key_value_heads", "vocab_size": "vocab_size",
        "num_layer": "num_hidden_layers", "inter_size": "intermediate_size", "norm_eps": "rms_norm_eps",
    }  # fmt: skip
    assert all(facts[ours] > 0 for ours in documented.values())  # read from the checkpoint, and not settings here


def block_bytes(site: Site) -> None:
    spec = KVCacheSpec(layers=tuple(range(32)), num_kv_heads=32, head_size=128, dtype="float16")
    assert spec.block_bytes(128) == 128 * 32 * 32 * 128 * 2 * 2 == 64 << 20
