"""What is accepted for the sake of programs written for LMDeploy, and has no meaning here: said once a process."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def without_effect(what: str, why: str) -> None:
    """Warn, once for each `what`."""
    if what not in _said:
        _said.add(what)
        warnings.warn(f"{what} has no effect: {why}", UserWarning, stacklevel=4)
