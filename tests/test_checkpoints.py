"""Files: the authors' checkpoints give what a plain forward gives, ours rebuild the model, hostile ones are refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

import san
from hub_server import hub
from plain_san import plain_san, randomised
from san.checkpoints import convert, hub_form, load_model, save_model
from san.errors import UserError
from san.weights import NETWORKS

CLASSES = 10
NAMES = [name for name in san.list_models() if name.startswith("san")]


class Published(NamedTuple):
    """A checkpoint as the authors publish it, and what its network answers to `x` according to the plain forward."""

    name: str
    content: dict[str, Any]
    x: Tensor
    logits: Tensor


def _published(name: str) -> Published:
    model = san.create_model(name, CLASSES)
    state = randomised(model.state_dict())
    x = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    logits = plain_san(state, x, NETWORKS[name.split("_")[0]], pairwise="pairwise" in name)
    model.load_state_dict(state)
    # The parameters share their memory, so the optimizer's momentum is all that training adds here.
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    model.fc(torch.ones(1, model.num_features)).sum().backward()
    optimizer.step()
    scheduler.step()
    model.load_state_dict(state)
    content = {
        "epoch": 100,
        "state_dict": nn.DataParallel(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "top1_val": 77.1,
        "top5_val": 93.5,
    }
    return Published(name, content, x, logits)


@pytest.fixture(scope="module", params=NAMES)
def published(request: pytest.FixtureRequest) -> Published:
    torch.manual_seed(0)
    return _published(request.param)


@pytest.fixture(scope="module")
def small() -> Published:
    torch.manual_seed(0)
    return _published("san4_pairwise")


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.double().eval()(x)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_published_checkpoint_gives_the_plain_outputs(published: Published, zipped: bool, tmp_path: Path):
    source, target = tmp_path / "published.pth", tmp_path / "converted.safetensors"
    torch.save(published.content, source, _use_new_zipfile_serialization=zipped)
    model = load_model(source)
    assert (model.architecture, model.num_classes, model.training) == (published.name, CLASSES, False)
    assert convert(source, target) == published.name
    created = san.create_model(published.name, CLASSES, checkpoint=source)
    for each in (model, load_model(target), created):
        torch.testing.assert_close(_logits(each, published.x), published.logits, rtol=1e-10, atol=1e-12)
    for key, value in load_file(target).items():
        assert torch.equal(value, published.content["state_dict"][f"module.{key}"])


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_accuracies_may_be_numpy_scalars(small: Published, kind: type, zipped: bool, tmp_path: Path):
    file = tmp_path / "published.pth"
    torch.save({**small.content, "top1_val": kind(77)}, file, _use_new_zipfile_serialization=zipped)
    assert load_model(file).architecture == small.name
    if not zipped:  # numpy 1 had another name for the same function
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert load_model(file).architecture == small.name


def test_kernels_and_channels_of_patchwise_weights_are_recognised(tmp_path: Path):
    model = san.create_model("san4_patchwise", 3, kernels=(5, 3, 7), in_chans=2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = load_model(tmp_path / "weights.pth")
    assert loaded.options == {"kernels": (5, 3, 7), "in_chans": 2}
    assert loaded.num_classes == 3


def _model(**options: Any) -> nn.Module:
    """A small model with everything that travels with it set to something unusual."""
    model = san.create_model("san4_pairwise", 3, **options)
    model.load_state_dict(randomised(model.state_dict()))
    size = (options.get("in_chans", 3), 20, 24)
    model.pretrained_cfg.update(input_size=size, mean=(0.1, 0.2, 0.3), crop_pct=0.5, crop_mode="squash")
    model.pretrained_cfg.update(label_names=["cat", "dog", "×"])
    return model.eval()


def _assert_same(first: nn.Module, second: nn.Module) -> None:
    x = torch.randn(2, first.in_chans, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(first(x), second.eval()(x), rtol=0, atol=0)
    assert (first.architecture, first.num_classes) == (second.architecture, second.num_classes)
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names"):
        assert first.pretrained_cfg[key] == second.pretrained_cfg[key], key


UNUSUAL = [
    {},
    {"kernels": (5, 3, 7), "in_chans": 4, "small_images": True},
    {"attention": "scalar", "border": "zeros"},
    {"relation": "dot", "mapping": "LRLRL", "position": "none", "share": 4, "value_reduction": 2, "dilation": 2},
    {"transformations": "query=key=value", "relation_reduction": 4, "blocks": (1, 0, 2)},
]


@pytest.mark.parametrize("options", UNUSUAL, ids=str)
def test_saved_model_is_rebuilt_with_all_that_travels_with_it(options: dict[str, Any], tmp_path: Path):
    model = _model(**options)
    save_model(model, tmp_path / "run" / "model.safetensors")
    _assert_same(model, load_model(tmp_path / "run" / "model.safetensors"))
    _assert_same(model, load_model(tmp_path / "run"))
    created = san.create_model("san4_pairwise", 3, checkpoint=tmp_path / "run", drop_path_rate=0.1)
    _assert_same(model, created)
    assert created.options == {**load_model(tmp_path / "run").options, "drop_path_rate": 0.1}


def test_baseline_and_other_forms_of_a_model_are_saved(tmp_path: Path):
    model = san.create_model("baseline_resnet26", 3, small_images=True).to(memory_format=torch.channels_last).eval()
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    save_model(_model().bfloat16(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "model.safetensors").fc.weight.dtype == torch.float32


def test_interrupted_save_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = _model()
    save_model(model, tmp_path / "model.safetensors")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(san.create_model("san4_pairwise", 3), tmp_path / "model.safetensors")
    _assert_same(model, load_model(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda error: error.__name__)
def test_save_that_fails_leaves_nothing_behind(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises((KeyboardInterrupt, UserError)):
        save_model(_model(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def _refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The one sentence that a mistake ends in."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_what_cannot_be_saved(tmp_path: Path):
    target = tmp_path / "model.safetensors"
    assert "made by san.create_model" in _refusal(save_model, nn.Linear(2, 2), target)
    features = timm.create_model("san4_pairwise", features_only=True)
    assert "made by san.create_model" in _refusal(save_model, features, target)
    assert "must end in .safetensors" in _refusal(save_model, _model(), tmp_path / "model.pth")
    assert "must end in .safetensors" in _refusal(convert, tmp_path / "missing.pth", tmp_path / "model.bin")
    other = _model()
    other.reset_classifier(5)
    assert "5 classes apart" in _refusal(save_model, other, target)
    by_class = san.create_model("baseline_resnet26", 2, act_layer=nn.SiLU)
    assert "not a plain value" in _refusal(save_model, by_class, target)
    (tmp_path / "file").touch()
    assert "cannot be written" in _refusal(save_model, _model(), tmp_path / "file" / "model.safetensors")
    assert "cannot be written" in _refusal(save_model, _model(), tmp_path / f"{'a' * 300}.safetensors")
    target.mkdir()
    assert "cannot be written" in _refusal(save_model, _model(), target)
    assert {file.name for file in tmp_path.iterdir()} == {"file", target.name}


@pytest.mark.parametrize(("key", "value"), [("label_names", [1, 2, 3]), ("crop_pct", -1), ("mean", "bright")])
def test_what_could_not_be_read_again_is_not_saved(key: str, value: Any, tmp_path: Path):
    model = _model()
    model.pretrained_cfg[key] = value
    assert "pretrained_cfg is not what files hold" in _refusal(save_model, model, tmp_path / "model.safetensors")


class _Trap:
    """Unpickling it in full makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["epoch", "state_dict"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(small: Published, form: str, place: str, tmp_path: Path):
    file, sprung = tmp_path / "published.pth", tmp_path / "sprung"
    content = {**small.content, place: _Trap(sprung)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    for call in (load_model, lambda file: san.create_model(small.name, CLASSES, checkpoint=file)):
        assert "published.pth is refused" in _refusal(call, file)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(_Trap(sprung)))  # noqa: S301 (the trap works)
    assert sprung.exists()


@pytest.fixture(scope="module")
def files(small: Published, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good file of each form."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(small.content, folder / "zip.pth")
    torch.save(small.content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_model(_model(), folder / "ours.safetensors")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "ours.safetensors"])
def test_truncated_files_are_refused(files: dict[str, bytes], name: str, tmp_path: Path):
    whole = files[name]
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:length])
        assert name in _refusal(load_model, tmp_path / name)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "ours.safetensors"])
