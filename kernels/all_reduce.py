"""The sum of a tensor over ranks that write each other's memory, alone or with the addition and norm behind it.

Every rank pushes its rows into an inbox of each other rank, and adds up what lies in its own. A row has two places in
the inbox and a count of its sums, its epoch; sums take the places in turn. A rank fills a place again only after it has
read what the others sent for the sum in between, and that they sent after they had read the place: nobody waits for
readers.

Behind each row comes its flag, the epoch: the row is there when the flag is.

All ranks must make the same sums of the same shapes in the same order. A rank that does not come is waited for as long
as `patience` says; then the waiting one's CUDA context ends with an error, which its next call of CUDA raises. Sums are
taken in fp32 in the order of the ranks and rounded once, so that every rank has the same bits.

Shapes: T tokens, C channels, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import INTERPRETED, begin, constexpr, early_start, next_power_of_two, tensor, tl, triton_jit
from kernels.norms import scaled_norm

ROWS = 1024  # of one launch; longer tensors take several
_FLAG_BYTES, _ALIGN = 4, 256
_WITHOUT_END = 1 << 62


def all_reduce_reference(parts: list[torch.Tensor]) -> torch.Tensor:
    """What each rank has after `all_reduce` of `parts`, one of each rank."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand in a rank's inbox: rows, then flags of rows; each by place (0, 1), sender, row."""

    size: int
    channels: int
    itemsize: int

    @property
    def flags_at(self) -> int:
        """Bytes before the flags."""
        rows = 2 * self.size * ROWS * self.channels * self.itemsize
        return -(-rows // _ALIGN) * _ALIGN

    @property
    def total(self) -> int:
        """Bytes of an inbox."""
        return self.flags_at + 2 * self.size * ROWS * _FLAG_BYTES


@dataclass(frozen=True, slots=True)
class Inboxes:
    """The inboxes of a group for rows of one width, as one rank sees them.

    addresses [R] int64: where each rank's inbox begins, in this process; all bytes are 0 at first. epochs [ROWS] int32:
    sums so far of each row, 0 at first. patience [1] int64: nanoseconds that a sum waits for a rank; on the device, for
    kernels in graphs read it as well.
    """

    rank: int
    layout: Layout
    addresses: torch.Tensor
    epochs: torch.Tensor
    patience: torch.Tensor

    @classmethod
    def at(cls, addresses: list[int], rank: int, layout: Layout, device: torch.device) -> Inboxes:
        """Of a group whose ranks' zeroed memory lies at `addresses`; they wait without end."""
        places = torch.tensor(addresses, dtype=torch.int64, device=device)
        epochs = torch.zeros(ROWS, dtype=torch.int32, device=device)
        patience = torch.full((1,), _WITHOUT_END, dtype=torch.int64, device=device)
        return cls(rank, layout, places, epochs, patience)

    def wait_at_most(self, seconds: float) -> None:
        """From the next sum on; inboxes that were made in inference mode may be told outside of it."""
        with torch.inference_mode():
            self.patience.fill_(int(seconds * 1e9))


@triton_jit
def _wait(flag_ptr: tensor, epoch: tensor, patience: tensor, TIMED: constexpr) -> None:
    """Until the flag is `epoch`, and what was written ahead of it is there."""
    if TIMED:
        if tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != epoch:
            began = tl.extra.cuda.globaltimer()
            while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != epoch:
                if tl.extra.cuda.globaltimer() - began > patience:
                    tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != epoch:
            pass


@triton_jit
def _sum_kernel(
    x_ptr: tensor,
    residual_ptr: tensor,
    weight_ptr: tensor,
    out_ptr: tensor,
    total_ptr: tensor,
    address_ptr: tensor,
    epoch_ptr: tensor,
    patience_ptr: tensor,
    x_stride: tensor,
    residual_stride: tensor,
    eps: tensor,
    RANK: constexpr,
    SIZE: constexpr,
    CHANNELS: constexpr,
    BLOCK_C: constexpr,
    ROWS: constexpr,
    FLAGS_AT: constexpr,
    NORM: constexpr,
    TIMED: constexpr,
    EARLY: constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    real = channel < CHANNELS
    if NORM:
        weight = tl.load(weight_ptr + channel, mask=real, other=0.0)
    begin(EARLY)
    x = tl.load(x_ptr + row * x_stride + channel, mask=real, other=0.0)
    epoch = tl.load(epoch_ptr + row) + 1
    patience = tl.load(patience_ptr)
    place = (epoch & 1).to(tl.int64) * SIZE
    sent = ((place + RANK) * ROWS + row) * CHANNELS + channel
    for to in tl.static_range(SIZE):
        if to != RANK:
            rows = tl.load(address_ptr + to).to(tl.pointer_type(x.dtype))
            tl.store(tl.multiple_of(rows, 16) + sent, x, mask=real)
    tl.debug_barrier()  # the flag's release is one thread's, and counts for what all have written
    for to in tl.static_range(SIZE):
        if to != RANK:
            flags = (tl.load(address_ptr + to) + FLAGS_AT).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + (place + RANK) * ROWS + row, epoch, sem="release", scope="sys")
    own = tl.load(address_ptr + RANK)
    summed = tl.zeros([BLOCK_C], tl.float32)
    for sender in tl.static_range(SIZE):
        if sender == RANK:
            summed += x.to(tl.float32)
        else:
            _wait(
                (own + FLAGS_AT).to(tl.pointer_type(tl.int32)) + (place + sender) * ROWS + row, epoch, patience, TIMED
            )
            came = tl.multiple_of(own.to(tl.pointer_type(x.dtype)), 16) + ((place + sender) * ROWS + row) * CHANNELS
            summed += tl.load(came + channel, mask=real, other=0.0).to(tl.float32)
    x = summed.to(x.dtype)
    if NORM:
        residual = tl.load(residual_ptr + row * residual_stride + channel, mask=real, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * CHANNELS + channel, x, mask=real)
        tl.store(out_ptr + row * CHANNELS + channel, scaled_norm(x, weight, eps, CHANNELS), mask=real)
    else:
        tl.store(x_ptr + row * x_stride + channel, x, mask=real)
    tl.store(epoch_ptr + row, epoch)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    inboxes: Inboxes,
    *,
    norm: bool,
) -> None:
    """In slices of ROWS rows: a row's place in the inbox is its place in the slice."""
    layout = inboxes.layout
    block = next_power_of_two(layout.channels)
    for first in range(0, len(x), ROWS):
        rows = slice(first, first + ROWS)
        part = x[rows]
        _sum_kernel[(len(part),)](
            *(part, residual[rows], weight, out[rows], total[rows]),
            *(inboxes.addresses, inboxes.epochs, inboxes.patience, x.stride(0), residual.stride(0), eps),
            *(inboxes.rank, layout.size, layout.channels, block, ROWS, layout.flags_at, norm, not INTERPRETED),
            num_warps=min(max(block // 512, 1), 16),
            **early_start(x),
        )


def all_reduce(x: torch.Tensor, inboxes: Inboxes) -> None:
    """Sum x [T, C], channels adjacent, over the ranks, in place."""
    _launch(x, x, x, x, x, 0.0, inboxes, norm=False)


def all_reduce_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, inboxes: Inboxes
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.norms.add_rms_norm` of the sum of `x` over the ranks; x, residual [T, C], channels adjacent, stay."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch(x, residual, weight, out, total, eps, inboxes, norm=True)
    return out, total
