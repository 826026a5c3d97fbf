"""Runs the command line many times in forked children, killing some with SIGKILL at chosen system calls.

    python kill_driver.py < requests.jsonl > results.jsonl

A request is {"arguments": [...]} and may have
  "kill_at": n                    kill the child right before its n-th file operation of those that make a save (open
                                  for writing, fsync, rename, unlink, …), so that saves are hit in their middle;
  "torn": bytes                   with kill_at: don't kill it there, but in the middle of the next write that would make
                                  a file longer than this, whoever writes it;
  "kill_after": seconds           kill it so long after it was started;
  "signal": name                  send it that signal once training began;
  "signal_at": n                  send it not then, but from within, right before its n-th file operation;
  "file_limit": bytes             let no file grow larger, as if the disk were full;
  "processes": n                  train in so many processes, as torchrun would start them; all of the above happens to
                                  number "victim" (0). If they have not ended after "limit" (100) seconds, they are
                                  killed.
A result is {"status": exit status or minus the signal, "calls": ["operation path", …] (null if it was killed),
"seconds": s, "output": text, "others": [statuses of the other processes]}. Forking spares each run the seconds that
importing torch takes.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.figure  # noqa: F401  # imported before forking, as the next three
import torch

import topkapi.training.pretrain
import topkapi.training.run.report
import topkapi.training.tuning.finetune
from topkapi.service.commands.cli import main


def blank(figure: Any, path: Path) -> None:
    """Writes what stands for a picture, which takes longer to paint than the runs that are killed take."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")


topkapi.training.run.report.save = blank

CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir", "truncate", "chmod")


def child(request: dict[str, Any], counter: Path) -> NoReturn:
    """Run the command; never returns."""
    calls: list[str] = []

    def count(name: str, path: object) -> None:
        calls.append(f"{name} {path}")
        if len(calls) == request.get("signal_at"):
            os.kill(os.getpid(), signal.Signals[request["signal"]])
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
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
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
    victim = request.get("victim", 0)
    started = [start(request, output, counter, rank, rank == victim) for rank in range(request.get("processes", 1))]
    process = started.pop(victim)
    number = signal.Signals[request.get("signal", "SIGKILL")]

    ended = threading.Event()

    def send() -> None:
        # A handler can only be there once training began: earlier, Python's own would see the signal.
        while "signal" in request and b"step 0 " not in output.read_bytes() and not ended.wait(0.05):
            pass
        if not ended.wait(request.get("kill_after", 0.0)):
            os.kill(process, number)

    if ("signal" in request and "signal_at" not in request) or "kill_after" in request:
        threading.Thread(target=send, daemon=True).start()
    watch = threading.Timer(request.get("limit", 100.0), hang, [output, [process, *started]])
    if started:
        watch.start()
    _, status = os.waitpid(process, 0)
    ended.set()
    code = os.waitstatus_to_exitcode(status)
    calls = json.loads(counter.read_text()) if counter.exists() else None
    seconds = time.monotonic() - began
    others = [os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) for other in started]
    watch.cancel()
    said = output.read_text(errors="replace")
    return {"status": code, "calls": calls, "seconds": seconds, "output": said, "others": others}


def hang(output: Path, processes: list[int]) -> None:
    """End processes that wait for each other for ever."""
    with output.open("a") as file:
        file.write("kill_driver: the processes did not end, and were killed\n")
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass


def start(request: dict[str, Any], output: Path, counter: Path, rank: int, victim: bool) -> int:
    """Fork process number `rank` of the request, and return its id."""
    processes = request.get("processes", 1)
    process = os.fork()
    if process:
        return process
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if victim:
        child(request, counter)
    child({"arguments": request["arguments"]}, counter.with_name(f"calls-{rank}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    scratch = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), scratch)), flush=True)
