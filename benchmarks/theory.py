"""The numbers and figures of docs/theory.md, from trained networks of any kind.

    python benchmarks/theory.py RUN... [--data digits] [--limit N] [--out docs/theory]
    python benchmarks/theory.py [--out docs/theory]

Runs are run folders or checkpoints, and are called by their own names. Written are theory.json, which holds every
number, and four figures drawn from it; the document's tables are printed. Without runs, figures and tables are made
again from the theory.json that is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from torch import Tensor, nn

from san import PatchwiseAttention
from san.checkpoints import load_model
from san.data import load_dataset
from san.errors import UserError
from san.evaluation.invariance import measure, patchwise_from_convolution
from san.evaluation.invariance.figures import draw_networks, draw_operators
from san.evaluation.invariance.networks import in_random_order
from san.evaluation.invariance.operators import footprint_of, operators_with_inputs, shuffled
from san.evaluation.invariance.tables import as_markdown, heading, rounding
from san.evaluation.robustness import LabelledImages, PixelModel, spread
from san.ops import Footprint

__all__ = ["CONVOLUTIONS", "convolution_table", "cube", "draw", "main", "measured", "tables"]

POINTS = 300
"""Outputs that a scatter plot shows of each network."""
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3×3, 3 → 16": {"in_channels": 3, "out_channels": 16, "kernel_size": 3},
    "3×3, 16 → 3": {"in_channels": 16, "out_channels": 3, "kernel_size": 3},
    "3×3, 64 → 64": {"in_channels": 64, "out_channels": 64, "kernel_size": 3},
    "7×7, 3 → 8, stride 2": {"in_channels": 3, "out_channels": 8, "kernel_size": 7, "stride": 2},
    "5×5, 32 → 32, depthwise": {"in_channels": 32, "out_channels": 32, "kernel_size": 5, "groups": 32},
    "3×3, 16 → 32, dilation 2, 4 groups": {
        "in_channels": 16,
        "out_channels": 32,
        "kernel_size": 3,
        "dilation": 2,
        "groups": 4,
    },
}
"""Convolutions for which the construction is tried, by name; padded so that stride 1 keeps the size."""


def cube() -> nn.Module:
    """The smallest patchwise attention that no convolution equals: one channel, one place, y = x³, in eval mode.

    β and φᵀψ are x and x², and γ's BatchNorm and ReLU let x² through.
    """
    layer = PatchwiseAttention(1, 1, 1, relation="star", mapping="L", share=1).double().eval()
    norm: Any = layer.conv_w[0]
    with torch.no_grad():
        for part in (layer.conv1, layer.conv2, layer.conv3, layer.conv_w[2]):
            part.weight.fill_(1.0)
            part.bias.zero_()
        norm.weight.fill_((norm.running_var + norm.eps).sqrt().item())
    return layer


def tried(settings: dict[str, Any]) -> dict[str, Any]:
    """Widths of the construction for a convolution of random weights, and its largest error in float64."""
    torch.manual_seed(0)
    padding = settings.get("dilation", 1) * (settings["kernel_size"] - 1) // 2
    convolution = nn.Conv2d(**settings, padding=padding).double()
    pair = patchwise_from_convolution(convolution)
    x = torch.randn(2, settings["in_channels"], 20, 17, dtype=torch.float64)
    attention: Any = pair[0]
    with torch.no_grad():
        error = float((pair(x) - convolution(x)).abs().max())
    return {"value_channels": attention.out_channels, "weight_groups": attention.groups, "largest_error": error}


def convolution_table(numbers: dict[str, Any]) -> str:
    """The table of widths and errors."""
    lines = ["| convolution | value channels V | weight groups G | largest error |", "| --- | --- | --- | --- |"]
    for name, row in numbers["kernels"].items():
        lines.append(
            f"| {name} | {row['value_channels']} | {row['weight_groups']} | {rounding(row['largest_error'])} |"
        )
    return "\n".join(lines)


def tables(numbers: dict[str, Any]) -> dict[str, str]:
    """Every table of the document, from the numbers that are kept."""
    return {"convolutions": convolution_table(numbers["convolution"]), **as_markdown(numbers["invariance"])}


def convolutions(image: Tensor) -> dict[str, Any]:
    """What section 2 shows: widths and errors, an image [1, 1, H, W] filtered both ways, and y = x³."""
    sobel = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    sobel.weight.data[:] = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    line = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    with torch.no_grad():
        filtered = {"convolution": sobel(image), "attention": patchwise_from_convolution(sobel)(image)}
        curve = cube()(line[:, None, None, None]).flatten()
    return {
        "kernels": {name: tried(settings) for name, settings in CONVOLUTIONS.items()},
        "image": image[0, 0].tolist(),
        **{name: found[0, 0].tolist() for name, found in filtered.items()},
        "curve": {"x": line.tolist(), "y": curve.tolist()},
    }


def footprints(models: dict[str, nn.Module], examples: LabelledImages) -> dict[str, Any]:
    """What section 1 shows: an image with places permuted, and outputs of each network's first operator."""
    image = next(examples.some(1).batches(PixelModel(next(iter(models.values()))))).images.double()
    return {
        "image": image[0, 0].tolist(),
        "permuted": shuffled(image, Footprint(3))[0][0, 0].tolist(),
        "outputs": {name: _first_outputs(model, examples) for name, model in models.items()},
    }


