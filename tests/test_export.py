"""Exported networks: they agree with PyTorch, say how to use them, run without torch, and are refused where wrong."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

import san
from san.checkpoints import load_model, save_model
from san.cli import main
from san.data import ImageFiles, transform
from san.errors import UserError
from san.export import Agreement, Description, OnnxModel, export_model
from san.export.formats import EXTRA_FILE, FORMATS
from san.export.preparation import prepare

SIDE, NAMES = 16, ["ant", "bee", "cat"]
SMALL = {"blocks": (0, 1), "widths": (16, 32), "kernels": (3, 3), "pools": (True, True)}


def _model(name: str = "san4_pairwise", **options: Any) -> nn.Module:
    """A small network whose BatchNorm has seen images, so that its scores vary."""
    torch.manual_seed(0)
    model: Any = san.create_model(name, len(NAMES), **SMALL, **options)
    model.pretrained_cfg.update(input_size=(3, SIDE, SIDE), label_names=NAMES, crop_pct=0.875)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(16, 3, SIDE, SIDE))
    return model.eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of every kind that the wild has, each of another size."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)

    def picture(width: int, height: int) -> Image.Image:
        coarse = Image.fromarray(noise.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC)

    picture(61, 37).save(folder / "odd.png")
    picture(38, 90).convert("L").save(folder / "grey.png")
    picture(33, 33).convert("P").save(folder / "palette.png")
    picture(70, 50).convert("CMYK").save(folder / "cmyk.jpg")
    picture(45, 30).convert("RGBA").save(folder / "transparent.png")
    Image.fromarray(noise.integers(0, 65536, (29, 41), dtype=np.uint16)).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(80, 44).save(folder / "turned.jpg", exif=turned)
    picture(200, 9).save(folder / "line.png")
    picture(5, 7).save(folder / "tiny.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(_model(), path)
    return path


@pytest.fixture(scope="module")
def told(checkpoint, photos) -> str:
    """What `san export` says when it writes the checkpoint as ONNX, beside it."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(["export", str(checkpoint), "--check", str(photos)]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(told, checkpoint) -> Path:
    """The checkpoint as ONNX."""
    return checkpoint.with_suffix(".onnx")


@pytest.fixture(scope="module")
def program(checkpoint) -> Path:
    """The checkpoint as a torch.export file."""
    path = checkpoint.with_suffix(".pt2")
    export_model(load_model(checkpoint), path, "torch-export")
    return path


@pytest.fixture
def run(capsys):
    """Run a command line in this process; gives (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


# Images


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_images_are_prepared_as_timm_prepares_them(photos, crop_mode, interpolation):
    for size in ((3, 28, 28), (3, 24, 37)):
        data: dict[str, Any] = {"input_size": size, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
        data |= {"interpolation": interpolation, "crop_mode": crop_mode, "crop_pct": 0.875}
        by_timm, description = transform(data, training=False), Description("a", ("b",), **data)
        files = ImageFiles(sorted(photos.iterdir()))
        for index in range(len(files)):
            image = files.load(index)
            found = prepare(image, description)
            assert found.dtype == np.float32
            assert found.flags.c_contiguous
            np.testing.assert_allclose(found, by_timm(image).numpy(), rtol=0, atol=1e-6, err_msg=files.names(index))


def test_what_is_thinner_than_a_pixel_stays_one():
    """timm refuses such images."""
    description = Description("a", ("b",), (3, 8, 8), (0.5, 0.5, 0.5), (1, 1, 1), "bilinear", 1.0, "border")
    found = prepare(Image.new("RGB", (200, 2), "white"), description)
    rows = found.mean((0, 2))
    assert rows.tolist().count(0.5) == 1
    np.testing.assert_allclose(np.delete(rows, rows.argmax()), 0, atol=1 / 255)


# Agreement with PyTorch


def _loaded(path: Path, format: str) -> Any:
    """A file in use as its readers use it, without this package."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])
    return torch.export.load(path).module()


def _assert_same_scores(network: Any, model: nn.Module, side: int) -> None:
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(network(images), model(images), rtol=0, atol=1e-5)


