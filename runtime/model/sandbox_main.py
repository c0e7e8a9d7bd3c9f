"""The program of a sandbox: it imports nothing of ours but the worker, which does what is asked of it.

Nothing that a foreign text can be made to cost is bounded by the libraries that read it. So the kernel bounds it: it
refuses memory beyond the limit, and ends the process when one question has used up its processor time, or nests so
deeply that the stack ends.

    sandbox_main.py WORKER MAX_MEMORY_BYTES MAX_PROCESSOR_S

One JSON object a line comes in. The worker's ``answer(question)`` is called with it, and returns {"text"} or {"error"},
which goes out as a line.
"""

from __future__ import annotations

import json
import resource
import runpy
import signal
import sys
import threading

# Whoever reads a text that was accepted here has more: 2 MiB is the least that Linux gives a thread.
_STACK_BYTES = 1 << 20


def main(worker: str, max_memory_bytes: int, max_processor_s: float) -> None:
    answer = runpy.run_path(worker)["answer"]
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, max_processor_s)  # its signal, SIGPROF, ends the process
        told = json.dumps(answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(told + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    reader = threading.Thread(target=main, args=(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
    reader.start()
    reader.join()
