"""The router stays light: no module of it loads torch, transformers or Ray, and only `columns` numpy."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import router
names = [m.name for m in pkgutil.walk_packages(router.__path__, "router.")]
for name in names:
    if name == "router.dispatch.columns":
        continue  # loaded by dispatchers of many replicas alone
    importlib.import_module(name)
heavy = {"torch", "transformers", "triton", "ray", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert "router.http.app" in names and "router.text.tokenizer" in names, names
"""


def test_nothing_heavy_is_loaded():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
