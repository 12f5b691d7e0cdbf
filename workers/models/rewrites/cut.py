"""How rewrites of modules with a product before and a product after are cut over the ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from workers.models.sharding import column_parallel, row_parallel
from workers.parallel.group import Group


class CutModule(nn.Module):
    """Its projections named in `by_column` and `by_row` hold a rank's share, and so does what it returns: that is
    summed. Of a tuple the first.
    """

    by_column: ClassVar[tuple[str, ...]] = ()
    by_row: ClassVar[str] = ""

    @classmethod
    def _distribute_partition_fn(cls, mod_name: str, mod: nn.Module, device_mesh: Group) -> None:
        """See `workers.models.patch`."""
        if mod_name in cls.by_column:
            column_parallel(mod, device_mesh)
        elif mod_name == cls.by_row:
            row_parallel(mod, device_mesh)

    @classmethod
    def _distribute_output_fn(cls, outputs: Any, device_mesh: Group) -> Any:
        """See `workers.models.patch`."""
        part: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        device_mesh.all_reduce(part)
        return outputs


def join_weights(linears: tuple[nn.Linear, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and bias for all of `linears`, of which their weights become views."""
    sizes = [linear.weight.shape[0] for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight.data = part
    return weight, bias
