"""Rotation and attacks: pixel by pixel, against another implementation, by hand, and on networks that were trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import foolbox
import numpy as np
import pytest
import torch
from foolbox.attacks.carlini_wagner import best_other_classes
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import san
from plain_san import randomised
from san.checkpoints import load_model
from san.cli import main
from san.data import ImageFiles, load_dataset, make_loader
from san.errors import UserError
from san.evaluation.accuracy import evaluate
from san.evaluation.robustness import (
    VIEWS,
    Attack,
    LabelledImages,
    PixelModel,
    Settings,
    attack_accuracy,
    attack_images,
    frozen,
    gradient_checks,
    margin,
    measure,
    pgd,
    random_start,
    rotate,
    rotation_accuracy,
    spread,
    turn,
    wrong_labels,
)
from san.evaluation.robustness.figures import draw_angles, draw_attacked
from san.evaluation.robustness.tables import check_lines
from san.training import train
from tiny_run import NETWORK, make_images, settings

STRONG = Attack(epsilon=48 / 255, step=12 / 255, iterations=8)
"""The colours of the tiny images are further apart than 8/255."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> list[str]:
    """A trained network of each form."""
    folder = tmp_path_factory.mktemp("runs")
    forms = ("pairwise", "patchwise")
    return [str(train(**settings(images, epochs=6, model=f"san4_{form}"), out=str(folder / form))) for form in forms]


@pytest.fixture
def examples(images) -> LabelledImages:
    dataset = load_dataset(str(images))
    return LabelledImages(dataset.split("test"), dataset.class_names)


class Hand(nn.Module):
    """A network for 8×8 pixels that is written by hand, without normalisation."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.num_classes = len(names)
        still = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
        self.pretrained_cfg = {"input_size": (3, 8, 8), "crop_mode": "center", "label_names": names, **still}


class Brightness(Hand):
    """Dark below a mean of all pixels, bright above."""

    def __init__(self, border: float = 0.5) -> None:
        super().__init__(["dark", "bright"])
        self.border = border

    def forward(self, x: Tensor) -> Tensor:
        level = self.scale * (x.mean((1, 2, 3)) - self.border)
        return torch.stack([-level, level], 1)


class Overflowing(Brightness):
    """Scores of bright images are no numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.mean((1, 2, 3))[:, None] > 0.9, float("nan"), super().forward(x))


class BrightSide(Hand):
    """Which half of the image is the brightest."""

    def __init__(self) -> None:
        super().__init__(["top", "right", "bottom", "left"])

    def forward(self, x: Tensor) -> Tensor:
        halves = (x[..., :4, :], x[..., :, 4:], x[..., 4:, :], x[..., :, :4])
        return self.scale * torch.stack([half.mean((1, 2, 3)) for half in halves], 1)


def _files(folder: Path, pictures: list[Image.Image], labels: list[int]) -> ImageFiles:
    paths = [folder / f"{number}.png" for number in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return ImageFiles(paths, labels)


def _grey(folder: Path, levels: list[int], labels: list[int]) -> ImageFiles:
    folder.mkdir(exist_ok=True)
    return _files(folder, [Image.new("RGB", (8, 8), (level,) * 3) for level in levels], labels)


def _network(form: str, classes: int = 5) -> PixelModel:
    """A small network in float64 whose every tensor is random."""
    model = san.create_model(f"san4_{form}", classes, **NETWORK).double().eval()
    model.load_state_dict(randomised(model.state_dict()))
    return PixelModel(model)


def _pixels(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# Rotation


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 5), (3, 7)])
def test_turns_and_flip_pixel_by_pixel(view, height, width):
    """All pixels differ, so each is followed to where it has to be."""
    image = torch.arange(2 * 3 * height * width).reshape(2, 3, height, width)
    found = VIEWS[view](image)
    source = {
        "0°": lambda y, x: (y, x),
        "90°": lambda y, x: (height - 1 - x, y),
        "180°": lambda y, x: (height - 1 - y, width - 1 - x),
        "270°": lambda y, x: (x, width - 1 - y),
        "upside-down": lambda y, x: (height - 1 - y, x),
    }[view]
    assert found.shape[-2:] == ((width, height) if view in ("90°", "270°") else (height, width))
    for y in range(found.shape[-2]):
        for x in range(found.shape[-1]):
            assert torch.equal(found[:, :, y, x], image[:, :, *source(y, x)])


def test_turns_are_clockwise():
    assert turn(torch.tensor([[1, 2], [3, 4]]), 1).tolist() == [[3, 1], [4, 2]]
    assert VIEWS["upside-down"](torch.tensor([[1, 2], [3, 4]])).tolist() == [[3, 4], [1, 2]]


