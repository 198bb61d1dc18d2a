"""Accuracy and predictions of a model whose answers are known: it tells the grey level of an image."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

import san
from san.data import ImageFiles, load_dataset
from san.errors import UserError
from san.evaluation.accuracy import eval_mode, evaluate
from san.evaluation.prediction import predict

STEP = 30


class GreyLevel(nn.Module):
    """Class c is the grey level c·STEP; the further a class is from the image's level, the lower its score."""

    def __init__(self, classes: int = 7, label_names: list[str] | None = None) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.arange(classes) * STEP / 255)
        self.num_classes = classes
        self.pretrained_cfg = {
            "input_size": (3, 8, 8),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "label_names": label_names,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The tiny slope makes the lower of two equally distant classes win.
        return -((x.mean((1, 2, 3))[:, None] - self.levels) ** 2) * 100 - 1e-4 * self.levels


NAMES = [f"level{number}" for number in range(7)]


@pytest.fixture
def grey(tmp_path):
    """Function that makes an image of each class given, and returns their paths."""

    def make(*classes: int) -> list[str]:
        paths = [str(tmp_path / f"{place}-{number}.png") for place, number in enumerate(classes)]
        for path, number in zip(paths, classes, strict=True):
            Image.new("RGB", (10, 9), (number * STEP,) * 3).save(path)
        return paths

    return make


def test_counts_by_hand(grey):
    images = ImageFiles(grey(0, 0, 1, 6, 3), labels=[0, 1, 1, 0, 3])
    accuracy = evaluate(GreyLevel(), images, NAMES, batch_size=2)
    assert accuracy.images == 5
    assert accuracy.top1 == 60.0
    assert accuracy.top5 == 80.0  # for level 6 the five likeliest are 2 to 6, so class 0 is not among them
    expected = np.zeros((7, 7), dtype=int)
    for true, answer in [(0, 0), (1, 0), (1, 1), (0, 6), (3, 3)]:
        expected[true, answer] += 1
    assert np.array_equal(accuracy.confusion, expected)
    rows = {row["class"]: row for row in accuracy.per_class()}
    assert set(rows) == {"0", "1", "3"}
    assert rows["0"] == {"class": "0", "images": 2, "top1": 50.0, "top5": 50.0, "confused_with": "6"}
    assert rows["3"]["confused_with"] is None


def test_no_finite_scores_are_a_wrong_answer(grey):
    """Whatever the class: sorting takes what is no number for the largest."""

    class Overflowing(GreyLevel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = super().forward(x)
            dark = x.mean((1, 2, 3)) < 1.5 * STEP / 255
            return torch.where(dark[:, None], float("nan"), scores)

    accuracy = evaluate(Overflowing(), ImageFiles(grey(0, 1, 2, 5), labels=[0, 1, 2, 5]), NAMES)
    assert accuracy.confusion.diagonal().tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert accuracy.in_top5.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert accuracy.images == 4


def test_as_dict_is_plain(grey):
    import json

    accuracy = evaluate(GreyLevel(2), ImageFiles(grey(0, 1), labels=[0, 0]), ["a", "b"])
    told = json.loads(json.dumps(accuracy.as_dict()))
    assert told["confusion"] == [[1, 1], [0, 0]]
    assert told["top5"] == 100.0


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (64, 0), (3, 1)])
def test_batches_and_workers_change_nothing(grey, batch_size, workers):
    labels = [0, 1, 2, 3, 4, 5, 6]
    images = ImageFiles(grey(0, 1, 2, 6, 4, 4, 6), labels=labels)
    accuracy = evaluate(GreyLevel(), images, NAMES, batch_size=batch_size, workers=workers)
    assert accuracy.top1 == pytest.approx(100 * 5 / 7)
    assert accuracy.confusion[3, 6] == accuracy.confusion[5, 4] == 1


def test_classes_are_matched_by_name(grey):
    """The model may know more classes, in another order."""
    model = GreyLevel(3, label_names=["black", "dim", "grey"])
    images = ImageFiles(grey(2, 0), labels=[0, 1])
    accuracy = evaluate(model, images, ["grey", "black"])
    assert accuracy.top1 == 100.0
    assert [row["class"] for row in accuracy.per_class()] == ["black", "grey"]


def test_imagenet_classes_are_matched_by_wordnet_id(tmp_path):
    """A model of 1000 classes without names knows ImageNet's, in ImageNet's order; the folders may be some of them."""
    ids = ImageNetInfo().label_names()
    for number in (2, 6, 5):
        (tmp_path / "val" / ids[number]).mkdir(parents=True)
        Image.new("RGB", (10, 9), (number * STEP,) * 3).save(tmp_path / "val" / ids[number] / "0.png")
    data = load_dataset(str(tmp_path))
    accuracy = evaluate(GreyLevel(1000), data.split("test"), data.class_names)
    assert accuracy.top1 == 100.0
    assert [row["class"] for row in accuracy.per_class()] == [ids[2], ids[5], ids[6]]
    with pytest.raises(UserError, match="tells 7 classes apart, the images have 3"):
        evaluate(GreyLevel(7), data.split("test"), data.class_names)
    with pytest.raises(UserError, match=r"the images have 2: .* WordNet ids such as n01440764"):
        evaluate(GreyLevel(1000), data.split("test"), [ids[0], "cat"])


