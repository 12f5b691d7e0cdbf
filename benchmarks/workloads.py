"""Workloads W1-W5, shared by every engine that is measured here.

Standard library only.  A workload is a list of requests; a request is a dict
{"prompt": [token ids], "out": number of tokens to generate}.  Every request
runs greedily (temperature 0), ignores EOS, and produces exactly "out" tokens.

Lengths depend only on the workload.  Token ids depend on the workload AND on
the repeat number `rep`, so that no prompt of one repeat can be found in a
prefix cache filled by another (inside W5 the prefix is shared by design).
fingerprint() gives a hash that two programs can compare to be sure that they
ran the same thing.

    W1      batch 1: 128 in / 256 out    ms per output token, TTFT
    W2a     64 x (128 in / 512 out)      output tok/s
    W2b     256 x (128 in / 256 out)     output tok/s
    W3      1000 ShareGPT-like requests  requests/s, output tok/s, total tok/s
    W4a     32 x (2048 in / 1 out)       input tok/s
    W4b     1 x (8000 in / 1 out)        TTFT
    W5      256 x (1024 shared + 64 own in / 64 out), prefix caching on
"""

import hashlib
import math
import random
import struct

VOCAB = 128256
LO, HI = 10, 127990  # token ids stay clear of the special ones

# The model: Llama-3.1-8B's shape.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB,
}


def weight_counts(c=CONFIG):
    """Parameters: all, and those that one decode step has to read."""
    h, i, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    hd, nq, nkv = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    layer = h * hd * nq * 2 + h * hd * nkv * 2 + 3 * h * i + 2 * h
    emb = c["vocab_size"] * h
    return {
        "total": layers * layer + 2 * emb + h,
        "read_per_step": layers * layer + emb + h,
        "matmul_per_token": layers * (layer - 2 * h),
        "lm_head": emb,
        "kv_bytes_per_token_bf16": layers * 2 * nkv * hd * 2,
    }


def _rng(*key):
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    return random.Random(seed)


def _tokens(r, n):
    return [r.randrange(LO, HI) for _ in range(n)]


def _uniform(name, n, n_in, n_out, rep):
    r = _rng(name, "tokens", rep)
    return [{"prompt": _tokens(r, n_in), "out": n_out} for _ in range(n)]


def _lengths(name, what, n, mean, lo=4, hi=1024, sigma=1.0):
    """n lognormal-like lengths, clipped to [lo, hi], with mean `mean` +- 0.5."""
    r = _rng(name, what)
    z = [r.gauss(0.0, 1.0) for _ in range(n)]
    a, b = 0.0, 10.0
    for _ in range(60):  # bisect on mu
        mu = (a + b) / 2
        ls = [min(hi, max(lo, int(math.exp(mu + sigma * x)))) for x in z]
        if sum(ls) > mean * n:
            b = mu
        else:
            a = mu
    return ls


def w1(rep=0, n_out=256):
    return _uniform("W1", 1, 128, n_out, rep)


def w2a(rep=0):
    return _uniform("W2a", 64, 128, 512, rep)


def w2b(rep=0):
    return _uniform("W2b", 256, 128, 256, rep)


def w3_lengths():
    """(prompt, answer) of the 1000 requests."""
    return list(zip(_lengths("W3", "in", 1000, 220), _lengths("W3", "out", 1000, 200), strict=True))


def w3(rep=0, n=1000):
    """The first n of the 1000 requests."""
    r = _rng("W3", "tokens", rep)
    return [{"prompt": _tokens(r, a), "out": b} for a, b in w3_lengths()][:n]


def w4a(rep=0):
    return _uniform("W4a", 32, 2048, 1, rep)


def w4b(rep=0):
    return _uniform("W4b", 1, 8000, 1, rep)


def w5(rep=0):
    r = _rng("W5", "tokens", rep)
    prefix = _tokens(r, 1024)
    return [{"prompt": prefix + _tokens(r, 64), "out": 64} for _ in range(256)]


ALL = {"W1": w1, "W2a": w2a, "W2b": w2b, "W3": w3, "W4a": w4a, "W4b": w4b, "W5": w5}


def totals(reqs):
    return {"requests": len(reqs), "in": sum(len(q["prompt"]) for q in reqs), "out": sum(q["out"] for q in reqs)}


def fingerprint(reqs):
    h = hashlib.sha256()
    for q in reqs:
        h.update(struct.pack("<II", len(q["prompt"]), q["out"]))
        h.update(struct.pack(f"<{len(q['prompt'])}I", *q["prompt"]))
    return h.hexdigest()[:16]


def median(xs):
    s = sorted(xs)
    n = len(s)
    return s[n // 2] if n % 2 else (s[n // 2 - 1] + s[n // 2]) / 2


def spread(xs):
    """median, min, max, count - the form in which every number is reported."""
    return {"median": median(xs), "min": min(xs), "max": max(xs), "n": len(xs)}


if __name__ == "__main__":
    for k, f in ALL.items():
        q = f()
        ins, outs = sorted(len(x["prompt"]) for x in q), sorted(x["out"] for x in q)
        print(
            k,
            totals(q),
            "in p5/50/95",
            ins[len(ins) // 20],
            ins[len(ins) // 2],
            ins[len(ins) * 19 // 20],
            "out p5/50/95",
            outs[len(outs) // 20],
            outs[len(outs) // 2],
            outs[len(outs) * 19 // 20],
            fingerprint(q),
        )
    print(weight_counts())