def test_damaged_files_load_or_are_refused(files: dict[str, bytes], name: str, tmp_path: Path):
    places = torch.randint(4000, (50,)).tolist()
    for place in places:
        damaged = bytearray(files[name])
        damaged[place] ^= 1 + place % 255
        (tmp_path / name).write_bytes(damaged)
        with suppress(UserError):
            load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors", "notes"])
def test_files_of_another_kind_are_refused(name: str, tmp_path: Path):
    for content in (
        b"",
        b"epoch 100: top-1 77.1\n",
        struct.pack("<Q", 1 << 60) + b"{}",
        b"\x80\x02K\x01.",
        b"PK\x03\x04",
    ):
        (tmp_path / name).write_bytes(content)
        assert name in _refusal(load_model, tmp_path / name)


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"state_dict": None}, {"state_dict": {"a": 1}}, {"epoch": 3}, torch.ones(2)]
)
def test_checkpoints_without_weights_are_refused(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "published.pth")
    assert "no state_dict" in _refusal(load_model, tmp_path / "published.pth")


ODD_TENSORS = {
    "complex": torch.zeros(3, 256, dtype=torch.complex64),
    "truth values": torch.zeros(3, 256, dtype=torch.bool),
    "quantized": torch.quantize_per_tensor(torch.zeros(3, 256), 0.1, 0, torch.qint8),
    "sparse": torch.zeros(3, 256).to_sparse(),
    "repeated": torch.zeros(1).expand(3, 256),
    "huge": torch.zeros(1).expand(10**12, 256),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_only_dense_tensors_of_real_numbers_are_weights(kind: str, tmp_path: Path):
    state = {**san.create_model("san4_pairwise", 3).state_dict(), "fc.weight": ODD_TENSORS[kind]}
    torch.save(state, tmp_path / "published.pth")
    assert "published.pth" in _refusal(load_model, tmp_path / "published.pth")
    assert "published.pth" in _refusal(san.create_model, "san4_pairwise", 3, checkpoint=tmp_path / "published.pth")
    if kind in ("complex", "truth values"):
        save_file(state, tmp_path / "model.safetensors")
        assert "must be real numbers" in _refusal(load_model, tmp_path / "model.safetensors")


def test_missing_files(tmp_path: Path):
    assert "does not exist" in _refusal(load_model, tmp_path / "missing.pth")
    assert "folder without model.safetensors" in _refusal(load_model, tmp_path)
    assert "does not exist" in _refusal(san.create_model, "san4_pairwise", checkpoint=tmp_path / "missing.pth")


def test_foreign_weights(small: Published, tmp_path: Path):
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state, tmp_path / "foreign.pth")
    save_file(state, tmp_path / "foreign.safetensors")
    for file in (tmp_path / "foreign.pth", tmp_path / "foreign.safetensors"):
        assert "no network that its weights alone reveal" in _refusal(load_model, file)
        sentence = _refusal(san.create_model, "san4_pairwise", checkpoint=file)
        assert "not a checkpoint of this network: it lacks conv_in.weight" in sentence
    torch.save(small.content, tmp_path / "small.pth")
    assert "lacks" in _refusal(san.create_model, "san10_pairwise", CLASSES, checkpoint=tmp_path / "small.pth")
    sentence = _refusal(san.create_model, small.name, 1000, checkpoint=tmp_path / "small.pth")
    assert (
        "fc.weight is [10, 256] there and [1000, 256] in the network; load it as it is and call reset_class" in sentence
    )
    more = {**small.content["state_dict"], "module.more": torch.ones(1)}
    torch.save({"state_dict": more}, tmp_path / "more.pth")
    assert "has more, which the network lacks" in _refusal(load_model, tmp_path / "more.pth")


