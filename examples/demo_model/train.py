"""Train the demo model: `python examples/demo_model/train.py --out configs/demo-model`.

A Llama of 2.4 million parameters learns a generated corpus (`corpus.py`) and is saved as bf16 safetensors in the
Hugging Face layout. Shapes: N rows, L tokens a row, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import corpus
import dataset
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizer import save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

CONSOLE = Console(soft_wrap=True)


def make_config(special: dict[str, int], vocab_size: int) -> LlamaConfig:
    """A Llama small enough for 5 MB in bf16, whose heads and widths can be split between two ranks."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=dataset.LENGTHS[-1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=special[corpus.BEGIN],
        eos_token_id=special[corpus.END],
        pad_token_id=special[corpus.PAD],
        initializer_range=0.03,
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear rise over `warmup` steps, then a cosine down to 1 % of `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of `labels` [N, L] given `hidden` [N, L, C] and the head [V, C]; ignored ones do not count."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=dataset.IGNORED)


def compile_parts(model: LlamaForCausalLM) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Compile the layers in place and return the compiled loss.

    Compiled one by one, the layers share one graph a row length: a fourth of the time that the whole model takes, and
    transformers, outside of any trace, chooses causal attention without a mask tensor.
    """
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return torch.compile(head_loss, dynamic=False)


def parameter_groups(model: LlamaForCausalLM, decay: float) -> list[dict[str, object]]:
    """Matrices with weight decay, norms without."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def fit(model: LlamaForCausalLM, batches: dataset.Batches, args: argparse.Namespace) -> tuple[int, float]:
    """Run the steps (or stop early at `--seconds`, with the schedule bent to end there); return (steps, last loss)."""
    on_gpu = args.device.startswith("cuda")
    rate = torch.tensor(0.0, device=args.device) if on_gpu else 0.0
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.decay), lr=rate, betas=(0.9, 0.98), fused=on_gpu, capturable=on_gpu
    )
    loss_of = compile_parts(model) if args.compile else head_loss
    average, began = math.nan, time.monotonic()
    total, started_loop = args.steps, None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f}"))  # fmt: skip
    with Progress(*columns, console=CONSOLE, refresh_per_second=2, disable=not CONSOLE.is_terminal) as progress:
        bar = progress.add_task("training", total=total, loss=average)
        for step, (ids, labels) in enumerate(batches.draw(args.seed)):
            if step == args.measure_after and args.seconds:
                if on_gpu:
                    torch.cuda.synchronize()
                started_loop = time.monotonic()
            if started_loop is not None and step == 2 * args.measure_after:
                if on_gpu:
                    torch.cuda.synchronize()
                pace = (time.monotonic() - started_loop) / args.measure_after
                total = min(args.steps, step + max(int((args.seconds - (time.monotonic() - began)) / pace), 1))
                CONSOLE.print(f"{pace * 1e3:.2f} ms a step: {total} steps fit")
                progress.update(bar, total=total)
            if step >= total:
                break
            for group in optimizer.param_groups:
                now = learning_rate(step, total, args.rate, args.warmup)
                if on_gpu:
                    group["lr"].fill_(now)
                else:
                    group["lr"] = now
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=on_gpu):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                loss = loss_of(hidden, model.lm_head.weight, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(bar)
            if step % 100 == 0 or step == total - 1:  # reading the loss waits for the device
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {step}")
                average = value if math.isnan(average) else 0.5 * average + 0.5 * value
                progress.update(bar, loss=average)
                if not CONSOLE.is_terminal and step % args.print_every == 0:
                    CONSOLE.print(f"step {step}  loss {average:.4f}  {time.monotonic() - began:.0f} s")
    return total, average


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Round the weights to bf16 and write config.json, model.safetensors and generation_config.json."""
    model = model.to("cpu", torch.bfloat16).eval()
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder, safe_serialization=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train Echelon's demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--start", type=Path, help="go on from this folder's weights and tokenizer")
    parser.add_argument("--note", default="", help="a sentence for the model card")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--seconds", type=float, default=0.0, help="shorten the run so that training ends about here")
    parser.add_argument("--measure-after", type=int, default=200, help="steps after which --seconds takes the pace")
    parser.add_argument("--conversations", type=int, default=500_000, help="generated training texts")
    parser.add_argument("--drills", type=float, default=0.0, help="share of texts that only repeat or spell")
    parser.add_argument("--longest", type=int, default=dataset.LENGTHS[-1], help="tokens a text is cut to")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens a batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (pays off on a GPU)")
    parser.add_argument("--print-every", type=int, default=500)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Make the tokenizer and the data, train, round, save."""
    args = parse(argv)
    began = time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    else:
        texts = [text for i in range(5) for text in corpus.shard(args.seed, i, min(2000, args.conversations))]
        tokenizer = train_tokenizer(texts, args.vocab)
    special = dataset.token_ids(tokenizer)
    save_tokenizer(tokenizer, args.out, dataset.LENGTHS[-1])
    with Progress(console=CONSOLE, disable=not CONSOLE.is_terminal) as progress:
        bar = progress.add_task("corpus", total=args.conversations)
        tick = functools.partial(progress.advance, bar)
        batches = dataset.build(
            tokenizer, args.seed, args.conversations, args.tokens, args.device, tick, args.drills, args.longest
        )
    CONSOLE.print(f"corpus: {batches.describe()}; {time.monotonic() - began:.1f} s")

    if args.start:
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32).to(args.device)
        stages = json.loads((args.start / "training.json").read_text())["stages"]
    else:
        model = LlamaForCausalLM(make_config(special, args.vocab)).to(args.device)
        stages = []
    parameters = sum(p.numel() for p in model.parameters())
    CONSOLE.print(f"{parameters:,} parameters on {args.device}")
    fitting = time.monotonic()
    steps, loss = fit(model, batches, args)
    trained_s = time.monotonic() - fitting
    save(model, args.out)

    on_gpu = args.device.startswith("cuda")
    noted = argv.index("--note") if "--note" in argv else len(argv)
    shown = argv[:noted] + argv[noted + 2 :]
    record = {
        "command": "python examples/demo_model/train.py " + shlex.join(shown),
        "note": args.note,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": args.seed,
        "conversations": args.conversations,
        "steps": steps,
        "tokens_per_step": args.tokens,
        "training_seconds": round(trained_s, 1),
        "total_seconds": round(time.monotonic() - began, 1),
        "final_loss": round(loss, 4),
    }
    (args.out / "training.json").write_text(
        json.dumps({"parameters": parameters, "stages": [*stages, record]}, indent=2) + "\n"
    )
    CONSOLE.print(f"{steps} steps in {trained_s:.0f} s, loss {loss:.4f}; saved in {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
