"""The engine: which sequences run in a step, and in which blocks. Pure Python: no torch, no I/O, an injected clock."""