def test_file_of_another_network_of_ours(tmp_path: Path):
    save_model(_model(), tmp_path / "model.safetensors")
    sentence = _refusal(san.create_model, "san4_patchwise", 3, checkpoint=tmp_path / "model.safetensors")
    assert "holds a san4_pairwise, not a san4_patchwise" in sentence


def _with_metadata(file: Path, text: str) -> None:
    save_file(san.create_model("san4_pairwise", 3).state_dict(), file, {"san": text})


GOOD = {
    "format_version": 1,
    "architecture": "san4_pairwise",
    "options": {},
    "num_classes": 3,
    "preprocessing": {},
    "label_names": None,
}


ODD_PREPROCESSING = {
    "input_size": ([3], [3, 0, 28], [3, 28.5, 28]),
    "mean": (["a", "b"], [], [float("nan")] * 3),
    "std": ([0.5, 0.5, 0], [True] * 3),
    "interpolation": ("magic", ["bilinear"]),
    "crop_pct": (-1, 0, 1.5, "1", float("inf")),
    "crop_mode": ("magic", 3),
}


def test_metadata_that_cannot_be_read(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    wrong = [{**GOOD, "preprocessing": {"mean": 0.5}}, {**GOOD, "label_names": ["cat"]}, {**GOOD, "label_names": "?"}]
    wrong += [{**GOOD, "preprocessing": {key: value}} for key, values in ODD_PREPROCESSING.items() for value in values]
    wrong += [{**GOOD, "label_names": ["cat", "dog", {}]}, {**GOOD, "num_classes": True}]
    wrong += [{**GOOD, key: value} for key in GOOD if key != "label_names" for value in ("?", -1.5, [[]])]
    texts = ["", "?", "3", "[]", "{}", "[" * 100_000, '{"format_version": Infinity}', '{"format_version": 1}']
    for text in [*texts, *map(json.dumps, wrong)]:
        _with_metadata(file, text)
        assert "model.safetensors" in _refusal(load_model, file)
    _with_metadata(file, json.dumps({"format_version": 2}))
    assert "format version 2, but this version of SAN reads up to 1; update SAN" in _refusal(load_model, file)
    _with_metadata(file, json.dumps(GOOD))
    assert load_model(file).architecture == "san4_pairwise"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("architecture", "san99", "is unknown"),
        ("architecture", "hf-hub:someone/model", "is unknown"),
        ("num_classes", 4, "fc.weight is [3, 256] there"),
        ("options", {"checkpoint_path": "other.pth"}, "no option 'checkpoint_path'"),
        ("options", {"checkpoint": "other.pth"}, "no option 'checkpoint'"),
        ("options", {"pretrained": True}, "no option 'pretrained'"),
        ("options", {"pretrained_cfg": {"file": "other.pth"}}, "no option 'pretrained_cfg'"),
        ("options", {"name": "san10_pairwise"}, "no option 'name'"),
        ("options", {"kernels": [4, 5, 5]}, "must be odd"),
        ("options", {"kernels": 7}, "cannot be built"),
        ("options", {"blocks": "abc"}, "cannot be built"),
        ("options", {"widths": [-64, 128, 256]}, "must be at least"),
        ("options", {"relation": []}, "cannot be built"),
        ("options", {"share": "8"}, "cannot be built"),
        ("options", {"position": "none"}, "which the network lacks"),
        ("options", {"share": 4}, "does not fit"),
        ("options", {"global_pool": ["avg"]}, "cannot be built"),
        ("options", {"drop_rate": "x"}, "must be a number from 0 to 1"),
        ("options", {"features_only": True}, "not a checkpoint of this network"),
    ],
)
def test_metadata_that_tells_of_no_network(field: str, value: Any, reason: str, tmp_path: Path):
    _with_metadata(tmp_path / "model.safetensors", json.dumps({**GOOD, field: value}))
    sentence = _refusal(load_model, tmp_path / "model.safetensors")
    assert reason in sentence
    assert "model.safetensors" in sentence