@pytest.mark.parametrize("degrees", [-90, 0, 90, 180, 270, 360, 450])
def test_multiples_of_90_degrees_are_exact(degrees):
    image = _pixels(1, 3, 6, 6)
    assert torch.equal(rotate(image, degrees), turn(image, degrees // 90))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_other_angles_turn_the_same_way_around_the_same_centre(degrees):
    image = _pixels(1, 3, 7, 7)
    for side in (-1e-4, 1e-4):
        # Outer pixels lie half outside as soon as the angle is not exact.
        near = rotate(image, degrees + side)[..., 1:-1, 1:-1]
        torch.testing.assert_close(near, rotate(image, degrees)[..., 1:-1, 1:-1], rtol=0, atol=1e-4)


def test_corners_get_the_mean_colour():
    """Which is 0 in normalised images; the middle keeps its values."""
    turned = rotate(torch.full((1, 3, 9, 9), 2.0), 45)
    assert turned[0, 0, 0, 0] == turned[0, 0, 8, 8] == 0
    assert turned[0, :, 3:6, 3:6].allclose(torch.tensor(2.0))


class OneColour(Hand):
    """Whether every pixel has the mean colour, which is 128 of 255."""

    def __init__(self) -> None:
        super().__init__(["mean colour", "others"])
        self.pretrained_cfg |= {"mean": (128 / 255,) * 3, "std": (0.25,) * 3}

    def forward(self, x: Tensor) -> Tensor:
        others = self.scale * x.abs().amax((1, 2, 3)) - 0.01
        return torch.stack([-others, others], 1)


def test_corners_get_the_network_s_own_mean_colour(tmp_path):
    examples = LabelledImages(_grey(tmp_path, [128, 120], [0, 0]), ["mean colour", "others"])
    assert [row["top1"] for row in rotation_accuracy(OneColour(), examples, [0, 45, 100])["angles"]] == [50.0] * 3


def test_each_view_is_judged_by_what_it_shows(tmp_path):
    """Turned clockwise, a bright top becomes a bright right side: images so labelled are right in that view alone."""
    top = Image.new("RGB", (8, 8))
    top.paste((255, 255, 255), (0, 0, 8, 4))
    model = BrightSide()
    for number, side in enumerate(model.pretrained_cfg["label_names"]):
        examples = LabelledImages(_files(tmp_path, [top], [number]), model.pretrained_cfg["label_names"])
        found = rotation_accuracy(model, examples, [80, 100, 170, -90])
        views = {row["view"]: row["top1"] for row in found["views"]}
        sides = {"0°": "top", "90°": "right", "180°": "bottom", "270°": "left", "upside-down": "bottom"}
        assert views == {view: 100.0 * (shown == side) for view, shown in sides.items()}
        angles = [(row["angle"], row["top1"]) for row in found["angles"]]
        shown = [(80.0, "right"), (100.0, "right"), (170.0, "bottom"), (-90.0, "left")]
        assert angles == [(angle, 100.0 * (name == side)) for angle, name in shown]


@pytest.mark.parametrize("batch_size", [5, 64])
def test_no_rotation_is_what_evaluate_tells(runs, images, batch_size):
    dataset = load_dataset(str(images))
    few = LabelledImages(dataset.split("train"), dataset.class_names, batch_size=batch_size)
    for model in map(load_model, runs):
        # Some images should be wrong.
        model.fc.bias.data[0] += 1
        accuracy = evaluate(model, few.images, few.class_names, batch_size=batch_size)
        found = rotation_accuracy(model, few, [0, 360])
        assert 0 < accuracy.top1 < 100
        assert found["views"][0] == {"view": "0°", "top1": accuracy.top1, "top5": accuracy.top5}
        assert [row["top1"] for row in found["angles"]] == [accuracy.top1] * 2
        assert attack_accuracy(model, few, Attack(iterations=1))["top1"] == accuracy.top1


def test_frozen_parts_stay_frozen_inside(runs):
    network = load_model(runs[0]).train()
    network.layer0.eval()
    model = PixelModel(network)
    assert model.training
    assert network.training
    assert not any(part.training for part in network.layer0.modules())


def test_pixels_normalised_inside_are_the_network_s_input_bit_by_bit(runs, examples):
    network = PixelModel(load_model(runs[0]))
    (pixels,) = [batch.images for batch in examples.batches(network)]
    preprocessing = resolve_model_data_config(network.network)
    (usual,) = make_loader(examples.images, preprocessing, batch_size=64, training=False)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert torch.equal(network.normalise(pixels), usual.images)


# Attack


class MarginPGD(foolbox.attacks.LinfPGD):
    """Foolbox's descent along what its attack of Carlini and Wagner calls the best other class."""

    def get_loss_fn(self, model, labels):
        def loss(inputs):
            logits, rows = model(inputs), range(len(labels))
            return (logits[rows, best_other_classes(logits, labels)] - logits[rows, labels]).sum()

        return loss


@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("randomly", [False, True], ids=["from the image", "random start"])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_pgd_is_foolbox_s(form, targeted, randomly, loss):
    """The same start, steps and step size give the same adversarial images, after every number of iterations."""
    network, images, labels = _network(form), _pixels(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    criterion = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    start = None
    if randomly:
        torch.manual_seed(2)
        start = images + torch.rand(images.shape, dtype=images.dtype) * 2 * (8 / 255) - 8 / 255
    with frozen(network):
        bounded = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        iterates = pgd(network, images, labels, iterations=5, targeted=targeted, start=start, loss=loss)
        next(iterates)
        for number, (_, found, logits, _) in enumerate(iterates, 1):
            attack = foolbox.attacks.LinfPGD if loss == "cross_entropy" else MarginPGD
            other = attack(abs_stepsize=2 / 255, steps=number, random_start=randomly)
            torch.manual_seed(2)
            expected = other.run(bounded, images, criterion(labels), epsilon=8 / 255)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(logits, network(found), rtol=1e-9, atol=1e-9)
            assert (found - images).abs().amax((1, 2, 3)).min() > 1 / 255


@given(
    epsilon=st.floats(0, 1),
    step=st.floats(0, 1),
    iterations=st.integers(1, 4),
    targeted=st.booleans(),
    distance=st.floats(-2, 2),
)
def test_images_stay_within_epsilon_and_0_to_1(epsilon, step, iterations, targeted, distance):
    """Every pixel of every iterate, wherever the attack starts."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double()
    images = _pixels(2, 3, 6, 6)
    images[0, :, 0], images[1, :, 0] = 0, 1
    options = {"epsilon": epsilon, "step": step, "iterations": iterations, "targeted": targeted}
    found = list(pgd(network, images, torch.tensor([0, 2]), **options, start=images + distance))
    assert [iterate.number for iterate in found] == list(range(iterations + 1))
    for iterate in found:
        assert ((iterate.images >= 0) & (iterate.images <= 1)).all()
        # image + ε is rounded once.
        assert ((iterate.images - images).abs() <= epsilon + torch.finfo(torch.float64).eps).all()


def test_success_counted_by_hand(tmp_path):
    """0.02 a step: 115 and 125 of 255 need 3 and 1 steps to be bright; 140 is bright anyway, but called dark."""
    examples = LabelledImages(_grey(tmp_path, [115, 125, 140, 0], [0, 0, 0, 0]), ["dark", "bright"])
    attack = Attack(epsilon=0.06, step=0.02, iterations=5)
    found = attack_accuracy(Brightness(), examples, attack)
    assert (found["images"], found["top1"]) == (4, 75.0)
    rows = found["rows"]
    assert [row["iterations"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["top1"] for row in rows] == [75, 50, 50, 25, 25, 25]
    assert [row["success"] for row in rows] == pytest.approx([0, 100 / 3, 100 / 3, 200 / 3, 200 / 3, 200 / 3])
    # Between two classes the target is the other one: the image that has it already counts as reached.
    found = attack_accuracy(Brightness(), examples, Attack(epsilon=0.06, step=0.02, iterations=5, targeted=True))
    assert [row["success"] for row in found["rows"]] == [25, 50, 50, 75, 75, 75]
    assert [row["top1"] for row in found["rows"]] == [75, 50, 50, 25, 25, 25]
    levels = [level / 255 - 0.5 for level in (115, 125, 140, 0)]
    expected = sum(math.log1p(math.exp(-2 * level)) for level in levels) / 4
    assert found["rows"][0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_nothing_right_leaves_no_success(tmp_path):
    examples = LabelledImages(_grey(tmp_path, [0], [1]), ["dark", "bright"])
    rows = attack_accuracy(Brightness(), examples, Attack(iterations=1))["rows"]
    assert [(row["success"], row["top1"]) for row in rows] == [(None, 0.0)] * 2


def test_images_whose_scores_overflow_are_wrong_and_do_not_spoil_the_mean_loss(tmp_path):
    alone, bright, both = (
        LabelledImages(_grey(tmp_path / str(number), levels, [0] * len(levels)), ["dark", "bright"])
        for number, levels in enumerate(([100], [255], [100, 255]))
    )
    attack = Attack(epsilon=0.06, step=0.02, iterations=2)
    rows = attack_accuracy(Overflowing(), both, attack)["rows"]
    expected = [row["loss"] for row in attack_accuracy(Brightness(), alone, attack)["rows"]]
    assert [row["loss"] for row in rows] == pytest.approx(expected)
    assert [row["top1"] for row in rows] == [50.0] * 3
    assert {row["top1"] for row in rotation_accuracy(Overflowing(), both)["views"]} == {50.0}
    assert [row["loss"] for row in attack_accuracy(Overflowing(), bright, attack)["rows"]] == [None] * 3
    (loss, _) = gradient_checks({"overflowing": Overflowing()}, bright, attack)
    assert (loss["holds"], loss["sentence"]) == (None, "no image has a finite loss")
    draw_attacked("overflowing", Overflowing(), bright, attack, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_accuracy_falls_with_iterations(runs, examples, targeted):
    attack = Attack(STRONG.epsilon, STRONG.step, STRONG.iterations, targeted)
    for model in map(load_model, runs):
        rows = attack_accuracy(model, examples, attack)["rows"]
        top1, success, losses = ([row[key] for row in rows] for key in ("top1", "success", "loss"))
        assert top1 == sorted(top1, reverse=True)
        assert success == sorted(success)
        assert losses == sorted(losses, reverse=targeted)
        assert top1[0] == 100
        assert top1[-1] < 50 < success[-1]


@pytest.mark.parametrize("options", [{}, {"random_start": True}, {"random_start": True, "restarts": 2}], ids=str)
def test_one_run_serves_fewer_iterations_too(runs, examples, options):
    model = load_model(runs[0])
    long = attack_accuracy(model, examples, Attack(STRONG.epsilon, STRONG.step, 4, **options))["rows"]
    for iterations in (1, 2, 3):
        short = attack_accuracy(model, examples, Attack(STRONG.epsilon, STRONG.step, iterations, **options))["rows"]
        assert short == [pytest.approx(row) for row in long[: iterations + 1]]


def test_epsilon_0_changes_nothing(runs, examples):
    for aim in (False, True):
        attack = Attack(epsilon=0, iterations=3, targeted=aim, random_start=True, restarts=2)
        model = load_model(runs[0])
        # Some images should be wrong.
        model.fc.bias.data[0] += 1
        found = attack_accuracy(model, examples, attack)
        assert 0 < found["top1"] < 100
        assert {row["top1"] for row in found["rows"]} == {found["top1"]}
        assert found["top1"] == evaluate(model, examples.images, examples.class_names).top1
    network, images = _network("pairwise"), _pixels(2, 3, 16, 16)
    attacked = attack_images(network, images, torch.tensor([0, 1]), Attack(epsilon=0, random_start=True))
    assert torch.equal(attacked.images, images)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_each_image_keeps_the_restart_that_reached_the_aim(runs, examples, targeted):
    network = PixelModel(load_model(runs[0]))
    ((images, labels, *_),) = examples.batches(network)
    options = {"epsilon": 20 / 255, "step": 5 / 255, "iterations": 4, "targeted": targeted}
    attack = Attack(**options, random_start=True, restarts=4, seed=3)
    found = attack_images(network, images, labels, attack)
    aims = wrong_labels(labels, 3, range(24), 3) if targeted else labels
    singles = []
    with frozen(network):
        for restart in range(4):
            start = random_start(images, 20 / 255, range(24), 3, restart)
            singles.append(list(pgd(network, images, aims, **options, start=start)))
    classes = torch.stack([torch.stack([each.logits.argmax(1) for each in single]) for single in singles])
    reached = (classes == aims) if targeted else (classes != aims)
    assert torch.equal(found.reached, reached.any(0))
    assert (reached.any(0) != reached[0]).any()
    # The first that reached it, or the first of all.
    first = reached.int().argmax(0)
    assert torch.equal(found.predicted, classes.gather(0, first[None])[0])
    losses = torch.stack([torch.stack([each.losses for each in single]) for single in singles])
    torch.testing.assert_close(found.losses, losses.gather(0, first[None])[0])
    last = torch.stack([single[-1].images for single in singles])
    torch.testing.assert_close(found.images, last[first[-1], torch.arange(24)])


def test_what_is_drawn_depends_on_seed_and_image_alone(runs, examples):
    labels, images = torch.arange(30) % 3, _pixels(30, 3, 4, 4, dtype=torch.float32)
    targets, starts = wrong_labels(labels, 3, range(30), seed=1), random_start(images, 0.1, range(30), seed=1)
    some = [20, 3, 7]
    assert torch.equal(wrong_labels(labels[some], 3, some, seed=1), targets[some])
    assert torch.equal(random_start(images[some], 0.1, some, seed=1), starts[some])
    assert not torch.equal(wrong_labels(labels, 3, range(30), seed=2), targets)
    for other in (random_start(images, 0.1, range(30), seed=2), random_start(images, 0.1, range(30), 1, restart=1)):
        assert (other == starts).float().mean() < 0.1
    model = load_model(runs[1])
    attack = Attack(STRONG.epsilon, STRONG.step, 2, targeted=True, random_start=True, restarts=2, seed=5)
    rows = []
    for batch_size in (64, 64, 7):
        few = LabelledImages(examples.images, examples.class_names, batch_size=batch_size)
        rows.append(attack_accuracy(model, few, attack)["rows"])
    assert rows[0] == rows[1]
    assert rows[2] == [pytest.approx(row) for row in rows[0]]


def test_targets_and_starts_are_drawn_apart():
    """A target must not tell where the attack begins."""
    indices, images = range(2000), torch.full((2000, 1, 1, 1), 0.5)
    targets = wrong_labels(torch.zeros(2000, dtype=torch.int64), 100, indices)
    noise = torch.stack([random_start(images, 0.1, indices, restart=restart).flatten() for restart in range(2)])
    correlations = torch.corrcoef(torch.cat([targets[None], noise]))
    assert correlations.fill_diagonal_(0).abs().max() < 0.08  # 3.5 standard deviations


def test_wrong_labels_are_uniform_and_starts_fill_the_cube():
    labels = torch.arange(6000) % 4
    targets = wrong_labels(labels, 4, range(6000))
    assert (targets != labels).all()
    shares = torch.bincount((targets - labels) % 4, minlength=4) / 6000
    assert shares[0] == 0
    assert (shares[1:] - 1 / 3).abs().max() < 0.02  # 3 standard deviations
    images = torch.full((200, 3, 4, 4), 0.5)
    noise = random_start(images, 0.25, range(200)) - images
    assert 0.24 < noise.max() <= 0.25
    assert -0.25 <= noise.min() < -0.24
    assert noise.abs().mean().item() == pytest.approx(0.125, abs=0.005)
    assert (noise[:, 0, 0, 0].unique().numel(), noise[0].unique().numel()) == (200, 48)


def test_network_is_left_as_it_was(examples):
    """Statistics, modes, gradients and what they are wanted for; also after an error."""
    model = san.create_model("san4_pairwise", 3, **NETWORK).train()
    model.pretrained_cfg.update(input_size=(3, 16, 16), label_names=["blue", "green", "red"])
    model.conv_in.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attack_accuracy(model, examples, Attack(iterations=2, random_start=True))
    rotation_accuracy(model, examples, [45])
    with frozen(PixelModel(model)):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), frozen(PixelModel(model)):
        _ = 1 / 0
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


# Whether gradients are masked


class Masked(nn.Module):
    """The same answers but for rounding, and gradients that are 0: pixels are rounded to 32 levels first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.pretrained_cfg, self.num_classes = network, network.pretrained_cfg, network.num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.round(x * 8) / 8)


def test_gradients_of_trained_networks_are_not_masked(runs, examples):
    rows = gradient_checks({run: load_model(run) for run in runs}, examples, STRONG)
    one, two = runs
    assert [(row["check"], row["model"]) for row in rows[:4]] == [
        ("loss", one),
        ("loss", two),
        ("large epsilon", one),
        ("large epsilon", two),
    ]
    assert [(row["source"], row["model"]) for row in rows[4:]] == [(two, one), (one, two)]
    assert all(row["holds"] is True for row in rows)
    assert all(row["transfer"] < row["white_box"] for row in rows[4:])
    assert all(len(row["losses"]) == STRONG.iterations + 1 for row in rows[:2])


def test_masked_gradients_are_noticed(runs, examples):
    """Every check fails that looks at a network whose gradients lead nowhere."""
    open_one, masked = load_model(runs[0]), Masked(load_model(runs[0])).eval()
    rows = gradient_checks({"open": open_one, "masked": masked}, examples, STRONG)
    holds = {(row["check"], row["model"]): row["holds"] for row in rows}
    assert holds == {
        ("loss", "open"): True,
        ("loss", "masked"): False,
        ("large epsilon", "open"): True,
        ("large epsilon", "masked"): False,
        ("transfer", "open"): True,
        ("transfer", "masked"): False,
    }


def test_margin_is_the_distance_to_the_best_other_class():
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [-1.0, -1.0, -4.0]])
    assert margin(logits, torch.tensor([1, 2, 0])).tolist() == [-3.0, 3.0, 0.0]


