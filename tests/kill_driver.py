"""Runs the command line many times in forked children, killing some with SIGKILL at chosen system calls.

    python kill_driver.py < requests.jsonl > results.jsonl

A request is {"arguments": [...]} and may have
  "kill_at": n                    kill the child right before its n-th file operation of those that make a save (open
                                  for writing, fsync, rename, unlink, …), so that saves are hit in their middle;
  "torn": bytes                   with kill_at: don't kill it there, but in the middle of the next write that would make
                                  a file longer than this, whoever writes it;
  "kill_after": seconds           kill it so long after it was started;
  "signal": name, "signal_after": seconds    send it that signal, so long after training began;
  "file_limit": bytes             let no file grow larger, as if the disk were full.
A result is {"status": exit status or minus the signal, "calls": ["operation path", …] (null if it was killed),
"seconds": s, "output": text}. Forking spares each run the seconds that importing torch takes.
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

CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir", "truncate", "chmod")


def child(request: dict[str, Any], counter: Path) -> None:
    """Run the command; never returns."""
    calls: list[str] = []

    def count(name: str, path: object) -> None:
        calls.append(f"{name} {path}")
        if len(calls) != request.get("kill_at"):
            return
        if request.get("torn") is None:
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["torn"], resource.RLIM_INFINITY))

    def counted(name: str) -> None:
        original = getattr(os, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            count(name, arguments[0])
            return original(*arguments, **options)

        setattr(os, name, wrapper)

    for name in CALLS:
        counted(name)

    def opened(event: str, arguments: Any) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            count("open", arguments[0])

    sys.addaudithook(opened)
    if request.get("torn") is not None:
        # Past the limit a write is cut short, and the next one is the process's last act.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if request.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    code = 1
    try:
        code = main(request["arguments"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        counter.write_text(json.dumps(calls))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run one request in a child and tell how it ended."""
    output, counter = scratch / "output", scratch / "calls"
    counter.unlink(missing_ok=True)
    output.write_text("")
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        descriptor = os.open(output, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        child(request, counter)
    number = signal.Signals[request.get("signal", "SIGKILL")]

    ended = threading.Event()

    def send() -> None:
        # A handler can only be there once training began: earlier, Python's own would see the signal.
        while number != signal.SIGKILL and b"step 0 " not in output.read_bytes() and not ended.wait(0.05):
            pass
        if not ended.wait(request.get("kill_after", 0.0) + request.get("signal_after", 0.0)):
            os.kill(process, number)

    if "signal" in request or "kill_after" in request:
        threading.Thread(target=send, daemon=True).start()
    _, status = os.waitpid(process, 0)
    ended.set()
    code = os.waitstatus_to_exitcode(status)
    calls = json.loads(counter.read_text()) if counter.exists() else None
    seconds = time.monotonic() - began
    return {"status": code, "calls": calls, "seconds": seconds, "output": output.read_text(errors="replace")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    scratch = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), scratch)), flush=True)