def test_other_thousands_are_matched_by_order(grey):
    names = [f"kind{number}" for number in range(1000)]
    accuracy = evaluate(GreyLevel(1000), ImageFiles(grey(2), labels=[2]), names)
    assert accuracy.per_class()[0]["class"] == "2"
    assert accuracy.top1 == 100.0


def test_broken_images_are_named_and_left_out(grey, tmp_path):
    """One may be broken in any set, more of them only up to the share that is allowed."""
    broken = [str(tmp_path / f"broken{number}.png") for number in range(2)]
    for path in broken:
        Path(path).write_bytes(b"not an image")
    good = grey(0, 1)
    one = evaluate(GreyLevel(), ImageFiles([*good, broken[0]], labels=[0, 1, 1]), NAMES)
    assert (one.images, one.broken) == (2, broken[:1])
    images = ImageFiles([*good, *broken], labels=[0, 1, 1, 1])
    assert evaluate(GreyLevel(), images, NAMES, max_broken=0.5).broken == broken
    with pytest.raises(UserError, match=r"2 of 4 images cannot be read \(.*broken0\.png"):
        evaluate(GreyLevel(), images, NAMES)


def test_mistakes(grey):
    paths = grey(0, 1)
    with pytest.raises(UserError, match="tells 7 classes apart, the images have 2"):
        evaluate(GreyLevel(), ImageFiles(paths, labels=[0, 1]), ["a", "b"])
    with pytest.raises(UserError, match="no labels"):
        evaluate(GreyLevel(), ImageFiles(paths), NAMES)
    with pytest.raises(UserError, match="not a single image"):
        evaluate(GreyLevel(), ImageFiles([]), NAMES)
    with pytest.raises(UserError, match="at least 1"):
        list(predict(GreyLevel(), paths, top=0))


def test_modes_are_restored(grey):
    """Also those of parts that were set apart, such as BatchNorm that is frozen."""
    model: Any = san.create_model("san4_patchwise", num_classes=10).train()
    model.bn1.eval()
    modes = [part.training for part in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, ImageFiles(grey(0, 1), labels=[0, 1]), [str(number) for number in range(10)])
    assert [part.training for part in model.modules()] == modes
    assert set(modes) == {True, False}
    model.eval().bn1.train()
    with eval_mode(model):
        assert not model.bn1.training
    assert model.bn1.training
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_predictions_come_in_order(grey, batch_size):
    paths = grey(3, 0, 6, 2, 5)
    predictions = list(predict(GreyLevel(label_names=NAMES), paths, top=2, batch_size=batch_size))
    assert [prediction.image for prediction in predictions] == paths
    assert [prediction.classes[0] for prediction in predictions] == ["level3", "level0", "level6", "level2", "level5"]
    assert all(len(prediction.probabilities) == 2 for prediction in predictions)


def test_probabilities_are_those_of_all_classes(grey):
    (prediction,) = predict(GreyLevel(), grey(3), top=100)
    assert len(prediction.classes) == 7
    assert sum(prediction.probabilities) == pytest.approx(1)
    assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)


def test_a_thousand_classes_are_called_by_imagenet_s_words(grey):
    (prediction,) = predict(GreyLevel(1000), grey(0), top=1)
    assert prediction.classes == ["tench, Tinca tinca"]
    own = [f"kind{number}" for number in range(1000)]
    (prediction,) = predict(GreyLevel(1000, label_names=own), grey(0), top=1)
    assert prediction.classes == ["kind0"]


def test_broken_images_are_skipped(grey, tmp_path):
    good = grey(1, 2)
    (tmp_path / "half.png").write_bytes((tmp_path / "0-1.png").read_bytes()[:40])
    (tmp_path / "text.png").write_bytes(b"no image")
    bad = [str(tmp_path / name) for name in ("half.png", "text.png", "missing.png")]
    first, half, text, missing, folder, last = predict(GreyLevel(), [good[0], *bad, str(tmp_path), good[1]])
    assert first.error is None
    assert last.classes[0] == "2"
    assert not half.classes
    assert half.error.startswith(f"{bad[0]} is not a readable image")
    assert text.error == f"{bad[1]} is not a readable image"
    assert missing.error == f"{bad[2]} does not exist"
    assert folder.error == f"{tmp_path} is a folder, not an image"


def test_only_a_batch_is_read_ahead(grey):
    """Endless input is answered as it comes."""
    taken = []
    endless = (taken.append(path) or path for path in cycle(grey(0, 1)))
    assert len(list(islice(predict(GreyLevel(), endless, batch_size=4), 6))) == 6
    assert len(taken) == 8