def test_what_a_saturated_softmax_hides_the_margin_finds(tmp_path):
    """Scores of ±10⁴: the cross-entropy and its gradient are exactly 0, so the attack stays where it is."""
    examples, saturated = LabelledImages(_grey(tmp_path, [125], [0]), ["dark", "bright"]), Brightness()
    saturated.scale.data *= 1e6
    attacks = {loss: Attack(0.1, 0.05, 2, loss=loss) for loss in ("cross_entropy", "margin")}
    success = {loss: attack_accuracy(saturated, examples, attack)["rows"][-1] for loss, attack in attacks.items()}
    assert (success["cross_entropy"]["success"], success["margin"]["success"]) == (0.0, 100.0)
    holds = {loss: gradient_checks({"it": saturated}, examples, attack) for loss, attack in attacks.items()}
    assert [row["holds"] for row in holds["cross_entropy"]] == [False, False]
    assert [row["holds"] for row in holds["margin"]] == [True, True]
    assert "margin" in holds["cross_entropy"][1]["sentence"]


def test_transfer_counted_by_hand(tmp_path):
    """Of 0, 115, 125 and 140 of 255, the early one calls 0 and 115 dark; ε = 0.03 lifts 115 above its border alone."""
    examples = LabelledImages(_grey(tmp_path, [0, 115, 125, 140], [0] * 4), ["dark", "bright"])
    rows = gradient_checks(
        {"early": Brightness(0.47), "usual": Brightness(0.5)}, examples, Attack(0.03, 0.03, iterations=1)
    )
    found = [(row["source"], row["model"], row["transfer"], row["white_box"]) for row in rows[4:]]
    third = pytest.approx(100 / 3)
    assert found == [("usual", "early", 50.0, 50.0), ("early", "usual", third, third)]
    still = gradient_checks({"early": Brightness(0.47), "usual": Brightness(0.5)}, examples, Attack(0, 0.03, 1))
    assert [row["holds"] for row in still[4:]] == [None, None], "nothing to compare"


