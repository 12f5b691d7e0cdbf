"""locust, a load generator: users that chat, streamed and not, for some seconds."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from said import MESSAGES, MODEL, URL, tried

USERS = f"""
import gevent
from locust import HttpUser, events, task

BODY = {{"model": {MODEL!r}, "messages": {MESSAGES!r}, "temperature": 0}}

@events.init.add_listener
def count_from_now(**_):
    # --run-time counts from what gevent's loop last took for now: before locust's imports, which may take longer than
    # the whole run on a busy machine, so that it would end as it begins.
    gevent.get_hub().loop.update_now()

class Chatter(HttpUser):
    @task
    def whole(self):
        with self.client.post("/v1/chat/completions", json=BODY, name="whole", catch_response=True) as answer:
            if "7" not in answer.json()["choices"][0]["message"]["content"]:
                answer.failure("another answer")

    @task
    def streamed(self):
        body = BODY | {{"stream": True}}
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as s:
            if list(s.iter_lines())[-2:] != [b"data: [DONE]", b""]:
                s.failure("no [DONE]")
"""

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "users.py").write_text(USERS)
    options = ["--headless", "--users", "8", "--spawn-rate", "8", "--run-time", "10s", "--csv", "seen", "--host", URL]
    subprocess.run([sys.executable, "-m", "locust", "-f", "users.py", *options], cwd=folder, check=True)
    with open(folder / "seen_stats.csv") as lines:
        total = next(row for row in csv.DictReader(lines) if row["Name"] == "Aggregated")
assert int(total["Failure Count"]) == 0 < int(total["Request Count"])
tried("locust", "locust", f"8 users for 10 s, streamed and not: {total['Request Count']} answers, none failed")