def test_scores_are_those_of_pytorch_for_any_batch(checkpoint, exported, program):
    model = load_model(checkpoint)
    _assert_same_scores(_loaded(exported, "onnx"), model, SIDE)
    _assert_same_scores(_loaded(program, "torch-export"), model, SIDE)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_patchwise_network_at_another_size(tmp_path, format):
    model, path = _model("san4_patchwise", border="zeros", dilation=2), tmp_path / f"model{FORMATS[format].suffix}"
    result = export_model(model, path, format, input_size=20)
    assert result.description.input_size == (3, 20, 20)
    assert result.agreement.images == result.agreement.same_top1 == 64
    assert result.agreement.max_error < 1e-5
    _assert_same_scores(_loaded(path, format), model, 20)


def test_the_model_stays_as_it_was(tmp_path):
    model: Any = _model().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    export_model(model, tmp_path / "model.safetensors", "safetensors", input_size=24)
    assert model.training
    assert model.pretrained_cfg["input_size"] == (3, SIDE, SIDE)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("max_error", "same_top1", "holds"),
    [(9e-4, 5, True), (1.1e-3, 5, False), (0.0, 4, False), (float("nan"), 5, False)],
)
def test_what_agreement_means(max_error, same_top1, holds):
    """The largest score is 10, so scores may differ by 0.001."""
    assert Agreement(5, max_error, 10.0, same_top1, 0.5).holds is holds


