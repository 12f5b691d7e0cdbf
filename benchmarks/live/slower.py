"""Makes a process slower: it runs for a share of each period and is stopped for the rest (SIGSTOP, SIGCONT).

    python slower.py PID SHARE

A process of its own, so that nobody's work delays the signals. It ends with its parent, and lets PID run on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

PERIOD = 0.02  # seconds; about a step


def main() -> None:
    pid, share, parent = int(sys.argv[1]), float(sys.argv[2]), os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to its end
    try:
        while os.getppid() == parent:
            os.kill(pid, signal.SIGSTOP)
            time.sleep((1.0 - share) * PERIOD)
            os.kill(pid, signal.SIGCONT)
            time.sleep(share * PERIOD)
    except ProcessLookupError:
        return  # it has ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main()