class Waves(Hand):
    """Dark and bright take turns every 0.05 of the mean of all pixels."""

    def __init__(self) -> None:
        super().__init__(["dark", "bright"])

    def forward(self, x: Tensor) -> Tensor:
        level = self.scale * torch.cos(20 * math.pi * x.mean((1, 2, 3)))
        return torch.stack([level, -level], 1)


def test_a_loss_that_falls_again_is_noticed(tmp_path):
    """From 0.02 to 0.05, where the loss is highest, and with the next step beyond."""
    examples = LabelledImages(_grey(tmp_path, [5], [0]), ["dark", "bright"])
    (row, _) = gradient_checks({"waves": Waves()}, examples, Attack(0.1, 0.03, 2))
    first, highest, last = row["losses"]
    assert first < last < highest
    assert row["holds"] is False
    assert row["sentence"].endswith("in 2 iterations, but it falls in between")
    (line, _, warning) = check_lines({"checks": [row, {**row, "holds": True}]})
    assert line.startswith("FAILS: loss, waves: ")
    assert "gradients may be masked" in warning
    (row, _) = gradient_checks({"waves": Waves()}, examples, Attack(0.1, 0.03, 1))
    assert row["holds"] is True
    assert not row["sentence"].endswith("between")
    (row, _) = gradient_checks({"waves": Waves()}, examples, Attack(0, 0.03, 1))
    assert row["holds"] is None


