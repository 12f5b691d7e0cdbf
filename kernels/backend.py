"""The one place that knows whether Triton is there and which tensors it takes.

Kernel files import `triton_jit`, `tl` and the annotations from here. Without Triton the decorator leaves the function
as it is and `tl` is None: the kernels are then dead code, and `use_triton` never sends a tensor to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

tl: Any = None
triton_jit: Callable[..., Any]
HAS_TRITON = False
INTERPRETED = False
# The same as a constant for kernels: the interpreter multiplies the bit patterns of bf16 matrices.
WIDEN_DOT: Any = False

if TYPE_CHECKING:
    # What a kernel's arguments are annotated with. Triton looks these names up, so they must be its own at run time.
    tensor: TypeAlias = Any
    constexpr: TypeAlias = Any

try:
    import triton
    import triton.language as _tl
except ImportError:
    if not TYPE_CHECKING:
        tensor = constexpr = Any

    def triton_jit(function: Callable[..., Any]) -> Any:
        """Return `function` unchanged: there is no compiler to give it to."""
        return function
else:
    tl = _tl
    if not TYPE_CHECKING:
        tensor, constexpr = tl.tensor, tl.constexpr
    triton_jit = triton.jit
    HAS_TRITON = True
    # Read once: triton.jit decides at decoration whether a kernel is interpreted, so a later change means nothing.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    WIDEN_DOT = tl.constexpr(INTERPRETED)


def triton_jit_for_any(*, numbers: Sequence[str] = (), pointers: Sequence[str] = ()) -> Callable[..., Any]:
    """`triton_jit` of a kernel that is the same for any value of these arguments: what changes from step to step must
    not make a step wait for the compiler. `numbers` may be 1 or multiples of 16, `pointers` aligned or not.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not HAS_TRITON:
            return function
        return triton.jit(function, do_not_specialize=list(numbers), do_not_specialize_on_alignment=list(pointers))

    return decorate


def use_triton(tensor: torch.Tensor) -> bool:
    """True where the Triton kernels can take `tensor`: on CUDA, or on the CPU when TRITON_INTERPRET=1 at import."""
    if INTERPRETED:
        return tensor.device.type in ("cpu", "cuda")
    return HAS_TRITON and tensor.is_cuda


@lru_cache
def _starts_early(device: torch.device) -> bool:
    return device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def early_start(tensor: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch whose kernel opens with `begin`: programmatic dependent launch where the device has it.

    Such a kernel may start while the one ahead of it in the stream ends. Before `begin` it may read constants only, and
    write nothing.
    """
    return {"EARLY": True, "launch_pdl": True} if _starts_early(tensor.device) else {"EARLY": False}


@triton_jit
def begin(EARLY: constexpr) -> None:
    """Let the next kernel start, then wait until all kernels ahead have ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()