BIG = [
    ("num_classes", 10**12, "does not fit: fc.weight"),
    ("options", {"widths": [64, 128, 10**8]}, "does not fit"),
    ("options", {"in_chans": 10**10}, "does not fit"),
    ("options", {"blocks": [10**9, 2, 1]}, "blocks are more than the 158 tensors of "),
    ("options", {"pools": [10**12, 1, 1], "kernels": [3, 3, 3], "share": 4}, "does not fit"),
]


@pytest.mark.parametrize(("field", "value", "reason"), BIG)
def test_numbers_of_a_file_cost_nothing_before_they_fit_its_tensors(
    field: str, value: Any, reason: str, tmp_path: Path
):
    file = tmp_path / "model.safetensors"
    _with_metadata(file, json.dumps({**GOOD, field: value}))
    assert reason in _refusal(load_model, file)
    classes = value if field == "num_classes" else 3
    assert reason in _refusal(san.create_model, "san4_pairwise", classes, checkpoint=file)


def test_layers_of_a_baseline_are_counted_too(tmp_path: Path):
    metadata = {**GOOD, "architecture": "baseline_resnet26", "options": {"layers": [10**9, 1, 1, 1]}}
    _with_metadata(tmp_path / "model.safetensors", json.dumps(metadata))
    assert "layers are more than the" in _refusal(load_model, tmp_path / "model.safetensors")