def _first_outputs(model: nn.Module, examples: LabelledImages) -> dict[str, Any]:
    """Outputs at the centres, before and after, some of them, of the first operator with a footprint."""
    network = PixelModel(model)
    pixels = network.normalise(next(examples.some(8).batches(network)).images)
    name, operator, x = operators_with_inputs(model, pixels)[0]
    moved, (rows, columns) = shuffled(x, footprint_of(operator))
    with torch.no_grad():
        before, after = (operator(each)[:, :, rows, columns].flatten() for each in (x, moved))
    chosen = torch.randperm(len(before), generator=torch.Generator().manual_seed(0))[:POINTS]
    return {"operator": name, "before": before[chosen].tolist(), "after": after[chosen].tolist()}


def draw_footprints(numbers: dict[str, Any], target: Path) -> None:
    """The image, its places permuted, and a scatter plot for every network."""
    outputs = numbers["outputs"]
    figure, panels = pyplot.subplots(1, 2 + len(outputs), figsize=(2.6 * (2 + len(outputs)), 3.5), layout="constrained")
    for axes, name in zip(panels, ("image", "permuted"), strict=False):
        axes.imshow(numbers[name], cmap="gray")
        axes.set_title({"image": "an image", "permuted": "places permuted\nin 3×3 windows"}[name], fontsize="medium")
        axes.set_axis_off()
    for axes, (name, found) in zip(panels[2:], outputs.items(), strict=True):
        axes.plot(found["before"], found["after"], ".", markersize=3)
        axes.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axes.set_title(f"{name}\n{found['operator']}", fontsize="medium")
        axes.set(xlabel="output", box_aspect=1)
    panels[2].set_ylabel("output, places permuted")
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def draw_convolution(numbers: dict[str, Any], target: Path) -> None:
    """An image filtered by a convolution and by attention, their difference, and y = x³."""
    figure, panels = pyplot.subplots(1, 5, figsize=(13.5, 3), layout="constrained")
    one, other = (torch.tensor(numbers[name], dtype=torch.float64) for name in ("convolution", "attention"))
    difference = float((one - other).abs().max())
    pictures = {
        "an image": numbers["image"],
        "Sobel's kernel by conv2d": one.tolist(),
        "by patchwise attention": other.tolist(),
        f"largest difference {rounding(difference)}": (one - other).tolist(),
    }
    limit = float(one.abs().max())
    for axes, (title, picture) in zip(panels, pictures.items(), strict=False):
        limits = {} if title == "an image" else {"vmin": -limit, "vmax": limit}
        axes.imshow(picture, cmap="gray", **limits)
        axes.set_title(title, fontsize="medium")
        axes.set_axis_off()
    curve = numbers["curve"]
    panels[4].plot(curve["x"], curve["y"], label="patchwise attention: y = x³")
    panels[4].plot(curve["x"], curve["x"], label="a convolution: y = x")
    panels[4].set(xlabel="x")
    panels[4].set_title("one place, one channel", fontsize="medium")
    panels[4].legend(fontsize="small")
    panels[4].grid(alpha=0.3)
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def draw(numbers: dict[str, Any], folder: Path) -> None:
    """The four figures."""
    draw_footprints(numbers["footprints"], folder / "footprints.png")
    draw_convolution(numbers["convolution"], folder / "convolution.png")
    draw_operators(numbers["invariance"], folder / "operators.png")
    draw_networks(numbers["invariance"], folder / "networks.png")


def measured(runs: list[str], data: str, limit: int | None) -> dict[str, Any]:
    """Every number of theory.json."""
    models = {Path(run).stem: load_model(run).eval() for run in runs}
    dataset = load_dataset(data)
    images = dataset.split("test")
    chosen = images if limit is None else spread(images, limit)
    examples = LabelledImages(chosen, dataset.class_names, name=f"{len(chosen)} test images of {data}")
    network = PixelModel(next(iter(models.values())))
    first = next(in_random_order(examples).batches(network)).images[:1, :1]
    return {
        "footprints": footprints(models, examples),
        "convolution": convolutions(first.double()),
        "invariance": measure(models, examples),
    }


def main(words: list[str] | None = None) -> None:
    """Parse, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders or checkpoints")
    parser.add_argument("--data", default="digits", help="images whose test part is looked at (default digits)")
    parser.add_argument("--limit", type=int, help="only so many of the images")
    parser.add_argument("--out", type=Path, default=Path("docs/theory"), help="folder (default docs/theory)")
    arguments = parser.parse_args(words)
    kept = arguments.out / "theory.json"
    if arguments.runs:
        try:
            numbers = measured(arguments.runs, arguments.data, arguments.limit)
        except UserError as problem:
            parser.error(str(problem))
        arguments.out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
    elif not kept.is_file():
        parser.error(f"there is no {kept} to draw again; name run folders or checkpoints")
    numbers = json.loads(kept.read_text(encoding="utf-8"))
    draw(numbers, arguments.out)
    print(heading(numbers["invariance"]), *tables(numbers).values(), sep="\n\n")


if __name__ == "__main__":
    main()
