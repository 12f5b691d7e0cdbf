"""Ours beside transformers, module by module: which one is the first that differs, and why."""