def test_what_differs_from_pytorch_is_not_written(tmp_path):
    model: Any = _model()
    # No file holds what a hook does.
    model.fc.register_forward_hook(lambda layer, given, scores: scores + 1)
    with pytest.raises(UserError, match=r"by up to 1 where 0.0001\d* is allowed.* 64 of 64 images; .* was not written"):
        export_model(model, tmp_path / "model.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


def test_one_class_has_no_margin_and_its_report_is_json(tmp_path):
    model: Any = san.create_model("san4_pairwise", 1, **SMALL)
    model.pretrained_cfg.update(input_size=(3, SIDE, SIDE), label_names=["ant"])
    told = export_model(model, tmp_path / "model.safetensors", "safetensors").as_dict()
    assert json.loads(json.dumps(told, allow_nan=False))["check"]["smallest_margin"] is None


def test_scores_that_are_no_numbers_are_not_written(run, tmp_path):
    model: Any = _model()
    nn.init.constant_(model.fc.bias, float("nan"))
    source, target = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    save_model(model, source)
    target.write_text("an earlier export")
    code, out, err = run("export", source, "--format", "safetensors", "--out", target, "--overwrite")
    assert (code, out) == (2, "")
    assert "scores by up to nan" in err
    assert sorted(tmp_path.iterdir()) == [source, target]
    assert target.read_text() == "an earlier export"


# What the files hold


def test_an_onnx_file_is_whole_and_says_how_to_use_it(exported, checkpoint):
    content = onnx.load(exported, load_external_data=False)
    onnx.checker.check_model(content, full_check=True)
    assert [(each.domain, each.version) for each in content.opset_import] == [("", 18)]
    assert not [tensor.name for tensor in content.graph.initializer if tensor.external_data]
    sizes = [side.dim_param or side.dim_value for side in content.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, SIDE, SIDE]
    (stored,) = content.metadata_props
    assert json.loads(stored.value) == {
        "format_version": 1,
        "architecture": "san4_pairwise",
        "label_names": NAMES,
        "preprocessing": {
            "channels": "RGB",
            "input_size": [3, SIDE, SIDE],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
        },
    }
    assert Description.from_text(stored.value, exported) == OnnxModel(exported).description


def test_a_torch_export_file_says_the_same(program, exported):
    stored = {EXTRA_FILE: ""}
    torch.export.load(program, extra_files=stored)
    assert Description.from_text(stored[EXTRA_FILE], program) == OnnxModel(exported).description


def test_files_do_not_tell_where_they_were_made(program, exported):
    for path in (exported, program):
        content = path.read_bytes()
        assert b"models.py" not in content
        assert str(Path(san.__file__).parents[2]).encode() not in content


def test_safetensors_keep_the_chosen_size(run, checkpoint, tmp_path):
    target = tmp_path / "other.safetensors"
    code, *_ = run("export", checkpoint, "--format", "safetensors", "--input-size", 20, "--out", target)
    again: Any = load_model(target)
    assert code == 0
    assert again.pretrained_cfg["input_size"] == (3, 20, 20)
    assert again.pretrained_cfg["label_names"] == NAMES


# The command


def test_export_tells_how_well_it_agrees(told, exported, photos):
    wrote, takes, compared = told.splitlines()
    size = exported.stat().st_size / 1e6
    assert wrote == f"wrote {exported} (san4_pairwise, onnx, opset 18, {size:.3g} MB)"
    assert takes == f"takes images [batch, 3, {SIDE}, {SIDE}], gives scores [batch, 3]"
    assert compared.startswith(f"compared with PyTorch on 9 images of {photos}: largest error ")
    assert compared.endswith("the same top-1 on 9 of 9")


def test_export_of_a_run_uses_its_images(run, checkpoint, photos, tmp_path):
    """And its file would lie in the run folder."""
    folder, images, target = (
        tmp_path / "run",
        tmp_path / "data" / "test" / "ant",
        tmp_path / "new" / "other.safetensors",
    )
    save_model(load_model(checkpoint), folder / "model.safetensors")
    images.mkdir(parents=True)
    for path in photos.iterdir():
        (images / path.name).hardlink_to(path)
    (images / "broken.png").write_bytes(b"nothing")
    (folder / "config.yaml").write_text(f"data: {tmp_path / 'data'}\n")
    words = ("export", folder, "--format", "safetensors", "--limit", 20, "--json")
    assert f"{folder / 'model.safetensors'} exists already" in run(*words)[2]
    code, out, _ = run(*words, "--out", target)
    found = json.loads(out)
    check = found.pop("check")
    assert code == 0
    assert found == {
        "file": str(target),
        "format": "safetensors",
        "opset": None,
        "bytes": target.stat().st_size,
        "model": "san4_pairwise",
        "classes": 3,
        "input_size": [3, SIDE, SIDE],
    }
    assert check["source"] == f"{tmp_path / 'data'} (test)"
    assert check["images"] == check["same_top1"] == 9
    assert check["max_error"] == 0 < check["smallest_margin"]


def test_random_images_are_the_same_every_time_and_said_to_be_random(run, checkpoint, tmp_path):
    words = ("export", checkpoint, "--format", "safetensors", "--out", tmp_path / "x.safetensors", "--overwrite")
    first, again = run(*words), run(*words, "--check", "random")
    assert first == again
    assert "compared with PyTorch on 64 random images (name real ones with --check): " in first[1]
    assert run(*words, "--limit", 3)[1].endswith("the same top-1 on 3 of 3\n")


def test_images_of_an_archive(run, checkpoint, photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
    words = ("export", checkpoint, "--format", "safetensors", "--out", tmp_path / "x.safetensors")
    code, out, _ = run(*words, "--check", tmp_path / "photos.tar")
    assert code == 0
    assert f"compared with PyTorch on 9 images of {tmp_path / 'photos.tar'}: " in out


def test_mistakes_of_export(run, subtests, checkpoint, photos, tmp_path):
    taken, empty, itself = tmp_path / "taken.onnx", tmp_path / "empty", ["--format", "safetensors"]
    taken.write_text("something")
    empty.mkdir()
    (tmp_path / "words.txt").write_text("no image")
    mistakes = {
        "unknown format": (["--format", "tflite"], "must be one of onnx, torch-export, aot-inductor, safetensors"),
        "taken": (["--out", taken], "taken.onnx exists already; choose another name with --out, or replace it with"),
        "suffix": (["--out", tmp_path / "x.pt2"], "x.pt2 is no name for onnx: it must end in .onnx"),
        "too small": (["--out", tmp_path / "x.onnx", "--input-size", 2], "the poolings need at least 4×4 pixels"),
        "no size": (["--out", tmp_path / "x.onnx", "--input-size", 0], "must be at least 1"),
        "too large": (["--out", tmp_path / "x.onnx", "--input-size", 8000], "with sides up to 8192"),
        "no images": (["--out", tmp_path / "x.onnx", "--check", empty], "holds no images to compare on"),
        "unreadable": (["--out", tmp_path / "x.safetensors", *itself, "--check", tmp_path / "words.txt"],
                       "none of the images"),
        "no data": (["--out", tmp_path / "x.onnx", "--check", "no-such-data"], "no data called 'no-such-data'"),
        "no limit": (["--out", tmp_path / "x.onnx", "--limit", 0], "must be at least 1"),
        "no place": (["--out", taken / "x.onnx"], "x.onnx cannot be written"),
    }  # fmt: skip
    for name, (words, sentence) in mistakes.items():
        with subtests.test(name):
            code, out, err = run("export", checkpoint, *words)
            assert (code, out) == (2, "")
            assert err.startswith("san: error: ")
            assert sentence in err
            assert len(err.splitlines()) == 1
    assert taken.read_text() == "something"
    assert not list(tmp_path.glob("x.*"))


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"only a model made by san\.create_model"):
        export_model(nn.Linear(2, 2), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="exported files are for RGB images"):
        export_model(_model_of_grey(), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="there is no format 'tflite'; choose one of: onnx, torch-export"):
        export_model(_model(), tmp_path / "model.tflite", "tflite")
    assert not list(tmp_path.iterdir())


def _model_of_grey() -> nn.Module:
    return san.create_model("san4_pairwise", 3, in_chans=1, **SMALL)


# Predictions without torch


def test_predictions_are_those_of_the_checkpoint(run, checkpoint, exported, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    words = (photos, tmp_path / "bad.jpg", "--top", 2, "--batch-size", 4)
    expected = run("predict", checkpoint, *words)
    assert expected[0] == 2
    assert len(expected[1].splitlines()) == 9
    assert run("predict", exported, *words) == expected
    rows, others = (
        [json.loads(line) for line in run("predict", path, photos, "--json")[1].splitlines()]
        for path in (checkpoint, exported)
    )
    for row, other in zip(rows, others, strict=True):
        assert row.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-6)
        assert row == other


def _san(blocked: list[str], *words: object) -> subprocess.CompletedProcess[str]:
    """`san` in a process in which packages are missing."""
    block = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code = f"{block}from san.cli import main\nsys.exit(main({[str(word) for word in words]}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


TORCH = ["torch", "timm", "torchvision", "safetensors", "lightning"]


def test_predict_needs_no_torch(run, exported, photos):
    done = _san(TORCH, "predict", exported, photos)
    assert (done.returncode, done.stdout, done.stderr) == run("predict", exported, photos)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("blocked", "needed"), [("onnxruntime", "'san-vision[export]'"), ("jsonargparse", "'san-vision[train]'")]
)
def test_the_extra_that_is_missing_is_named(exported, photos, blocked, needed):
    done = _san([*TORCH, blocked], "predict", exported, photos)
    assert done.returncode == 2
    assert done.stderr == f"san: error: san predict needs the package {blocked}: pip install {needed}\n"