def test_networks_that_see_other_pixels_are_not_compared(runs, examples):
    models = {run: load_model(run) for run in runs}
    models[runs[1]].pretrained_cfg["input_size"] = (3, 24, 24)
    assert {row["check"] for row in gradient_checks(models, examples, Attack(iterations=1))} == {
        "loss",
        "large epsilon",
    }


# The whole


def test_measure_puts_networks_side_by_side(runs, examples):
    chosen = Settings(angles=(45.0,), iterations=(1, 3), epsilon=48 / 255, step=12 / 255, checks=False)
    models = {run: load_model(run) for run in runs}
    result = json.loads(json.dumps(measure(models, examples, chosen)))
    assert (result["images"], result["data"], result["broken"], result["checks"]) == (24, "24 images", [], [])
    assert [row["model"] for row in result["models"]] == runs
    for row in result["models"]:
        assert row["rotation"] == rotation_accuracy(models[row["model"]], examples, [45.0])
        assert list(row["attacks"]) == ["untargeted", "targeted"]
        for aim, found in row["attacks"].items():
            attack = Attack(48 / 255, 12 / 255, 3, targeted=aim == "targeted")
            assert found == attack_accuracy(models[row["model"]], examples, attack)


def test_a_curve_goes_to_50():
    assert Settings(curve=True).attack("targeted") == Attack(iterations=50, targeted=True)
    assert Settings(iterations=(3, 60), curve=True).attack("untargeted").iterations == 60
    assert Settings(iterations=(1,)).attack("untargeted").iterations == 1


