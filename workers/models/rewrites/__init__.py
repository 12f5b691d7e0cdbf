"""Rewrites of transformers' modules, named in `workers.models.patch_map`."""
