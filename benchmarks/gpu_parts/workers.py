"""Jobs in several processes that share the GPU, before anything is timed.

Most of a check's time is compiling kernels on one core; and a kernel that reads where it must not takes its process'
CUDA context with it, which must not be the one that times. A process that dies or hangs is replaced, and its job
failed. What they compile lies in Triton's and Inductor's caches on disk, where the timing process finds it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu_parts.clock import free, one_sentence

__all__ = ["Job", "Outcome", "run"]

# Of the device's memory, what all of them may use together.
_SHARE = 0.85


@dataclass(frozen=True)
class Job:
    """Something to call in another process: both it and what it gives can be sent there. Not begun after `deadline`,
    of `time.monotonic`."""

    name: str
    call: Callable[[], Any]
    deadline: float


@dataclass(frozen=True)
class Outcome:
    """What a job gave, or one sentence about how it failed; `skipped` if it was not begun."""

    name: str
    value: Any = None
    error: str | None = None
    skipped: bool = False


def run(
    jobs: Sequence[Job], processes: int, device: str, patience: float, say: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run jobs in their order, each at most `patience` seconds; with no processes, in this one, one after the other."""
    waiting, outcomes = deque(jobs), []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        say(outcome)

    processes = min(processes, len(jobs))
    if processes:
        work = partial(_tend, waiting, device, processes, patience, note)
        threads = [threading.Thread(target=work, daemon=True) for _ in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    while waiting:
        job = waiting.popleft()
        late = time.monotonic() > job.deadline
        note(Outcome(job.name, skipped=True) if late else _outcome(job.name, _attempt(job.call, device)))
    return outcomes


def _outcome(name: str, reply: dict[str, Any]) -> Outcome:
    return Outcome(name, reply.get("value"), reply.get("error"))


def _attempt(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """What the call gives, or its problem; `broken` if the device answers to nothing any more."""
    try:
        reply = {"value": call()}
    except Exception as problem:
        reply = {"error": one_sentence(problem)}
    try:
        free(device)
    except RuntimeError as problem:
        reply |= {"error": reply.get("error") or one_sentence(problem), "broken": True}
    return reply


def _serve(connection: Any, device: str, share: float, threads: int) -> None:
    """A process' life: jobs come, replies go, until there is nothing more or the device is lost."""
    import torch
    import torch._inductor.config

    torch._inductor.config.compile_threads = threads
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(share)
    with suppress(EOFError, KeyboardInterrupt):
        while (call := connection.recv()) is not None:
            reply = _attempt(call, device)
            connection.send(reply)
            if reply.get("broken"):
                return


class _Process:
    """A process and the line to it."""

    def __init__(self, device: str, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        arguments = (theirs, device, _SHARE / processes, threads)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, call: Callable[[], Any], patience: float) -> dict[str, Any]:
        """Its reply; `broken` if the process is of no more use."""
        try:
            self.connection.send(call)
            if not self.connection.poll(patience):
                return {"error": f"took longer than {patience:.0f} s", "broken": True}
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return {"error": f"its process died (exit code {self.process.exitcode})", "broken": True}

    def end(self) -> None:
        """Let it go, at once if need be."""
        with suppress(OSError):
            self.connection.send(None)
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _tend(waiting: deque[Job], device: str, processes: int, patience: float, note: Callable[[Outcome], None]) -> None:
    """Keep one process busy."""
    process = None
    while True:
        try:
            job = waiting.popleft()
        except IndexError:
            break
        if time.monotonic() > job.deadline:
            note(Outcome(job.name, skipped=True))
            continue
        process = process or _Process(device, processes)
        # The one that begins last must not hold up what comes after all.
        reply = process.ask(job.call, max(5.0, min(patience, job.deadline + patience / 4 - time.monotonic())))
        note(_outcome(job.name, reply))
        if reply.get("broken"):
            process.end()
            process = None
    if process is not None:
        process.end()
