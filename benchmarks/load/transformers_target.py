"""transformers on the same device in the same dtype: `generate` over padded batches, or its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from load.records import Record, Run
from load.work import Pacing, Work

PADDED_BATCH = 64
TORCH_FLASH = "torch_flash"  # of the attentions that transformers knows by name: ours, by torch's flash kernel


def use_torch_flash(model: Any) -> None:
    """Lets `model` run ragged batches through the flash attention that torch ships.

    Its own ways are packages that have to be installed, or masked attention of every token with the keys of all
    requests, which takes seconds a step.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    for name in (TORCH_FLASH, f"paged|{TORCH_FLASH}"):  # releases differ in how they call it
        AttentionInterface.register(name, _torch_flash)
        AttentionMaskInterface.register(name, flash_attention_mask)
    model._check_and_adjust_attn_implementation = lambda name, *_, **__: name  # else it looks for a package of the name
    model.set_attn_implementation(TORCH_FLASH)


def _torch_flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **ragged: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] of the new tokens -> [1, T, H, D]."""
    new = {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if "max_length_q" in ragged:
        key, value = cache.update(**new, kwargs=ragged)  # [1, K, all, D], and fills the keys' lengths in
        key, value = (x.squeeze(0).transpose(0, 1) for x in (key, value))
        lengths, longest = ragged["cu_seq_lens_k"], (ragged["max_length_q"], ragged["max_length_k"])
    else:  # before transformers 5.20
        key, value = cache.update(**new, read_index=ragged["read_index"], write_index=ragged["write_index"])
        lengths, longest = ragged["cu_seq_lens_k"], (ragged["max_seqlen_q"], ragged["max_seqlen_k"])
        if isinstance(lengths, dict):
            lengths, longest = lengths["full_attention"], (longest[0], longest[1]["full_attention"])
    out = torch.ops.aten._flash_attention_forward(
        *(query.squeeze(0).transpose(0, 1), key, value, ragged["cu_seq_lens_q"].int(), lengths.int(), *longest),
        *(0.0, True, False),  # no dropout, causal, no mask for a backward pass
        scale=scaling,
    )[0]
    return out.unsqueeze(0), None


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device, random: bool) -> Any:
    """The checkpoint as transformers loads it; `random`: only its configuration is read, the weights are drawn."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if random:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return model.eval()


class GenerateTarget:
    """`generate`, in batches of 64 padded on the left to the longest. First tokens are not observed: FTL is empty."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, work: Sequence[Work], pacing: Pacing, done: Callable[[], None]) -> Run:
        """One repeat. Raises SystemExit for paced requests: batches know no arrivals."""
        if pacing.rate:
            raise SystemExit("transformers' generate takes whole batches: leave --request-rate away")
        begin = time.perf_counter()
        records: list[Record] = []
        for batch in _batches(work, pacing.concurrency or PADDED_BATCH):
            self._generate(batch)
            records += [Record(len(w.prompt), begin, tokens=w.out) for w in batch]
            for _ in batch:
                done()
        return Run(records, time.perf_counter() - begin)

    def _generate(self, batch: Sequence[Work]) -> None:
        width, out = max(len(w.prompt) for w in batch), max(w.out for w in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, w in enumerate(batch):
            ids[row, width - len(w.prompt) :] = torch.tensor(w.prompt)
            mask[row, width - len(w.prompt) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=mask, max_new_tokens=out, min_new_tokens=out, do_sample=False, pad_token_id=0
            )
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


class ContinuousTarget:
    """transformers' continuous batching, all requests at once, every one to its exact length."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, work: Sequence[Work], pacing: Pacing, done: Callable[[], None]) -> Run:
        """One repeat; starting and stopping the manager is not counted. Raises SystemExit where it ends early."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        if pacing.rate or pacing.concurrency:
            raise SystemExit("transformers' continuous batching is measured with all requests at once")
        config = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(w.out for w in work)
        )
        manager = self.model.init_continuous_batching(
            generation_config=config, continuous_batching_config=ContinuousBatchingConfig(max_blocks_per_request=0)
        )
        manager.start()
        try:
            begin = time.perf_counter()
            records = {
                manager.add_request(list(w.prompt), max_new_tokens=w.out, record_timestamps=True): Record(
                    len(w.prompt), begin
                )
                for w in work
            }
            open_requests = set(records)
            while open_requests:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise SystemExit(f"transformers' manager ended with {len(open_requests)} requests open")
                elif result.is_finished():
                    open_requests.discard(result.request_id)
                    record = records[result.request_id]
                    record.tokens, record.error = len(result.generated_tokens), str(result.error or "")
                    record.times = list(result.timestamps or ())
                    done()
            seconds = time.perf_counter() - begin
        finally:
            manager.stop(block=True)
        return Run(list(records.values()), seconds)


def _batches(work: Sequence[Work], size: int) -> list[list[Work]]:
    return [list(work[at : at + size]) for at in range(0, len(work), size)]