def test_a_checkpoint_needs_torch(checkpoint, photos):
    done = _san(TORCH, "predict", checkpoint, photos)
    assert done.stderr == "san: error: san predict needs the package torch: pip install 'san-vision[train]'\n"


def test_export_to_onnx_names_its_extra(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = run("export", checkpoint, "--out", tmp_path / "x.onnx")
    assert code == 2
    assert err == "san: error: san export needs the package onnxscript: pip install 'san-vision[export]'\n"
    assert not list(tmp_path.iterdir())


# Files that somebody else made


def _foreign(path: Path, metadata: str | None, name: str = "images", keep: tuple[bool, ...] = (True,) * 3) -> Path:
    """A sound ONNX file that averages each channel and gives those to keep, whatever it says, with this metadata."""
    taken = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    given = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])
    nodes = [
        helper.make_node("GlobalAveragePool", [name], ["means"]),
        helper.make_node("Flatten", ["means"], ["columns"]),
        helper.make_node("Compress", ["columns", "keep"], ["scores"], axis=1),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes, "foreign", [taken], [given], [helper.make_tensor("keep", TensorProto.BOOL, [3], keep)]
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    if metadata is not None:
        helper.set_model_props(model, {"san": metadata})
    onnx.save(model, path)
    return path


def _changed(text: str, **values: Any) -> str:
    """A description with other values, at the top or among the preprocessing."""
    found = json.loads(text)
    for key, value in values.items():
        (found if key in found else found["preprocessing"])[key] = value
    return json.dumps(found)


def test_a_sound_description_makes_a_file_usable(exported, tmp_path):
    """So that the refusals below have no other reason than the one that they name."""
    sound = OnnxModel(exported).description.text()
    model = OnnxModel(_foreign(tmp_path / "sound.onnx", sound))
    images = np.random.default_rng(0).random((2, 3, SIDE, SIDE), dtype=np.float32)
    np.testing.assert_allclose(model(images), images.mean((2, 3)), rtol=1e-5)


def test_files_that_are_none_of_ours(run, subtests, exported, photos, tmp_path):
    sound = OnnxModel(exported).description.text()
    unreadable, elsewhere = "carries metadata that cannot be read", "is not what its metadata says"
    texts = {
        "no metadata": (None, "does not say how to prepare images"),
        "no JSON": ("{", unreadable),
        "deep": ("[" * 100_000, unreadable),
        "a list": ("[]", unreadable),
        "newer": (_changed(sound, format_version=2), "has format version 2, but this version of SAN reads up to 1"),
        "older": (_changed(sound, format_version=0), unreadable),
        "other channels": (_changed(sound, channels="BGR"), unreadable),
        "huge": (_changed(sound, input_size=[3, 10**6, 10**6]), unreadable),
        "huge before cropping": (_changed(sound, crop_pct=1e-9), unreadable),
        "vanishing": (_changed(sound, crop_pct=1e-320), unreadable),
        "negative": (_changed(sound, input_size=[3, -16, 16]), unreadable),
        "fraction": (_changed(sound, input_size=[3, 16.5, 16]), unreadable),
        "no deviation": (_changed(sound, std=[0, 1, 1]), unreadable),
        "no number": (_changed(sound, mean=[float("nan"), 0, 0]), unreadable),
        "interpolation": (_changed(sound, interpolation="magic"), unreadable),
        "unhashable": (_changed(sound, crop_mode={}), unreadable),
        "no names": (_changed(sound, label_names=[]), unreadable),
        "numbers as names": (_changed(sound, label_names=[1, 2, 3]), unreadable),
        "another size": (_changed(sound, input_size=[3, 20, 20]), elsewhere),
        "more names": (_changed(sound, label_names=["a", "b", "c", "d"]), elsewhere),
    }
    files = {name: (_foreign(tmp_path / f"{name}.onnx", text), sentence) for name, (text, sentence) in texts.items()}
    (tmp_path / "garbage.onnx").write_bytes(b"\x08\x0a\x12\x04 half a file")
    (tmp_path / "half.onnx").write_bytes(exported.read_bytes()[:20_000])
    files |= {
        "another input": (_foreign(tmp_path / "input.onnx", sound, name="pixels"), elsewhere),
        "garbage": (tmp_path / "garbage.onnx", "is not a readable ONNX file"),
        "half": (tmp_path / "half.onnx", "is not a readable ONNX file"),
        "missing": (tmp_path / "missing.onnx", "there is no file"),
        "fewer scores": (_foreign(tmp_path / "fewer.onnx", sound, keep=(True, True, False)), "gives scores of another"),
    }  # fmt: skip
    for name, (path, sentence) in files.items():
        with subtests.test(name):
            code, out, err = run("predict", path, photos / "odd.png")
            assert (code, out) == (2, "")
            assert err.startswith("san: error: ")
            assert sentence in err
            assert len(err.splitlines()) == 1


def test_an_onnx_file_runs_on_the_cpu(run, exported, photos):
    code, _, err = run("predict", exported, photos, "--device", "cuda:0")
    assert (code, err) == (2, "san: error: an .onnx file runs on the CPU, not on cuda:0; leave --device out\n")


def test_descriptions_are_checked_when_they_are_made(exported):
    sound = OnnxModel(exported).description
    with pytest.raises(UserError, match="crop_mode of the network is middle, but"):
        replace(sound, crop_mode="middle")


# AOTInductor, which compiles for a while


@pytest.mark.long
def test_aot_inductor(run, checkpoint, photos, tmp_path):
    target = tmp_path / "model.aot.pt2"
    code, out, _ = run("export", checkpoint, "--format", "aot-inductor", "--out", target, "--check", photos, "--json")
    assert code == 0
    assert json.loads(out)["check"]["max_error"] < 1e-5
    network: Any = torch._inductor.aoti_load_package(str(target))
    assert Description.from_text(network.get_metadata()["san"], target).label_names == tuple(NAMES)
    for batch in (1, 5):
        images = torch.randn(batch, 3, SIDE, SIDE)
        with torch.no_grad():
            torch.testing.assert_close(network(images), load_model(checkpoint)(images), rtol=0, atol=1e-5)


@pytest.mark.long
def test_the_documents_use_aot_inductor(tmp_path, monkeypatch):
    """The other snippets of the page run with those of all documents."""
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "export.md", "exec"), {"__name__": "example"})


@pytest.mark.long
def test_aot_inductor_needs_a_compiler(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    code, _, err = run("export", checkpoint, "--format", "aot-inductor", "--out", tmp_path / "x.pt2")
    assert (code, err) == (2, "san: error: AOTInductor needs a C++ compiler; install g++, or name one with CXX\n")
