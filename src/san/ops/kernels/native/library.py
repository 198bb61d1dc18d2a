"""Loads the library of C++ kernels through ctypes, once, when it is first asked for.

`load` returns None where no library runs: SAN was installed without a compiler, or for another machine. Nothing fails
then; `announce_absence` tells the user. In an editable install the library is compiled again first if one of its
sources is newer: here, and not when `san` is imported, so that imports stay free of cost and of output. The environment
variable SAN_NATIVE_LIBRARY names another build of the library to load as it is, for instance that of `make sanitize`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import subprocess
import warnings
from functools import cache
from pathlib import Path
from typing import Any

# torch goes first: the library then shares the OpenMP runtime that torch brings, and its threads.
import torch

from san.errors import UserError
from san.ops.kernels import native

__all__ = ["Library", "announce_absence", "failure", "load", "threads"]

_FILE = "libsan_native.so"
# The kernels take no more.
_MOST_THREADS = 1024
# The versions that a processor runs, by the best of them.
_RUNS = {"v4": ("v4", "v3", "v2"), "v3": ("v3", "v2"), "v2": ("v2",), "plain": ("plain",)}


class Library:
    """The kernels, each in its version for one instruction set."""

    def __init__(self, binary: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._binary = binary
        self._functions: dict[str, Any] = {}
        # Addresses and lengths of tables; see sequence.cpp.
        self.run_sequence = binary.san_run_sequence
        self.run_sequence.argtypes = [*[ctypes.c_void_p, ctypes.c_int64] * 3, ctypes.c_void_p]
        self.run_sequence.restype = ctypes.c_int64

    def call(self, name: str, *arguments: int) -> None:
        """Run kernel `name` on addresses and sizes. Other Python threads run meanwhile.

        The caller keeps the tensors behind the addresses alive. Raises `UserError` if the kernel finds that the sizes
        do not fit one another, `RuntimeError` if it finds no memory.
        """
        function = self._functions.get(name) or self._find(name)
        count = len(arguments)
        # A third of the time that an array of ctypes.c_int64 takes to fill.
        code = function(struct.pack(f"{count}q", *arguments), count)
        if code:
            raise failure(name, code)

    def address(self, name: str) -> int:
        """Where kernel `name` begins, for `run_sequence`."""
        return ctypes.cast(self._functions.get(name) or self._find(name), ctypes.c_void_p).value or 0

    def native_bytes(self) -> int:
        """Memory that the kernels hold for working in, bytes; they keep it from one call to the next."""
        self._binary.san_native_bytes.restype = ctypes.c_int64
        return self._binary.san_native_bytes()

    def release_memory(self) -> None:
        """Give back what no call is working in."""
        self._binary.san_release_memory()

    def _find(self, name: str) -> Any:
        function = self._binary[f"san_{name}_{self.instruction_set}"]
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        function.restype = ctypes.c_int
        self._functions[name] = function
        return function


def failure(name: str, code: int) -> Exception:
    """The exception that a kernel's code stands for."""
    if code == 1:
        return UserError(f"the sizes of the arguments of {name} do not fit one another")
    if code == 2:
        return RuntimeError(f"out of memory in the C++ kernel of {name}")
    return RuntimeError(f"the C++ kernel of {name} failed with code {code}")


@cache
def load() -> Library | None:
    """The library in its best version for this processor, or in that of `SAN_INSTRUCTION_SET`; None without one."""
    forced = os.environ.get("SAN_INSTRUCTION_SET")
    if forced and forced not in _RUNS:
        raise UserError(f"SAN_INSTRUCTION_SET is {forced!r}; choose one of: {', '.join(_RUNS)}")
    binary, _ = _open()
    if binary is None:
        return None
    runs = _RUNS[_best(binary)]
    if forced and forced not in runs:
        raise UserError(f"SAN_INSTRUCTION_SET is {forced!r}, which cannot run here; choose one of: {', '.join(runs)}")
    return Library(binary, forced or runs[0])


@cache
def announce_absence() -> None:
    """Warn once in a process, in one sentence, that the portable backend runs, and how to get the C++ kernels."""
    binary, reason = _open()
    if binary is None:
        warnings.warn(f"attention runs on the portable backend, slower than the C++ kernels: {reason}", stacklevel=2)


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or the reason why there is none."""
    chosen = os.environ.get("SAN_NATIVE_LIBRARY")
    paths = [Path(chosen)] if chosen else [Path(folder) / _FILE for folder in native.__path__]
    paths = [path for path in paths if path.is_file()]
    if not paths and chosen:
        raise UserError(f"SAN_NATIVE_LIBRARY is {chosen!r}, which is no file")
    if not paths:
        return None, "SAN was installed without them; to have them, install it again where GCC or Clang is present"
    try:
        if not chosen:
            _refresh(paths[0])
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"their sources have changed, and compiling them failed ({error}); install SAN again to see why"
    try:
        binary = ctypes.CDLL(str(paths[0]))
    except OSError as error:
        return None, f"they do not load ({error}); install SAN again on this machine"
    if _best(binary) not in _RUNS:
        return None, "they need a processor with SSE4.2"
    return binary, ""


def _best(binary: ctypes.CDLL) -> str:
    binary.san_instruction_set.restype = ctypes.c_char_p
    return binary.san_instruction_set().decode()


def _refresh(library: Path) -> None:
    """Compile an editable install's library again if a source is newer; scikit-build-core marks such installs."""
    rebuild = getattr(native.__loader__, "rebuild", None)
    if rebuild is None or not _stale(library):
        return
    import fcntl

    # Of several processes the first compiles; the others wait and find nothing left to do.
    with (Path(native.__file__).parent / "CMakeLists.txt").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _stale(library):
            logging.getLogger(__name__).warning("the C++ sources have changed; compiling them again")
            rebuild()


def _stale(library: Path) -> bool:
    kernels = Path(native.__file__).parents[1]
    sources = [path for pattern in ("*.cpp", "*.h", "CMakeLists.txt") for path in kernels.glob(f"*/{pattern}")]
    return max(path.stat().st_mtime for path in sources) > library.stat().st_mtime


class _Team:
    """Whether OpenMP's threads were lost: they do not survive a fork, and a child that waits for its parent's hangs."""

    lost = False

    @classmethod
    def forked(cls) -> None:
        # Torch may have started them even where no kernel here did.
        cls.lost = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Team.forked)


def threads() -> int:
    """How many threads a kernel may use: torch's number, but one in a forked child."""
    return 1 if _Team.lost else min(torch.get_num_threads(), _MOST_THREADS)
