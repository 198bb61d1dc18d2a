"""The paper's tables: every row can be built, each is trained once, and any number of processes may share the work."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from safetensors.torch import load_file

from san.cli import main
from san.data import Batch, load_dataset, make_loader
from san.errors import UserError
from san.experiments import SCALES, TABLES, columns, reproduce
from san.experiments.campaign import Campaign, chosen, scale_of, shard_of
from san.experiments.report import write
from san.experiments.results import agreement, order
from san.models import build_model
from san.training.folder import RunFolder
from san.training.interruption import StopRequest
from tiny_run import make_images

TINY = {"epochs": 1, "batch_size": 12, "validation_share": 0.2, "accelerator": "cpu"}
ROWS = [(table, variant) for table, found in TABLES.items() for variant in found.variants]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("experiments") / "images")


@pytest.fixture(scope="module")
def position(images: Path) -> tuple[dict[str, Any], Path]:
    """The table `position`, two seeds, trained for an epoch."""
    out = images.parent / "position"
    return _position(images, out, seeds=2), out


def _position(images: Path, out: Path, **options: Any) -> dict[str, Any]:
    return reproduce("position", data=str(images), out=out, **{"settings": TINY, **options})


def _numbers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A table's rows without what a clock measured."""
    return [
        {key: {name: x for name, x in value.items() if name != "step_ms"} if isinstance(value, dict) else value}
        for row in result["rows"]
        for key, value in row.items()
    ]


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_of_every_table_is_a_network(scale: str) -> None:
    for _, variant in ROWS:
        name, options = variant.resolve(SCALES[scale])
        with torch.device("meta"):
            model = build_model(name, 10, options)
        assert sum(parameter.numel() for parameter in model.parameters()) > 1000


def test_rows_of_a_table_are_different_networks() -> None:
    for scale in SCALES.values():
        for table in TABLES.values():
            resolved = [variant.resolve(scale) for variant in table.variants]
            assert all(one not in resolved[:place] for place, one in enumerate(resolved))


def test_tables_share_what_they_have_in_common(tmp_path: Path) -> None:
    campaign = Campaign(SCALES["digits"], tmp_path, None, {})
    for table, label in {
        "relation": "pairwise, subtraction",
        "mapping": "pairwise, LRL",
        "transformation": "pairwise, different",
        "footprint": "pairwise, 5×5",
        "position": "relative",
        "scalar": "pairwise",
    }.items():
        (run,) = campaign.runs(chosen(table, [label]), 1)
        assert run.folder.path.name == "san4_pairwise-seed0", table


def test_footprint_changes_every_stage_but_the_first() -> None:
    (variant,) = chosen("footprint", ["patchwise, 9×9"])
    assert variant.resolve(SCALES["imagenet"]) == ("san10_patchwise", {"kernels": [3, 9, 9, 9, 9]})
    assert variant.resolve(SCALES["digits"]) == ("san4_patchwise", {"kernels": [3, 9, 9]})


def test_shards_are_a_partition() -> None:
    runs = Campaign(SCALES["digits"], Path(), None, {}).runs(TABLES["footprint"].variants, 3)
    parts = [shard_of(runs, f"{number}/4") for number in range(4)]
    assert sorted(run.folder.path.name for part in parts for run in part) == sorted(
        run.folder.path.name for run in runs
    )
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_table_tells_mean_and_deviation_of_its_runs(position: tuple[dict[str, Any], Path]) -> None:
    result, out = position
    assert result["complete"]
    for row in result["rows"]:
        top1 = []
        for name in row["runs"]:
            notes = json.loads((out / name / "checkpoints" / "test-last.json").read_text())
            confusion = np.array(notes["confusion"])
            top1.append(100 * np.diag(confusion).sum() / confusion.sum())
        assert row["seeds"] == [0, 1]
        assert row["means"]["top1"] == pytest.approx(np.mean(top1))
        assert row["deviations"]["top1"] == pytest.approx(np.std(top1, ddof=1))
    assert [row["top-1"].count("±") for row in columns(result)] == [1, 1, 1]
    for kind in ("md", "json", "png", "svg"):
        assert (out / f"position.{kind}").stat().st_size > 100
    # Every value stands in the chart. A vector file says as a comment what it writes.
    chart = (out / "position.svg").read_text()
    assert all(f"<!-- {row['top-1']} -->" in chart for row in columns(result))
    assert "standard deviation over seeds -->" in chart