def test_some_images_are_spread_over_the_set(tmp_path):
    """A set in the order of its classes, as folders give it, stays mixed."""
    images = _grey(tmp_path, [0] * 12, [0] * 4 + [1] * 4 + [2] * 4)
    assert spread(images, 3).labels.tolist() == [0, 1, 2]
    assert spread(images, 6).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert spread(images, 12) is spread(images, 100) is images


def test_broken_images_are_left_out_and_named(tmp_path):
    images = _grey(tmp_path, [0, 0, 255, 255], [0, 0, 1, 1])
    Path(images.paths[2]).write_bytes(b"no image")
    examples = LabelledImages(images, ["dark", "bright"], batch_size=2)
    found = attack_accuracy(Brightness(), examples, Attack(iterations=1))
    assert (found["images"], found["top1"], examples.broken.names) == (3, 100.0, [images.paths[2]])
    Path(images.paths[3]).write_bytes(b"no image")
    with pytest.raises(UserError, match="2 of 4 images cannot be read"):
        rotation_accuracy(Brightness(), LabelledImages(images, ["dark", "bright"]))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epsilon": -1 / 255}, "epsilon is -0.00392157, but pixels go from 0 to 1"),
        ({"epsilon": 8}, "such as 8/255"),
        ({"step": math.nan}, "step is nan"),
        ({"iterations": 0}, "iterations is 0, but it must be at least 1"),
        ({"restarts": 3}, "all the same: add a random start"),
        ({"seed": -1}, "seed is -1"),
        ({"loss": "margins"}, "unknown; choose among: cross_entropy, margin"),
    ],
    ids=str,
)
def test_impossible_attacks(values, sentence):
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        Attack(**values)


