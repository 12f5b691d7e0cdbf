"""`echelon convert`: a checkpoint as one folder that `echelon serve` takes as it is.

LMDeploy's command of this name rewrites weights for its engine. Here ranks read their shards from safetensors as they
are, so that weights are linked, not rewritten; what is made is what a checkpoint may lack: a `tokenizer.json`, and the
chat template of a family.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from cluster.environment import prepare_torch
from workers.api.errors import ConfigError

KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "README*")


def convert(
    model_name: Annotated[str, typer.Argument(help="The family: a chat template's name (echelon list).")],
    model_path: Annotated[str, typer.Argument(help="demo, a local folder, or a hub id.")],
    dst_path: Annotated[Path, typer.Option(help="The folder to make.")] = Path("workspace"),
    model_format: Annotated[str | None, typer.Option(help="hf.")] = None,
    tp: Annotated[int, typer.Option("--tp", help="Weights are cut where they are loaded: nothing to do for it.")] = 1,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the checkpoint to read its tokenizer.")
    ] = False,
) -> None:
    """Check a checkpoint and make a folder of it that `echelon serve` takes as it is."""
    from cluster.config import resolve_model
    from cluster.pipeline.engine_config import refuse_quantization
    from router.text.chat_classes import MODELS

    refuse_quantization(model_format, 0)
    if model_name not in MODELS.names:
        raise ConfigError(f"there is no family {model_name!r}; there are: {', '.join(MODELS.names)}")
    source = resolve_model(model_path, code=trust_remote_code)
    for line in converted(model_name, source, dst_path, trust_remote_code=trust_remote_code):
        typer.echo(line)
    typer.echo(f"echelon serve {dst_path}" + (f" --tp {tp}" if tp > 1 else ""))


def converted(name: str, source: Path, target: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Make `target` from the checkpoint at `source`; what was done. Raises ConfigError, and leaves nothing then."""
    from router.text.checkpoint import has_template

    _check(source)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty: name another folder (--dst-path), or remove it")
    said = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        weights = sorted(source.glob("*.safetensors"))
        console = Console(stderr=True)  # another file system means copies, which take their time
        for file in track(weights, "weights", console=console, transient=True, disable=not console.is_terminal):
            _link(file.resolve(), target / file.name)
        for file in {f for pattern in KEPT for f in source.glob(pattern)}:
            shutil.copy2(file, target / file.name)
        said.append(f"{len(weights)} files of weights, linked or copied as they are")
        if not (source / "tokenizer.json").is_file():
            _write_tokenizer(source, target, trust_remote_code)
            said.append("tokenizer.json, made from the checkpoint's tokenizer")
        if has_template(source):
            said.append("the chat template is the checkpoint's own")
        else:
            said.append(_write_template(name, target))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return said


def _check(source: Path) -> None:
    """Raises ConfigError where the checkpoint cannot be served."""
    prepare_torch()
    from workers.models.base import read_config  # torch
    from workers.models.registry import find

    find(read_config(str(source)))
    if not any(source.glob("*.safetensors")):
        pickled = [f.name for f in source.glob("*.bin")]
        why = f"it has {', '.join(pickled)}, which is pickled and could run any code" if pickled else "it has none"
        raise ConfigError(
            f"{source} has no weights in safetensors: {why}. transformers writes them: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another file system
        shutil.copy2(file, target)


def _write_tokenizer(source: Path, target: Path, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))
    except Exception as e:  # whatever a tokenizer's own code raises
        raise ConfigError(f"the tokenizer of {source} cannot be read: {type(e).__name__}: {e}") from e


def _write_template(name: str, target: Path) -> str:
    from router.text.chat_classes import ChatTemplateConfig
    from router.text.chat_form import ChatForm
    from router.text.checkpoint import read_backend
    from router.text.template_choice import leading_specials

    form = ChatTemplateConfig(name).chat_template
    if not isinstance(form, ChatForm):
        raise ConfigError(f"{name!r} is a class of a program: it cannot be written to a file")
    backend = read_backend(target)
    (target / "chat_template.jinja").write_text(form.as_jinja(leading_specials(backend)), "utf-8")
    ends = [i for word in form.stop_words if (i := backend.token_to_id(word)) is not None]
    path = target / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    before = settings.get("eos_token_id")
    settings["eos_token_id"] = list(dict.fromkeys([*(before if isinstance(before, list) else [before]), *ends]))
    settings["eos_token_id"] = [i for i in settings["eos_token_id"] if i is not None]
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return f"the chat template of {name}, and its ends of an answer"
