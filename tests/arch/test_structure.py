"""The house rules that a machine can check: layering, file sizes, names, imports that cost start-up time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "workers", "router", "cluster")
LONGEST = 500


def sources() -> list[Path]:
    folders = [*PACKAGES, "benchmarks", "examples"]
    return [ROOT / "echelon.py", *(p for f in folders for p in (ROOT / f).rglob("*.py"))]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not long, f"split these where a reader would look for the parts: {long}"


def test_no_file_is_named_for_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    assert not [p for p in sources() if p.stem in vague]


def test_layering_holds() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("planted_in", "statement"),
    [
        ("router/generation.py", "import torch"),
        ("router/generation.py", "from workers.engine import plan"),
        ("workers/api/request.py", "import torch"),
        ("workers/engine/plan.py", "from workers.rank import Rank"),
        ("workers/api/config.py", "import ray"),
        ("kernels/norms.py", "import workers.api.request"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, planted_in: str, statement: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / planted_in
    target.write_text(target.read_text() + f"\n{statement}\n")
    assert lint_imports(tmp_path).returncode != 0, f"{statement!r} in {planted_in} went unnoticed"


@pytest.mark.parametrize("package", ["router", "workers.api", "workers.engine"])
def test_no_torch_where_none_belongs(package: str) -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'triton', 'transformers', 'ray') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