def _publish(model: nn.Module, folder: Path) -> None:
    """What `push_to_hub` uploads."""
    published, description = hub_form(model)
    save_for_hf(published, str(folder), safe_serialization=True, **description)


@pytest.mark.parametrize("options", UNUSUAL, ids=str)
def test_hub_folder_gives_the_model_back(options: dict[str, Any], tmp_path: Path):
    model = _model(**options)
    _publish(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    _assert_same(model, san.create_model(f"local-dir:{tmp_path}"))
    _assert_same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    _assert_same(model, load_model(tmp_path))


def test_hub_folder_with_another_classifier(tmp_path: Path):
    _publish(_model(), tmp_path)
    model = san.create_model(f"local-dir:{tmp_path}", num_classes=7)
    assert model(torch.randn(2, 3, 20, 24)).shape == (2, 7)
    save_model(model, tmp_path / "other" / "model.safetensors")
    assert load_model(tmp_path / "other").pretrained_cfg["label_names"] is None


def test_baseline_in_channels_last_goes_to_the_hub(tmp_path: Path):
    model = san.create_model("baseline_resnet26", 3, small_images=True).to(memory_format=torch.channels_last).eval()
    _publish(model, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(load_model(tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)


def test_hub_mistakes(tmp_path: Path):
    assert "cannot be loaded" in _refusal(san.create_model, f"local-dir:{tmp_path / 'missing'}")
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in _refusal(load_model, tmp_path)
    save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "foreign"), safe_serialization=True)
    assert "holds a ResNet of timm's" in _refusal(load_model, tmp_path / "foreign")


ON_THE_HUB = """
import san, torch
from san.checkpoints import push_to_hub

model = san.create_model("san4_pairwise", 3, kernels=(5, 3, 7), in_chans=4).eval()
model.pretrained_cfg["label_names"] = ["cat", "dog", "bird"]
push_to_hub(model, "someone/model", token="secret")
again = san.create_model("hf-hub:someone/model").eval()
x = torch.randn(2, 4, 28, 28)
assert torch.equal(model(x), again(x))
assert again.pretrained_cfg["label_names"] == ["cat", "dog", "bird"]
try:
    san.create_model("hf-hub:someone/missing")
except san.errors.UserError as refusal:
    print(refusal)
"""


def test_model_goes_to_a_hub_and_comes_back(tmp_path: Path):
    with hub() as (address, files):
        # The hub's client reads its address when imported.
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
        done = subprocess.run([sys.executable, "-c", ON_THE_HUB], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert done.stdout.startswith("hf-hub:someone/missing cannot be loaded: ")


def test_run_that_has_not_ended_says_how_to_go_on(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match=f"has not ended; go on with: san train --resume {tmp_path}"):
        load_model(tmp_path)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_exported_file_is_told_from_a_checkpoint(tmp_path, suffix):
    path = tmp_path / f"exported{suffix}"
    path.write_bytes(b"exported")
    with pytest.raises(UserError, match="is an exported file, which is no checkpoint"):
        load_model(path)
