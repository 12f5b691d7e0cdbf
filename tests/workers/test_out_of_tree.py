"""A new family from outside of the tree, in each of the three ways: entry point, model file, patch map."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from add_a_model import blocks, muse_checkpoint
from foreign import VOCAB, assert_logits, checkpoint, rank_over, reference, step_logits, steps_of
from tiny import generate, prompt, request

from cluster.serving import cluster_config
from workers.api.errors import ConfigError
from workers.models.patch_map import MODULE_MAP
from workers.models.registry import architectures, import_model_file
from workers.models.ways import served
from workers.rank import run_to_completion

LONG, SHORT = prompt(24, vocab=VOCAB), prompt(6, vocab=VOCAB)


def tokens(folder: Path, **model: Any) -> list[int]:
    engine = rank_over(folder, implementation="auto", **model).make_engine()
    return run_to_completion(engine, [request("a", LONG, max_tokens=6)])["a"]


def test_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, want = muse_checkpoint(tmp_path, "MuseOfAPackage")
    package = tmp_path / "package"
    info = package / "muse_models-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "muse_of_a_package.py").write_text(blocks()["muse.py"].replace('register("Muse', 'register("Unused'))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: muse-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[echelon.models]\nMuseOfAPackage = muse_of_a_package:MuseForCausalLM\n")
    monkeypatch.setattr(sys, "path", [str(package), *sys.path])
    importlib.invalidate_caches()
    assert "MuseOfAPackage" in architectures()
    assert {row.way for row in served() if row.architecture == "MuseOfAPackage"} == {"out of tree"}
    assert tokens(folder) == generate(want, LONG, 6)


def test_by_a_model_file(tmp_path: Path) -> None:
    folder, want = muse_checkpoint(tmp_path, "MuseOfAFile")
    file = tmp_path / "muse.py"
    file.write_text(blocks()["muse.py"].replace('register("MuseForCausalLM"', 'register("MuseOfAFile"'))
    with pytest.raises(ConfigError, match="MuseOfAFile"):
        tokens(folder)
    assert tokens(folder, model_files=(str(file),)) == generate(want, LONG, 6)


@pytest.mark.parametrize("size", [1, 2])
def test_by_an_entry_of_the_patch_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    key = "transformers.models.qwen3.modeling_qwen3.Qwen3MLP"
    monkeypatch.setitem(MODULE_MAP, key, "")  # put back afterwards, whatever the file does
    file = tmp_path / "rewrite.py"
    file.write_text(blocks()["rewrite.py"].replace("qwen2", "qwen3").replace("Qwen2", "Qwen3"))
    got = step_logits(checkpoint("qwen3-tied"), steps_of(LONG, SHORT), size=size, model_files=(str(file),))
    assert_logits(got, "qwen3-tied", LONG, SHORT)
    assert MODULE_MAP[key].__name__ == "FastMLP"
    assert reference("qwen3-tied").config.tie_word_embeddings


def test_a_file_that_is_none_or_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py is not a Python file"):
        import_model_file(str(tmp_path / "nowhere.py"))
    (tmp_path / "bad.py").write_text("1 / 0")
    for _ in range(2):  # a failure leaves nothing behind
        with pytest.raises(ConfigError, match=r"bad\.py cannot be imported: ZeroDivisionError"):
            import_model_file(str(tmp_path / "bad.py"))


def test_files_of_a_cluster_file_are_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("model: {path: demo, model_files: [muse.py], implementation: native}\n")
    config = cluster_config(str(tmp_path / "cluster.yaml"), {})
    assert config.replica_config("cpu").model.model_files == (str(tmp_path / "muse.py"),)
    assert config.replica_config("cpu").model.implementation == "native"
    given = cluster_config("demo", {"model_files": ("/x/a.py",), "implementation": "transformers"})
    assert given.replica_config("cpu").model.model_files == ("/x/a.py",)
