"""Runs the command line many times in forked children, killing some with SIGKILL at chosen system calls.

    python kill_driver.py < requests.jsonl > results.jsonl

A request is {"arguments": [...]} and may have
  "kill_at": n                    kill the child right before its n-th system call of those that make a save (fsync,
                                  rename, unlink, …), so that saves are hit in their middle;
  "signal": name, "signal_after": seconds    send it that signal, so long after training began;
  "file_limit": bytes             let no file grow larger, as if the disk were full.
A result is {"status": exit status or minus the signal, "calls": n, "output": text}. Forking spares each run the seconds
that importing torch takes.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.figure  # noqa: F401  # imported before forking, as the next three
import torch

import training.finetune
import training.pretrain
import training.report  # noqa: F401
from service.cli import main

CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir", "truncate")


def child(request: dict[str, Any], counter: Path) -> None:
    """Run the command; never returns."""
    calls = 0

    def counted(name: str) -> None:
        original = getattr(os, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == request.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, name, wrapper)

    for name in CALLS:
        counted(name)
    if request.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    code = 1
    try:
        code = main(request["arguments"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        counter.write_text(str(calls))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run one request in a child and tell how it ended."""
    output, counter = scratch / "output", scratch / "calls"
    counter.unlink(missing_ok=True)
    output.write_text("")
    process = os.fork()
    if process == 0:
        descriptor = os.open(output, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        child(request, counter)
    if request.get("signal_after") is not None:
        number = signal.Signals[request["signal"]]

        def send() -> None:
            # Not before training began: earlier, Python's own handlers would see the signal.
            waited = 0
            while b"step 0 " not in output.read_bytes() and waited < 600:
                time.sleep(0.05)
                waited += 1
            time.sleep(request["signal_after"])
            try:
                os.kill(process, number)
            except ProcessLookupError:
                pass

        threading.Thread(target=send, daemon=True).start()
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    calls = int(counter.read_text()) if counter.exists() else None
    return {"status": code, "calls": calls, "output": output.read_text(errors="replace")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    scratch = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), scratch)), flush=True)