@pytest.mark.parametrize(("best", "end", "tick"), [(99.6, max, 100), (2.0, min, 0)])
def test_a_chart_is_of_ten_percent_at_least_and_ends_at_0_and_100(
    position: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    best: float,
    end: Callable[[Any], float],
    tick: float,
) -> None:
    """Else trifles would look large: the scale of dots need not start at 0."""
    result, drawn = copy.deepcopy(position[0]), []
    values = best - 0.2, best - 0.1, best
    for row, top1 in zip(result["rows"], values, strict=True):
        row["means"]["top1"], row["deviations"]["top1"] = top1, None
    monkeypatch.setattr(pyplot, "close", drawn.append)
    write(result, tmp_path, "san reproduce position")
    assert drawn
    for figure in drawn:
        (axes,) = figure.axes
        assert np.ptp(axes.get_xlim()) > 10
        assert end(axes.get_xticks()) == tick
        assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in values]


def test_finished_runs_are_not_trained_again(position: tuple[dict[str, Any], Path], images: Path) -> None:
    result, out = position
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/model.safetensors")}
    assert len(before) == 6
    assert _numbers(_position(images, out, seeds=2)) == _numbers(result)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_are_refused(position: tuple[dict[str, Any], Path], images: Path) -> None:
    _, out = position
    with pytest.raises(UserError, match="was trained with epochs 1, not 2: choose another --out"):
        reproduce("position", data=str(images), out=out, shard="2/3", only=["none"], settings={**TINY, "epochs": 2})
    with pytest.raises(UserError, match="was trained with epochs 1, not 2: choose another --out"):
        reproduce("position", data=str(images), out=out, settings={**TINY, "epochs": 2})
    other = make_images(out.parent / "others")
    with pytest.raises(UserError, match="was trained with data images, not others"):
        _position(other, out)


