"""What a sum over the ranks of one host costs, by number of rows: ours, NCCL's, torch's symmetric memory.

    python benchmarks/all_reduce.py --size 2 --json FILE      # GPUs that reach each other's memory; about 20 s

Rows of --channels bf16. Each way runs --calls times in a CUDA graph, which is replayed; microseconds a call, the median
of replays on rank 0. `+ norm` is the sum with addition and norm behind it. Sums are compared with torch's bit for bit
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from load.ranks import run_together

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TORCH_MOST = 4096  # rows that torch's symmetric memory is asked for


def measure_rank(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By way and number of rows, on this rank."""
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    from kernels.all_reduce import (
        ROWS as SLICE,
    )
    from kernels.all_reduce import (
        Inboxes,
        Layout,
        all_reduce,
        all_reduce_add_rms_norm,
        all_reduce_reference,
    )
    from kernels.norms import add_rms_norm, add_rms_norm_reference
    from workers.parallel.group import connect

    torch.cuda.set_device(args.rank)
    device = torch.device("cuda", args.rank)
    group = connect(rank=args.rank, tensor_parallel=args.size, init_method=f"file://{args.meet}", backend="nccl").tp
    assert group.handle is not None
    channels = args.channels
    layout = Layout(args.size, channels, 2)
    box = symmetric_memory.empty(layout.total, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize()
    peers = symmetric_memory.rendezvous(box, group.handle)
    addresses = [peers.get_buffer(r, (layout.total,), torch.uint8).data_ptr() for r in range(args.size)]
    boxes = Inboxes.at(addresses, args.rank, layout, device)
    staging = symmetric_memory.empty(TORCH_MOST * channels, dtype=torch.bfloat16, device=device)
    symmetric_memory.rendezvous(staging, group.handle)
    name = group.handle.group_name
    random = torch.Generator(device).manual_seed(5)
    shape = (max(args.rows), channels)
    whole = [torch.randn(shape, generator=random, device=device).bfloat16() for _ in range(args.size)]
    residual = torch.randn(shape, generator=random, device=device).bfloat16()
    weight = torch.randn(channels, generator=random, device=device).bfloat16()
    mine = whole[args.rank]

    for rows in (*args.rows, SLICE + 1):
        if rows > max(args.rows):
            continue
        exact = all_reduce_reference([part[:rows] for part in whole])
        for _ in range(3):
            x = mine[:rows].clone()
            all_reduce(x, boxes)
            out, total = all_reduce_add_rms_norm(mine[:rows], residual[:rows], weight, 1e-5, boxes)
            normed, added = add_rms_norm_reference(exact, residual[:rows], weight, 1e-5)
            assert torch.equal(x, exact), f"{rows} rows: the sum is wrong"
            assert torch.equal(total, added), f"{rows} rows: the sum with its residual is wrong"
            torch.testing.assert_close(out, normed, atol=2e-2, rtol=2e-2)

    def timed(call: Callable[[], object]) -> float:
        """Microseconds of one call."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="relaxed")
            for _ in range(args.calls):
                call()
            graph.capture_end()
            times = []
            for _ in range(args.repeat + 1):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                dist.barrier(group=group.handle)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(1e3 * begin.elapsed_time(end) / args.calls)
        return statistics.median(times[1:])

    def ways_of(rows: int) -> dict[str, Callable[[], object]]:
        x, rest = torch.zeros_like(mine[:rows]), residual[:rows]
        ways: dict[str, Callable[[], object]] = {
            "NCCL": lambda: dist.all_reduce(x, group=group.handle),
            "NCCL + norm": lambda: add_rms_norm(group.all_reduce(x), rest, weight, 1e-5),
            "norm": lambda: add_rms_norm(x, rest, weight, 1e-5),
            "ours": lambda: all_reduce(x, boxes),
            "ours + norm": lambda: all_reduce_add_rms_norm(x, rest, weight, 1e-5, boxes),
        }
        if rows <= TORCH_MOST:
            staged = staging[: rows * channels].view(rows, channels).zero_()
            ways["two_shot"] = lambda: torch.ops.symm_mem.two_shot_all_reduce_(staged, "sum", name)
            ways["one_shot"] = lambda: torch.ops.symm_mem.one_shot_all_reduce(staged, "sum", name)
        return ways

    found: dict[str, dict[str, float]] = {}
    for rows in args.rows:
        for way, call in ways_of(rows).items():
            found.setdefault(way, {})[str(rows)] = timed(call)
            if args.rank == 0:
                print(f"{rows} rows, {way}: {found[way][str(rows)]:.1f} us", flush=True)
    dist.barrier(group=group.handle)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2, help="ranks")
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        found = measure_rank(args)
        if args.rank == 0:
            show(found, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--meet", f"{folder}/meet"]
        codes = run_together([[*command, "--rank", str(rank)] for rank in range(args.size)])
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


def show(found: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """A table, and the same as JSON."""
    print(f"microseconds, {args.size} ranks, rows of {args.channels} bf16")
    print("rows".rjust(6), *(way.rjust(13) for way in found))
    for rows in map(str, args.rows):
        print(rows.rjust(6), *(f"{of[rows]:13.1f}" if rows in of else " " * 13 for of in found.values()))
    if args.json:
        document = {"command": " ".join(sys.argv), "unit": "microseconds", "ways": found}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
