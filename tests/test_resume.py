"""An interrupted run, however it ended, goes on to the result of the uninterrupted one, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from san.errors import UserError
from san.training import conclusion, train
from san.training.interruption import Interrupted, StopRequest
from tiny_run import VARIED, assert_same_result, command, make_images, recipe, rows, settings, start

# Save behind every step, so that little is repeated and every kind of moment comes up.
OFTEN = {"checkpoint_minutes": 0.0}


class Death(BaseException):
    """The process ends here, as far as the run can tell."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The run that nobody interrupted."""
    return train(**settings(images, **VARIED), out=str(tmp_path_factory.mktemp("runs") / "whole"))


@pytest.fixture
def mortal(monkeypatch):
    """Let the process die when it gives the nth file its final name; the function returns how many it had named."""
    named = 0
    rename = Path.replace

    def die_at(moment: int | None) -> int:
        nonlocal named
        before, named = named, 0

        def replace(self, target):
            nonlocal named
            named += 1
            if named == moment:
                raise Death
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        return before

    return die_at


def test_run_that_dies_at_any_write_of_a_file_goes_on_to_the_same_result(whole, images, tmp_path, monkeypatch, mortal):
    monkeypatch.setattr(conclusion, "PART", 10)
    mortal(None)
    assert_same_result(whole, train(**settings(images, **VARIED, **OFTEN), out=str(tmp_path / "often")))
    writes = mortal(None)
    assert writes > 25
    out = tmp_path / "dying"
    for moment in range(2, writes + 1, 3):
        shutil.rmtree(out, ignore_errors=True)
        mortal(moment)
        with pytest.raises(Death):
            train(**settings(images, **VARIED, **OFTEN), out=str(out))
        mortal(None)
        assert_same_result(whole, train(resume=str(out)))


def test_run_that_dies_again_and_again_goes_on_to_the_same_result(whole, images, tmp_path, mortal):
    out, given = str(tmp_path / "run"), settings(images, **VARIED, **OFTEN)
    for moment in (6, 3, 4, 7, 5, None):
        mortal(moment)
        try:
            train(**given, out=out)
        except Death:
            given, out = {"resume": str(tmp_path / "run")}, None
    assert_same_result(whole, tmp_path / "run")


def _wait_for(path: Path, process) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_kill_9_and_resume_on_the_command_line(whole, images, tmp_path):
    out = tmp_path / "run"
    config = recipe(tmp_path / "recipe.yaml", settings(images, **VARIED, **OFTEN))
    process = start(command("--config", str(config), "--out", str(out)))
    _wait_for(out / "checkpoints" / "last.ckpt", process)
    process.kill()
    process.wait()
    assert not (out / "report.md").exists()
    done = start(command("--resume", str(out)))
    assert done.wait() == 0
    assert_same_result(whole, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(images, tmp_path, number):
    out = tmp_path / "run"
    given = settings(images, **VARIED, epochs=500)
    process = start(command("--config", str(recipe(tmp_path / "recipe.yaml", given)), "--out", str(out)))
    _wait_for(out / "metrics.csv", process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip() == f"san: stopped; go on with: san train --resume {out}"
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["callbacks"]["Journal"]["rows"]


def test_stopping_and_going_on_changes_nothing(whole, images, tmp_path, monkeypatch):
    """Stop at the end of every step, in the validation as well, until the run is through."""
    monkeypatch.setattr(StopRequest, "listen", lambda self: setattr(self, "made", True))
    out, given = str(tmp_path / "run"), settings(images, **VARIED)
    stops = 0
    while not (tmp_path / "run" / "report.md").exists():
        with suppress(SystemExit):
            train(**given, out=out)
        stops += 1
        given, out = {"resume": str(tmp_path / "run")}, None
    assert stops > 8
    assert_same_result(whole, tmp_path / "run")


def test_second_signal_does_not_wait():
    with StopRequest() as stop:
        stop.patient = True
        signal.raise_signal(signal.SIGINT)
        assert stop.made
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_finished_run_says_so(whole, capsys):
    before = (whole / "model.safetensors").stat().st_mtime_ns
    train(resume=str(whole))
    assert "finished already" in capsys.readouterr().out
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


def test_continued_run_keeps_its_settings_but_may_change_the_machine(whole, images, tmp_path, mortal):
    out = tmp_path / "run"
    mortal(12)
    with pytest.raises(Death):
        train(**settings(images, **VARIED, **OFTEN), out=str(out))
    mortal(None)
    with pytest.raises(UserError, match=r"keeps its settings, and that of .* has epochs 2: leave --epochs 3 away"):
        train(resume=str(out), epochs=3)
    assert_same_result(whole, train(resume=str(out), workers=1, epochs=2))


def test_checkpoint_that_would_run_code_is_refused(whole, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "report.md").unlink()
    torch.save({"state_dict": Code()}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged or foreign"):
        train(resume=str(run))
    assert not (tmp_path / "ran").exists()


@pytest.mark.long
def test_ten_kills_at_random_moments(images, tmp_path):
    moments = random.Random(0)
    given = settings(images, **VARIED, epochs=30, checkpoint_minutes=0.002)
    whole = tmp_path / "whole"
    config = str(recipe(tmp_path / "recipe.yaml", given))
    begun = time.monotonic()
    assert start(command("--config", config, "--out", str(whole))).wait() == 0
    seconds = time.monotonic() - begun
    for number in range(10):
        out = tmp_path / f"killed-{number}"
        process = start(command("--config", config, "--out", str(out)))
        time.sleep(moments.uniform(0.2, 1) * seconds)
        process.kill()
        process.wait()
        words = ["--resume", str(out)] if (out / "config.yaml").exists() else ["--config", config, "--out", str(out)]
        assert start(command(*words)).wait() == 0
        assert_same_result(whole, out)
        assert [int(row["epoch"]) for row in rows(out)] == list(range(1, 31))
        assert yaml.safe_load((out / "config.yaml").read_text())["epochs"] == 30
