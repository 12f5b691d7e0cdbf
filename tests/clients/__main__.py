"""Runs each client's script against a live server and prints what came of it: `make test-clients`.

The clients are installed at the versions of requirements.txt and package.json into `.clients/`. Ends with 1 when one of
them failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BINARIES = ROOT / ".clients" / "venv" / "bin"
MODULES = ROOT / ".clients" / "node_modules"
MOST_SECONDS = 600  # of one script
TITLE = "| client | version | what was tried | result |\n|---|---|---|---|\n"


def install() -> None:
    """The clients stand in `.clients/`, at the versions that are asked for."""
    folder = ROOT / ".clients"
    folder.mkdir(exist_ok=True)
    wanted = "".join((HERE / name).read_text() for name in ("requirements.txt", "package.json"))
    mark = folder / "installed"
    if mark.exists() and mark.read_text() == wanted:
        return
    print("Installing the clients into .clients (some minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([BINARIES / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    pip = [BINARIES / "uv", "pip", "install", "--quiet", "--python", BINARIES / "python"]
    subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
    if shutil.which("npm"):
        shutil.copy(HERE / "package.json", folder)
        npm = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--legacy-peer-deps", "--silent"]
        subprocess.run(npm, cwd=folder, check=True)
    mark.write_text(wanted)


@contextlib.contextmanager
def server(port: int) -> Iterator[str]:
    """The demo model served by one replica, while this runs."""
    command = [sys.executable, "-m", "cluster.cli", "serve", "demo", "--port", str(port)]
    log = ROOT / ".clients" / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 600
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=120)


def is_ready(url: str) -> bool:
    """Whether some replica takes requests."""
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def run(script: Path, url: str) -> tuple[str, bool]:
    """The row of one script, and whether all went well."""
    node = script.suffix in (".cjs", ".mjs")
    if node and shutil.which("node") is None:
        return f"| {script.stem} | | | no node here |\n", False
    command = ["node" if node else str(BINARIES / "python"), str(script), url]
    environment = {**os.environ, "NODE_PATH": str(MODULES), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=MOST_SECONDS, env=environment, check=False
        )
        said, failed = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as e:
        said, failed = f"{e.stdout}\nnot done after {MOST_SECONDS} s", 1
    tried = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("TRIED ")]
    if failed or not tried:
        print(f"--- {script.name}\n{said[-3000:]}", file=sys.stderr, flush=True)
        return f"| {script.stem} | | | **failed** |\n", False
    one = tried[-1]
    return f"| {one['client']} | {one['version']} | {one['what']} | good |\n", True


def main() -> int:
    """All of them, or those named."""
    parser = argparse.ArgumentParser(prog="make test-clients")
    parser.add_argument("--url", help="a server that runs already; default: one of our own")
    parser.add_argument("--port", type=int, default=23999)
    parser.add_argument("--only", nargs="+", default=[], help="parts of scripts' names")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    options = parser.parse_args()
    install()
    scripts = sorted(p for p in HERE.glob("with_*") if not options.only or any(o in p.name for o in options.only))
    if not scripts:
        parser.error(f"no script is called so; there are {', '.join(sorted(p.name for p in HERE.glob('with_*')))}")
    rows = []
    with contextlib.nullcontext(options.url) if options.url else server(options.port) as url:
        for script in scripts:
            rows.append(run(script, url.rstrip("/")))
            print(rows[-1][0], end="", flush=True)
    if options.write:
        write(options.write, "".join(row for row, _ in rows))
    return 0 if all(good for _, good in rows) else 1


def write(page: Path, rows: str) -> None:
    """The page keeps what stands before its table."""
    head = page.read_text().partition("<!-- table -->")[0]
    day = datetime.datetime.now(datetime.UTC).date()
    page.write_text(f"{head}<!-- table -->\n\nRun on {day}:\n\n{TITLE}{rows}")


if __name__ == "__main__":
    sys.exit(main())
