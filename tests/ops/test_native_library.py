"""The library of C++ kernels: found or announced as absent, forced to an instruction set, safe in forked children."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from san.errors import UserError
from san.ops.kernels.native import library

REQUIRED = os.environ.get("SAN_REQUIRE_NATIVE", "") not in ("", "0")
FOUND = library.load()
BUILT = pytest.mark.skipif(FOUND is None, reason="the library is not built here")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, because each decides once."""
    preamble = "from san.ops.kernels import native\nfrom san.ops.kernels.native import library\n"
    done = subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not REQUIRED, reason="SAN_REQUIRE_NATIVE is not set")
def test_native_is_built():
    assert FOUND is not None, library._open()[1]


ABSENT = """
import warnings
native.__path__ = [r'{folder}']
warnings.simplefilter('always')
for _ in range(2):
    assert library.load() is None
    library.announce_absence()
"""


@pytest.mark.parametrize(("content", "reason"), [(None, "was installed without them"), (b"", "they do not load")])
def test_absence_is_announced_once(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "libsan_native.so").write_bytes(content)
    done = _run(ABSENT.format(folder=tmp_path))
    assert done.stderr.count("attention runs on the portable backend") == 1
    assert done.stderr.count(reason) == 1


def test_a_chosen_library_must_be_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SAN_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(UserError, match="which is no file"):
        library._open.__wrapped__()


def _load(monkeypatch: pytest.MonkeyPatch, forced: str) -> library.Library | None:
    """What `load` decides anew, with an instruction set forced."""
    monkeypatch.setenv("SAN_INSTRUCTION_SET", forced)
    return library.load.__wrapped__()


def test_unknown_instruction_set_is_refused(monkeypatch):
    with pytest.raises(UserError, match="'v9'; choose one of: v4, v3, v2, plain"):
        _load(monkeypatch, "v9")


@BUILT
def test_instruction_sets_of_other_machines_are_refused(monkeypatch):
    foreign = "v2" if FOUND.instruction_set == "plain" else "plain"
    with pytest.raises(UserError, match=f"'{foreign}', which cannot run here"):
        _load(monkeypatch, foreign)


@BUILT
def test_every_instruction_set_of_this_machine_can_be_forced(monkeypatch):
    for name in library._RUNS[library._best(library._open()[0])]:
        found = _load(monkeypatch, name)
        assert found is not None
        assert found.instruction_set == name


@pytest.mark.parametrize(("code", "kind"), [(1, UserError), (2, RuntimeError), (3, RuntimeError)])
def test_codes_become_sentences(code, kind):
    with pytest.raises(kind, match="aggregation"):
        raise library.failure("aggregation", code)


CHILD = """
import os, signal, torch
from san import ops
from san.ops.kernels.native import operators
operators.GRAIN = 1
torch.set_num_threads(2)
value, weight = torch.randn(1, 512, 16, 16), torch.randn(1, 2, 9, 256)
{first}
child = os.fork()
if child == 0:
    signal.alarm(60)
    with ops.use_backend("native" if library.load() else "auto"):
        y = ops.aggregation(value, weight, kernel_size=3) if library.load() else value
    # Few values, because torch's own threads are lost as well.
    os._exit(10 * library.threads() + int(not y[0, 0, 0].isfinite().all()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), library.threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("first", ["ops.aggregation(value, weight, kernel_size=3)", "value.relu()"])
def test_forked_children_use_one_thread(first):
    """Whoever started the parent's threads, SAN or torch: the child gives the parent's result and does not hang."""
    assert _run(CHILD.format(first=first)).stdout.split() == ["10", "2"]
