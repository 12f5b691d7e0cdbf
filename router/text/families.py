"""Built-in chat templates, by the names that LMDeploy gives them: what each family was trained with.

A checkpoint's own template comes first. These are for checkpoints that bring none, and for `--chat-template NAME`; a
JSON file may change pieces of them. Sources: the families' model cards and the templates of their own code.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from router.text.chat_form import ChatForm

_CHATML = ChatForm(
    system="<|im_start|>system\n",
    eosys="<|im_end|>\n",
    user="<|im_start|>user\n",
    eoh="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    eoa="<|im_end|>",
    separator="\n",
    stop_words=("<|im_end|>",),
)
_VICUNA = ChatForm(
    meta_instruction=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    eosys=" ",
    user="USER: ",
    eoh=" ",
    assistant="ASSISTANT: ",
    opening="ASSISTANT:",
    eoa="</s>",
    stop_words=("</s>",),
)
_LLAMA2 = ChatForm(
    system="<<SYS>>\n",
    eosys="\n<</SYS>>\n\n",
    user="[INST] ",
    eoh=" [/INST]",
    assistant=" ",
    opening="",
    eoa=" </s>",
    separator="<s>",
    stop_words=("</s>",),
    system_in_turn=True,
)
_LLAMA3 = ChatForm(
    system="<|start_header_id|>system<|end_header_id|>\n\n",
    eosys="<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    eoh="<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    eoa="<|eot_id|>",
    stop_words=("<|eot_id|>", "<|end_of_text|>"),
)
_INTERNLM = ChatForm(
    system="<|System|>:",
    eosys="\n",
    user="<|User|>:",
    eoh="\n",
    assistant="<|Bot|>:",
    eoa="<eoa>",
    separator="\n",
    stop_words=("<eoa>",),
)
_BAICHUAN2 = ChatForm(user="<reserved_106>", assistant="<reserved_107>", eoa="</s>", stop_words=("</s>",))
_CHATGLM2 = ChatForm(
    eosys="\n\n", user="[Round {round}]\n\n问：", eoh="\n\n", assistant="答：", separator="\n\n", numbered=True
)
_CHATGLM3 = ChatForm(
    system="<|system|>\n ",
    user="<|user|>\n ",
    assistant="<|assistant|>\n ",
    stop_words=("<|user|>", "<|observation|>"),
)
_DEEPSEEK = ChatForm(
    eosys="\n\n",
    user="User: ",
    eoh="\n\n",
    assistant="Assistant: ",
    eoa="<｜end▁of▁sentence｜>",
    stop_words=("<｜end▁of▁sentence｜>",),
)
_DEEPSEEK_CODER = ChatForm(
    user="### Instruction:\n",
    eoh="\n",
    assistant="### Response:\n",
    eoa="\n<|EOT|>",
    separator="\n",
    stop_words=("<|EOT|>",),
)
_MISTRAL = ChatForm(
    eosys="\n\n",
    user="[INST] ",
    eoh=" [/INST]",
    assistant=" ",
    opening="",
    eoa="</s>",
    stop_words=("</s>",),
    system_in_turn=True,
)
_GEMMA = ChatForm(
    eosys="\n\n",
    user="<start_of_turn>user\n",
    eoh="<end_of_turn>\n",
    assistant="<start_of_turn>model\n",
    eoa="<end_of_turn>",
    separator="\n",
    stop_words=("<end_of_turn>",),
    system_in_turn=True,
)
_PHI3 = ChatForm(
    system="<|system|>\n",
    eosys="<|end|>\n",
    user="<|user|>\n",
    eoh="<|end|>\n",
    assistant="<|assistant|>\n",
    eoa="<|end|>",
    separator="\n",
    stop_words=("<|end|>", "<|endoftext|>"),
)
_FALCON = ChatForm(
    eosys="\n\n",
    user="User: ",
    eoh="\n\n",
    assistant="Assistant: ",
    separator="\n\n",
    stop_words=("\nUser:", "<|endoftext|>"),
)
_SOLAR = ChatForm(
    system="### System:\n",
    eosys="\n\n",
    user="### User:\n",
    eoh="\n\n",
    assistant="### Assistant:\n",
    separator="\n\n",
    stop_words=("</s>",),
)
_ULTRA = ChatForm(
    system="User: ",
    eosys="</s>\n",
    user="User: ",
    eoh="</s>\n",
    assistant="Assistant: ",
    eoa="</s>",
    separator="\n",
    stop_words=("</s>",),
)
_QWEN = replace(_CHATML, meta_instruction="You are a helpful assistant.", stop_words=("<|im_end|>", "<|endoftext|>"))

FAMILIES = MappingProxyType(
    {
        "base": ChatForm(capability="completion"),
        "baichuan": replace(_BAICHUAN2, user="<reserved_102>", assistant="<reserved_103>"),
        "baichuan2": _BAICHUAN2,
        "chatglm": _CHATGLM2,
        "chatglm3": _CHATGLM3,
        "chatml": _CHATML,
        "codellama": _LLAMA2,
        "dbrx": _CHATML,
        "deepseek": _DEEPSEEK,
        "deepseek-coder": _DEEPSEEK_CODER,
        "falcon": _FALCON,
        "gemma": _GEMMA,
        "internlm": _INTERNLM,
        "internlm2": replace(_CHATML, stop_words=("<|im_end|>", "<|action_end|>")),
        "llama": _LLAMA2,
        "llama2": _LLAMA2,
        "llama3": _LLAMA3,
        "mistral": _MISTRAL,
        "mixtral": _MISTRAL,
        "phi-3": _PHI3,
        "puyu": _INTERNLM,
        "qwen": _QWEN,
        "solar": _SOLAR,
        "ultracm": _ULTRA,
        "ultralm": _ULTRA,
        "vicuna": _VICUNA,
        "wizardlm": _VICUNA,
        "yi": replace(_CHATML, stop_words=("<|im_end|>", "<|endoftext|>")),
    }
)