def test_settings_that_are_not_given_again_are_not_forgotten(images: Path, tmp_path: Path) -> None:
    """A run that was begun with them is noticed before the others are trained."""
    *_, last = Campaign(SCALES["digits"], tmp_path, str(images), TINY).runs(TABLES["position"].variants, 1)
    last.folder.create({**last.settings, "image_size": 24})
    with pytest.raises(UserError, match="was trained with image_size 24, not the default: choose another --out"):
        _position(images, tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [last.folder.path.name]


def test_a_table_that_fails_does_not_stop_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What went wrong with all its runs is told once."""
    missing = str(tmp_path / "nowhere")
    assert main(["reproduce", "position", "scalar", "--data", missing, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "san: error: 6 runs failed, the first because " in error
    assert [path.name for path in tmp_path.glob("*.*")] == [], "a table of nothing is not written"
    told = [line for line in error.splitlines() if missing in line]
    assert [line.startswith("san: error") for line in told] == [False, False, True]


def test_what_fits_no_run_is_told_before_any_is_begun(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--epochs must be at least 1, not 0"):
        _position(images, tmp_path, settings={**TINY, "epochs": 0})
    assert not (tmp_path / "runs").exists()


def test_a_setting_that_failed_does_not_block_the_folder(images: Path, tmp_path: Path) -> None:
    """Of a run that never trained a step nothing is left, so it may be tried with other settings."""
    row = _position(images, tmp_path, only=["none"], settings={**TINY, "image_size": 1})["rows"][0]
    assert "poolings need at least" in row["failed"][0]
    assert list((tmp_path / "runs").iterdir()) == []


def test_images_to_rotate_are_asked_for_before_training(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "train", tmp_path / "untested" / "train")
    with pytest.raises(UserError, match="no test images"):
        reproduce("rotation", data=str(tmp_path / "untested"), out=tmp_path / "out", settings=TINY)
    assert not (tmp_path / "out" / "runs").exists()


def _copy(position: tuple[dict[str, Any], Path], place: Path) -> tuple[Path, Path]:
    """A campaign's copy, and the first run in it."""
    result, out = position
    shutil.copytree(out, place)
    return place, place / result["rows"][0]["runs"][0]


@pytest.mark.parametrize("file", ["metrics.csv", "checkpoints/test-last.json"])
def test_a_damaged_file_costs_its_row_alone(
    file: str, position: tuple[dict[str, Any], Path], images: Path, tmp_path: Path
) -> None:
    out, run = _copy(position, tmp_path / "copy")
    (run / file).write_bytes(b"\xff[]")
    first, *others = _position(images, out, seeds=2)["rows"]
    assert [row["seeds"] for row in (first, *others)] == [[1], [0, 1], [0, 1]]
    sentence = f"{run / file} is damaged: delete it and {run / 'report.md'}"
    assert sentence in first["failed"][0]
    assert f"- Failed: {first['label']}: {sentence}" in (out / "position.md").read_text()
    # What the sentence advises.
    (run / file).unlink()
    (run / "report.md").unlink()
    assert _numbers(_position(images, out, seeds=2)) == _numbers(position[0])


def test_settings_that_cannot_be_read_are_named(
    position: tuple[dict[str, Any], Path], images: Path, tmp_path: Path
) -> None:
    out, run = _copy(position, tmp_path / "copy")
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml is damaged: delete .* and train this run again"):
        _position(images, out, seeds=2)


def test_a_lost_model_is_made_again(position: tuple[dict[str, Any], Path], images: Path, tmp_path: Path) -> None:
    out, run = _copy(position, tmp_path / "copy")
    before = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    assert _numbers(_position(images, out, seeds=2)) == _numbers(position[0])
    after = load_file(run / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_page_says_which_images_its_numbers_are_of(
    position: tuple[dict[str, Any], Path], images: Path, tmp_path: Path
) -> None:
    out, run = _copy(position, tmp_path / "copy")
    assert "Percent of 24 test images, last epoch" in (out / "position.md").read_text()
    assert "same images, order" in (out / "position.md").read_text()
    (run / "checkpoints" / "test-last.json").unlink()
    assert _position(images, out, seeds=2)["rows"][0]["images"] == ["validation images", "24 test images"]
    page = (out / "position.md").read_text()
    assert "Rows do not compare: they were judged by different images, 24 test images and validation images." in page
    assert "same images" not in page


def test_several_devices_train_the_run_and_no_other(images: Path, tmp_path: Path) -> None:
    """Lightning starts the command again for each device, which must not take the campaign's next run."""
    result = _position(images, tmp_path, only=["relative", "none"], shard="0/2", settings={**TINY, "devices": 2})
    relative, none = result["rows"]
    assert relative["seeds"] == [0]
    assert RunFolder(tmp_path / relative["runs"][0]).settings()["devices"] == 2
    assert none["seeds"] == relative["failed"] == none["failed"] == []
    assert not (tmp_path / "runs" / "san4_pairwise-position-none-seed0").exists()


def test_a_run_on_several_devices_keeps_its_lock_and_stops_on_ctrl_c(images: Path, tmp_path: Path) -> None:
    """The lock lasts as long as the training, also where the campaign that began it was killed."""
    recipe = {"data": str(images), "out": str(tmp_path), "only": ["relative"], "settings": {**TINY, "devices": 2}}
    code = f"from san.experiments import reproduce; reproduce('position', **{recipe!r})"
    campaign = Campaign(SCALES["digits"], tmp_path, str(images), TINY)
    for number, ends in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert any("processes" in line or "epoch" in line or "training," in line for line in process.stderr)
        process.send_signal(number)
        assert process.wait(60) == ends
    with campaign.locked("san4_pairwise-seed0") as mine:
        assert mine is None
    with campaign.locked("san4_pairwise-seed0", wait=True):
        assert RunFolder(tmp_path / "runs" / "san4_pairwise-seed0").finished


def test_shards_together_give_the_table_of_one_process(
    position: tuple[dict[str, Any], Path], images: Path, tmp_path: Path
) -> None:
    first = _position(images, tmp_path, shard="0/2")
    assert not first["complete"]
    assert [row["seeds"] for row in first["rows"]] == [[0], [], [0]]
    second = _position(images, tmp_path, shard="1/2")
    assert second["complete"]
    whole = {row["label"]: row["runs"][0] for row in position[0]["rows"]}
    for row in second["rows"]:
        one = load_file(tmp_path / row["runs"][0] / "model.safetensors")
        other = load_file(position[1] / whole[row["label"]] / "model.safetensors")
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_stopped_campaign_says_how_all_of_it_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StopRequest, "listen", lambda self: setattr(self, "made", True))
    with pytest.raises(SystemExit) as stopped:
        _position(images, tmp_path)
    assert stopped.value.code == 130
    assert (
        capsys.readouterr().err.splitlines()[-1] == "san: the same command again goes on with this run and all others"
    )


def test_a_run_that_another_process_has_is_left_to_it(images: Path, tmp_path: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from san.experiments.campaign import Campaign;"
        "from san.experiments import SCALES\n"
        f"with Campaign(SCALES['digits'], Path({str(tmp_path)!r}), None, {{}}).locked('san4_pairwise-seed0') as mine:\n"
        "    print(mine is not None, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "True"
        result = _position(images, tmp_path, only=["relative"])
        assert result["busy"] == 1
        assert not result["complete"]
    finally:
        process.kill()
        process.wait()
    # A dead process holds nothing.
    assert _position(images, tmp_path, only=["relative"])["complete"]


def test_every_row_sees_the_same_images_in_the_same_order(images: Path) -> None:
    dataset = load_dataset(str(images), validation_share=0.2, seed=3)
    assert dataset.train is not None
    labels = []
    for _ in range(2):
        # What building networks of different sizes leaves behind in PyTorch's generator must not matter.
        torch.rand(len(labels) * 100 + 1)
        loader = make_loader(dataset.train, dataset.preprocessing, batch_size=12, training=True, seed=3)
        labels.append(torch.cat([batch.images.sum((1, 2, 3)) for batch in loader]))
    assert torch.equal(labels[0], labels[1])


def test_rotation_and_attack_are_measured_on_the_trained_networks(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the images have moved, and where another process holds the run for a while."""
    places = [tmp_path / place / "images" for place in ("first", "second")]
    shutil.copytree(images, places[0])
    options: dict[str, Any] = {"out": tmp_path / "out", "only": ["ResNet26"], "settings": TINY}
    shown = []

    def progress(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
        shown.append(what)
        return batches

    rotation = reproduce("rotation", data=str(places[0]), **options, progress=progress)
    places[0].parent.rename(places[1].parent)
    campaign = Campaign(SCALES["digits"], tmp_path / "out", str(places[1]), TINY)
    with ThreadPoolExecutor(1) as others:
        with campaign.locked(Path(rotation["rows"][0]["runs"][0]).name):
            attacked = others.submit(reproduce, "pgd", data=str(places[1]), **options)
            assert wait([attacked], timeout=3).not_done
            assert "waiting for the process that measures baseline_resnet26" in capsys.readouterr().err
        attack = attacked.result()
    assert attack["complete"]
    assert shown[0] == "ResNet26, seed 0: rotation"
    assert rotation["rows"][0]["runs"] == attack["rows"][0]["runs"]
    assert rotation["rows"][0]["means"]["0°"] == pytest.approx(attack["rows"][0]["means"]["top1"])
    assert attack["rows"][0]["means"]["untargeted top1 4"] <= attack["rows"][0]["means"]["untargeted top1 0"]
    assert "targeted 4: success" in columns(attack)[0]
    assert "within L∞ ≤ 0.0314" in (tmp_path / "out" / "pgd.md").read_text()
    assert attack["attack"]["step"] == 2 / 255
    assert "upside-down" in columns(rotation)[0]


def test_the_order_is_compared_with_the_reported_one() -> None:
    tops = {"ResNet26": 70.0, "SAN10 pairwise": 69.0, "SAN10 patchwise": 75.0}
    rows = [{"label": label, "means": {"top1": top1}} for label, top1 in tops.items()]
    result = {"table": "main", "rows": rows}
    assert order(result) == ["SAN10 patchwise", "ResNet26", "SAN10 pairwise"]
    assert agreement(result) == (["SAN10 patchwise", "SAN10 pairwise", "ResNet26"], 2, 3)
    assert agreement({**result, "table": "relation"}) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "TABLES is missing"),
        (["relation", "scalr"], "table 'scalr' is unknown"),
        (["relations"], "table 'relations' is unknown; choose among: main, "),
        (["relation", "--scale", "mnist"], "scale 'mnist' is unknown"),
        (["relation", "--seeds", "0"], "the number of seeds is 0"),
        (["relation", "--only", "dot"], "table relation has no row 'dot'; its rows are: pairwise, subtraction; "),
        (["relation", "--shard", "2/2"], "--shard must be i/n"),
        (["relation", "--base", "resnet"], "base network 'resnet' is unknown"),
        (["main", "--scale", "imagenet"], "give --data WHERE"),
        (["relation", "--workers", "-1"], "--workers must be 0 or more, not -1"),
    ],
)
def test_mistakes_end_in_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("san: error: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_a_shard_without_work_says_so(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["position", "--only", "relative", "--shard", "1/2", "--data", str(images), "--out", str(tmp_path)]
    assert main(["reproduce", *words]) == 0
    assert "\nnot complete: what is missing belongs to other shards\n" in capsys.readouterr().out


def test_the_list_explains_every_table_and_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}: " in text for name in (*TABLES, *SCALES))
    assert main(["reproduce", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"].keys() == TABLES.keys()


def test_scales_can_be_given_another_base() -> None:
    assert scale_of("tinyimagenet", "san4").base == "san4"
    (variant,) = chosen("main", ["ResNet26"])
    assert variant.resolve(scale_of("tinyimagenet", small_images=True))[1] == {"small_images": True}


@pytest.mark.long
def test_killed_at_any_moment_the_table_is_the_same(
    position: tuple[dict[str, Any], Path], images: Path, tmp_path: Path
) -> None:
    recipe = {"data": str(images), "out": str(tmp_path), "seeds": 2, "settings": TINY}
    code = f"from san.experiments import reproduce; reproduce('position', **{recipe!r})"
    random = np.random.default_rng(time.time_ns())
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        try:
            process.wait(float(random.uniform(4, 14)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = _position(images, tmp_path, seeds=2)
    assert result["complete"]
    assert [row["means"]["top1"] for row in result["rows"]] == [row["means"]["top1"] for row in position[0]["rows"]]