def test_mistakes(tmp_path):
    images = _grey(tmp_path, [0, 255], [0, 1])
    with pytest.raises(UserError, match="no labels"):
        rotation_accuracy(Brightness(), LabelledImages(ImageFiles(images.paths), ["dark", "bright"]))
    with pytest.raises(UserError, match=r"the dark one cannot be judged: the model does not know 1 of the data's"):
        measure({"the dark one": Brightness()}, LabelledImages(images, ["dark", "blue"]), Settings())
    with pytest.raises(UserError, match="not a single image"):
        attack_accuracy(Brightness(), LabelledImages(ImageFiles([], []), ["dark", "bright"]))
    with pytest.raises(UserError, match="at least two classes"):
        wrong_labels(torch.zeros(1, dtype=torch.int64), 1, [0])
    with pytest.raises(UserError, match="nothing to measure"):
        Settings(rotation=False, aims=())
    with pytest.raises(UserError, match="'sideways' is unknown; choose among: untargeted, targeted"):
        Settings(aims=("sideways",))


# The command


@pytest.fixture
def run(capsys):
    """Run `san robustness` in this process; gives (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["robustness", *map(str, words)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def test_attacked_images_come_with_what_changed_in_the_attention(examples, runs, tmp_path, monkeypatch):
    """Half of what a map lost and another gained: here all of it moves, from the left half to the right one."""
    titles, maps = [], torch.zeros(2, 1, 28, 28)
    maps[0, :, :, :14], maps[1, :, :, 14:] = 2 / 28**2, 2 / 28**2
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    turns = iter(maps)
    draw_attacked("it", load_model(runs[0]), examples.some(1), Attack(), tmp_path / "a.png", lambda *_: next(turns))
    assert titles[1] == "what is added, magnified 15.9× (grey: 0)"
    assert titles[3] == "attention: 100 % moved"
    draw_attacked("it", load_model(runs[0]), examples.some(1), Attack(), tmp_path / "b.png", lambda *_: None)
    widths = [Image.open(tmp_path / f"{name}.png").width for name in "ab"]
    assert widths[0] / widths[1] == pytest.approx(4 / 3, rel=0.01)


def test_titles_of_attacked_images_fit_above_them(tmp_path, monkeypatch):
    """Of classes with long names, whether they are recognised or taken for each other."""
    titles, folder = [], tmp_path / "images"
    names = ["a dark picture of nothing that anybody knows", "every bright picture"]
    for name in names:
        (folder / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (128,) * 3).save(folder / "test" / name / "grey.png")
    model, dataset = Brightness(), load_dataset(str(folder))
    model.pretrained_cfg["label_names"] = names
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    examples = LabelledImages(dataset.split("test"), dataset.class_names)
    draw_attacked("it", model, examples, Attack(), tmp_path / "a.png")
    assert max(len(line) for title in titles for line in title.split("\n")) <= 42
    plain = [title.replace("\n", " ") for title in titles]
    assert plain[0] == f"{names[0]}, taken for {names[1]}"
    assert plain[3] == f"{names[1]}, recognised"


@pytest.mark.parametrize(("angles", "step"), [((0, 10, 45), 15), (range(0, 360, 15), 30), (range(-360, 361, 90), 90)])
def test_angles_are_numbered_at_parts_of_a_right_angle(angles, step, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    curve = [{"angle": angle, "top1": 50.0} for angle in angles]
    draw_angles({"models": [{"model": "it", "rotation": {"angles": curve}}]}, tmp_path / "angles")
    ((axes,),) = (figure.axes for figure in drawn)
    assert set(np.diff(axes.get_xticks())) == {step}


def test_curves_of_a_model_whose_name_matplotlib_hides(tmp_path):
    curve = [{"angle": angle, "top1": 50.0} for angle in (0, 90)]
    draw_angles({"models": [{"model": "_run", "rotation": {"angles": curve}}]}, tmp_path / "angles")
    assert (tmp_path / "angles.png").exists()


def test_command_prints_tables_and_keeps_files(run, runs, tmp_path):
    code, out, err = run(*runs, "--angles", "0,45", "--epsilon", "48/255", "--step", 0.05, "--out", tmp_path / "r")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line]
    assert lines[0] == ["model", "0°", "90°", "180°", "270°", "upside-down"]
    short = ["pairwise", "patchwise"]
    assert [line[0] for line in lines[1:3]] == short, "without the folder that both lie in"
    assert ["angle", *short] in lines
    assert [line[:3] for line in lines if line[0].endswith("targeted")] == [
        [aim, number, name] for aim in ("untargeted", "targeted") for number in ("2", "4") for name in short
    ]
    assert sum(line[0] == "holds:" for line in lines) == 6
    assert "24 test images of " in out
    written = [Path(path) for path in out.splitlines()[-1].removeprefix("wrote ").split(", ")]
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {path.name for path in written}
    assert {"robustness.json", "robustness.md", "angles.png", "angles.svg", "iterations.png", "iterations.svg"} < names
    attacked = [name for name in names if name.startswith("attacked-")]
    assert len(attacked) == 2
    assert (tmp_path / "r" / "iterations.svg").read_text().count('<g id="legend_') == 1, "one for its four panels"
    page = (tmp_path / "r" / "robustness.md").read_text()
    assert all(f"]({name})" in page for name in ["angles.png", "iterations.png", *attacked])
    with Image.open(tmp_path / "r" / attacked[0]) as picture:
        assert picture.width == 4 * 3 * 120, "a picture of the attention in each row"
    for name in ["angles.png", "iterations.png", *attacked]:
        with Image.open(tmp_path / "r" / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 50
    result = json.loads((tmp_path / "r" / "robustness.json").read_text())
    assert result["checkpoints"] == dict(zip(short, runs, strict=True))
    for row in result["models"]:
        assert f"{row['attacks']['untargeted']['rows'][4]['success']:.2f}" in page
        assert row["rotation"]["views"][0]["top1"] == row["attacks"]["targeted"]["top1"] == 100.0


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_numbers(run, runs, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no room for pictures")

    monkeypatch.setattr("san.evaluation.robustness.figures.write_images", fail)
    for name in ("attacked-2-old.png", "angles.svg", "angles.csv"):
        (tmp_path / name).write_text("of an earlier run")
    words = ("--limit", 2, "--no-checks", "--no-rotation", "--out", tmp_path)
    assert run(runs[0], *words)[::2] == (2, "san: error: no room for pictures\n")
    assert json.loads((tmp_path / "robustness.json").read_text())["images"] == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"robustness.json", "robustness.md", "iterations.png", "iterations.svg", "angles.csv"}


def test_command_prints_json_of_some_images(run, runs, images):
    words = (runs[0], "--data", images, "--limit", 6, "--no-checks", "--angles", "none", "--curve", "--json")
    code, out, err = run(*words, "--attack", "untargeted", "--random-start", "--restarts", 2, "--batch-size", 4)
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert result["data"] == f"6 of 24, evenly spread, of the test images of {images}"
    (row,) = result["models"]
    assert row["rotation"]["angles"] == []
    assert (row["attacks"]["untargeted"]["images"], len(row["attacks"]["untargeted"]["rows"])) == (6, 51)


def test_command_refuses_what_cannot_be_compared(run, runs, images, tmp_path):
    other = make_images(tmp_path / "other", names=("green", "cyan", "red"))
    stranger = tmp_path / "run"
    stranger.mkdir()
    (stranger / "model.safetensors").write_bytes((Path(runs[0]) / "model.safetensors").read_bytes())
    (stranger / "config.yaml").write_text(f"data: {other}\nseed: 0\nvalidation_share: 0.2\n")
    mistakes = {
        "were not trained on the same images; compare them on test images of --data WHERE": (runs[0], stranger),
        f"{runs[0]} cannot be judged: the model does not know 1 of the data's 3 classes (cyan)": (
            runs[0],
            "--data",
            other,
        ),
        f"{runs[0]}/ is named twice": (runs[0], f"{runs[0]}/"),
        "CHECKPOINTS is missing": (),
        "limited to 0, but it must be at least 1": (runs[0], "--limit", 0),
        "epsilon is -0.00392157, but pixels go from 0 to 1": (runs[0], "--epsilon=-1/255"),
        "--epsilon takes numbers and fractions such as 8/255, not 8/0": (runs[0], "--epsilon", "8/0"),
        "--step takes numbers and fractions such as 8/255, not 1,2": (runs[0], "--step", "1,2"),
        "--angles takes numbers and fractions such as 8/255, not a": (runs[0], "--angles", "a,b"),
        "the batch size is 0": (runs[0], "--batch-size", 0),
        "the number of workers is -1": (runs[0], "--workers=-1"),
        "the number of figures is -1": (runs[0], "--figures", -1),
    }
    for sentence, words in mistakes.items():
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert sentence in err
        assert err.startswith("san: error: ")
        assert "Traceback" not in err
