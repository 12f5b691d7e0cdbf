"""lm-evaluation-harness over HTTP, with tasks of our own: log-likelihoods of completions, generation by both routes."""

import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from said import MODEL, URL, tried

CHOICE = """task: echelon_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
WRITE = """task: echelon_write
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def run(folder: Path, kind: str, route: str, task: str, **more: object) -> float:
    common = {
        "model": MODEL,
        "base_url": f"{URL}/v1/{route}",
        "num_concurrent": 2,
        "max_retries": 1,
        "max_length": 1024,
    }
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model=kind, model_args={**common, **more}, tasks=[task], task_manager=tasks,
        bootstrap_iters=0, apply_chat_template=kind.endswith("chat-completions"),
    )  # fmt: skip
    scores = done["results"][task]
    return float(next(v for k, v in scores.items() if k.startswith(("acc,", "exact_match,"))))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    sums = [(a, b) for a in range(2, 6) for b in range(2, 4)]
    lines = [
        {"question": f"What is {a} + {b}?", "choices": [f"{a} + {b} = {c}." for c in (a + b, a + b + 1)], "answer": 0}
        for a, b in sums
    ]
    data = folder / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (folder / "choice.yaml").write_text(CHOICE % data)
    (folder / "write.yaml").write_text(WRITE % data)
    choice = run(folder, "local-completions", "completions", "echelon_choice", max_length=1024)
    write = run(folder, "local-completions", "completions", "echelon_write", max_length=1024)
    chat = run(folder, "local-chat-completions", "chat/completions", "echelon_write")
assert 0 <= choice <= 1
tried(
    "lm-evaluation-harness", "lm_eval",
    f"local-completions: log-likelihoods of 8 sums (acc {choice:.2f}), generation (exact {write:.2f})",
    f"local-chat-completions: generation (exact {chat:.2f})",
)  # fmt: skip
