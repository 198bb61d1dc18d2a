"""The functions behind the commands that judge and use trained networks: load what was named, call the library, print.

Results go to standard output, as text or with `--json` as JSON; progress goes to standard error, and only to a
terminal. What takes seconds to import is imported inside, so that help and mistakes in the arguments come at once.
"""

from __future__ import annotations

import json as jsonlib
import shlex
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from san.errors import UserError

__all__ = ["benchmark", "complexity", "convert", "evaluate", "predict", "reproduce", "robustness"]

# What `san reproduce` hands to `san.training.train`.
_OF_TRAIN = ("epochs", "batch_size", "image_size", "learning_rate", "workers", "precision", "devices")

_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def evaluate(
    checkpoint: str,
    *,
    data: str | None = None,
    split: Literal["test", "validation", "train"] = "test",
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    max_broken: float = 0.01,
    json: bool = False,
) -> None:
    """Tell how often a trained network is right on labelled images.

    Prints top-1 and top-5 accuracy, both for every class, and what a class is most often taken for; with --json also
    the confusion matrix, a row for each true class. With five classes or fewer top-5 is always 100 %, so only JSON
    has it. Images that cannot be read are named and left out.

    Classes are matched by name. A model of 1000 classes without names is taken for one of ImageNet where all folders
    of the data are named by ImageNet's WordNet ids, such as n01440764; they may be some of the 1000.

    Args:
        checkpoint: A run folder, a .safetensors file or a published .pth.
        data: digits, a folder or archive with val/ or test/, or a data set's name; default what a run was trained on.
        split: Which of its images.
        batch_size: Images at a time.
        workers: Processes that read ahead; 0 reads in the main process.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        max_broken: Share of the images that may be unreadable.
        json: Print JSON.
    """
    from san.checkpoints import load_model
    from san.data import load_dataset
    from san.evaluation.accuracy import evaluate

    model = load_model(checkpoint).to(_device(device))
    dataset = load_dataset(**_trained_on(checkpoint, data))
    accuracy = evaluate(
        model,
        dataset.split(split),
        dataset.class_names,
        batch_size=batch_size,
        workers=workers,
        max_broken=max_broken,
        progress=_progress,
    )
    if json:
        print(jsonlib.dumps(accuracy.as_dict(), ensure_ascii=False))
        return
    for name in accuracy.broken:
        print(f"not readable: {name}")
    has_top5 = len(accuracy.class_names) > 5
    rows = [{key: value for key, value in row.items() if has_top5 or key != "top5"} for row in accuracy.per_class()]
    top5 = f", top-5 {accuracy.top5:.2f} %" if has_top5 else ""
    print(_table(rows))
    print(f"top-1 {accuracy.top1:.2f} %{top5} of {accuracy.images} images")


def predict(
    checkpoint: str, *images: str, top: int = 5, batch_size: int = 32, device: str | None = None, json: bool = False
) -> None:
    """Name the likeliest classes of images.

    Prints a line for each image: its path, then classes and probabilities, best first; with --json an object a line.
    A file that is no image is reported on standard error and skipped; the others are still judged, and the exit code
    is 2 then. The classes of a model of 1000 classes without names are called by ImageNet's words.

    Args:
        checkpoint: A run folder, a .safetensors file or a published .pth.
        images: Image files, folders (every image below), or - for a list of paths on standard input.
        top: How many classes to name.
        batch_size: Images at a time.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        json: Print JSON lines.
    """
    from san.checkpoints import load_model
    from san.evaluation.prediction import predict

    if not images:
        raise UserError("there is nothing to predict: name image files, folders, or - for a list on standard input")
    paths = _paths(images)
    model = load_model(checkpoint).to(_device(device))
    broken = judged = 0
    for prediction in predict(model, paths, top=top, batch_size=batch_size):
        judged += 1
        broken += prediction.error is not None
        if prediction.error is not None:
            print(f"san: {prediction.error}; skipped", file=sys.stderr)
        if json:
            print(jsonlib.dumps(asdict(prediction), ensure_ascii=False), flush=True)
        elif prediction.error is None:
            answers = zip(prediction.classes, prediction.probabilities, strict=True)
            print(prediction.image, *(f"{name} {100 * share:.1f} %" for name, share in answers), sep="\t", flush=True)
    if broken:
        raise UserError(f"{broken} of {judged} images could not be read and were skipped; they are named above")


def robustness(
    *checkpoints: str,
    data: str | None = None,
    split: Literal["test", "validation", "train"] = "test",
    limit: int | None = None,
    rotation: bool = True,
    angles: float | str = "0,30,60,90,120,150,180,210,240,270,300,330",
    attack: Literal["both", "untargeted", "targeted", "none"] = "both",
    epsilon: float | str = "8/255",
    step: float | str = "2/255",
    iterations: int | str = "2,4",
    curve: bool = False,
    random_start: bool = False,
    restarts: int = 1,
    seed: int = 0,
    checks: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    max_broken: float = 0.01,
    out: str | None = None,
    figures: int = 4,
    json: bool = False,
) -> None:
    """Tell how trained networks fare on rotated images and under attack, side by side on the same images.

    Rotation: the network's input is turned clockwise by 0, 90, 180 and 270 degrees, or flipped upside down, which
    only moves pixels; and by any angles, interpolated. Nothing is trained for it. 0° is what `san evaluate` tells.

    Attack: projected gradient descent in the L∞ norm (PGD), with the network known to the attacker and its statistics
    frozen. An untargeted attack succeeds where an image that was classified right no longer is, a targeted one where
    an image is taken for a wrong class that was drawn for it. The checks tell whether gradients are worth following:
    the loss grows with iterations, without a bound accuracy falls to about 0, and images made against another network
    do no more harm than those made against the network itself. Lists are separated by commas.

    Args:
        checkpoints: Run folders, .safetensors files or published .pth, which know the same classes.
        data: digits, a folder or archive with val/ or test/, or a data set's name; default what runs were trained on.
        split: Which of its images.
        limit: Judge only so many images, evenly spread over the set; default all.
        rotation: Turn and flip images.
        angles: More angles, in degrees, clockwise; none for none.
        attack: Which attacks.
        epsilon: Largest change of a pixel, for pixels from 0 to 1; a fraction or a number.
        step: Change of a pixel in one iteration, likewise.
        iterations: After how many iterations to tell the result.
        curve: Go on to 50 iterations, for the chart and JSON, which hold every iteration.
        random_start: Start somewhere within epsilon instead of at the image.
        restarts: Random starts; each image's best counts.
        seed: Of everything drawn.
        checks: Check on up to 128 images that gradients are not masked.
        batch_size: Images at a time.
        workers: Processes that read ahead; 0 reads in the main process.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        max_broken: Share of the images that may be unreadable.
        out: Folder for robustness.json, robustness.md and pictures, which replace those of an earlier run.
        figures: How many attacked images to draw for each network, with --out.
        json: Print JSON.
    """
    from san.evaluation.robustness import Settings, measure

    settings = Settings(
        rotation=rotation,
        angles=() if angles == "none" else tuple(_fraction("angles", word) for word in _listed(str(angles))),
        aims=tuple(aim for aim in ("untargeted", "targeted") if attack in (aim, "both")),
        epsilon=_fraction("epsilon", epsilon),
        step=_fraction("step", step),
        iterations=_numbers("iterations", iterations),
        curve=curve,
        random_start=random_start,
        restarts=restarts,
        seed=seed,
        checks=checks,
    )
    if figures < 0:
        raise UserError(f"the number of figures is {figures}, but it must be at least 0")
    options = {"batch_size": batch_size, "workers": workers, "max_broken": max_broken}
    models = _models(checkpoints, device)
    examples = _examples(checkpoints, data, split, limit, options)
    # Before anything is measured: a missing package or folder should not cost the results.
    write = _robustness_writer(out, models, examples, settings, figures) if out is not None else lambda result: []
    result = measure(models, examples, settings)
    written = write(result)
    _show_robustness(result, written, json)


def _models(checkpoints: Sequence[str], device: str | None) -> dict[str, Any]:
    """Every checkpoint's model, by the name that was given."""
    from san.checkpoints import load_model

    if not checkpoints:
        raise UserError("CHECKPOINTS is missing; name run folders, .safetensors files or published .pth")
    if twice := [name for place, name in enumerate(checkpoints) if name in checkpoints[:place]]:
        raise UserError(f"{twice[0]} is named twice; name each checkpoint once")
    place = _device(device)
    return {name: load_model(name).to(place) for name in checkpoints}


def _examples(checkpoints: Sequence[str], data: str | None, split: str, limit: int | None, options: Any) -> Any:
    """The images to judge all checkpoints by."""
    from san.data import load_dataset
    from san.evaluation.robustness import LabelledImages, spread

    asked = _all_trained_on(checkpoints, data, split)
    dataset = load_dataset(**asked)
    images = dataset.split(split)
    chosen = images if limit is None else spread(images, limit)
    part = f"{len(chosen)} of {len(images)}, evenly spread, of the" if len(chosen) < len(images) else len(images)
    name = f"{part} {split} images of {asked['where']}"
    return LabelledImages(chosen, dataset.class_names, name=name, progress=_progress, **options)


def _all_trained_on(checkpoints: Sequence[str], data: str | None, split: str) -> dict[str, Any]:
    """What `load_dataset` is to be asked for so that the images suit all checkpoints, where runs say what they had."""
    runs = [name for name in checkpoints if (Path(name) / "config.yaml").is_file()] or [checkpoints[0]]
    asked = [_trained_on(name, data) for name in runs]
    # Held out images, and how they were chosen, matter for the other splits only.
    matters = ("where",) if split == "test" else ("where", "validation_share", "seed")
    for name, each in zip(runs, asked, strict=True):
        if [each.get(key) for key in matters] != [asked[0].get(key) for key in matters]:
            raise UserError(
                f"{runs[0]} and {name} were not trained on the same images; compare them on test images of --data WHERE"
            )
    return asked[0]


def _robustness_writer(
    folder: str, models: dict[str, Any], examples: Any, settings: Any, figures: int
) -> Callable[[dict[str, Any]], list[Path]]:
    from san.evaluation.robustness.figures import write_images, write_results
    from san.evaluation.speed.chart import make_folder

    path = make_folder(folder)

    def write(result: dict[str, Any]) -> list[Path]:
        images = []
        if settings.aims and figures:
            images = write_images(models, examples, settings.attack(settings.aims[0]), path, figures)
        return write_results(result, path, images)

    return write


def _show_robustness(result: dict[str, Any], written: list[Path], json: bool) -> None:
    from san.evaluation.robustness.tables import check_lines, heading, meaning, tables

    if json:
        print(jsonlib.dumps(result, ensure_ascii=False))
        return
    for name in result["broken"]:
        print(f"not readable: {name}")
    for name, rows in tables(result).items():
        print(_table(rows), meaning(name, result["settings"]), "", sep="\n")
    for line in check_lines(result):
        print(line)
    print(heading(result))
    if written:
        print("wrote " + ", ".join(map(str, written)))


def complexity(*networks: str, input_size: int | None = None, json: bool = False) -> None:
    """Count parameters and multiply-adds of networks, for one image.

    "paper" is the count behind the tables of the SAN paper, which adds to the multiply-adds what biases, relations,
    BatchNorm, ReLU and pooling cost. A network named here has 1000 classes, one from a checkpoint its own.

    Args:
        networks: Names, or checkpoints (run folder, .safetensors, published .pth); default the paper's nine networks.
        input_size: Side of the square image; default the network's own, 224 for those of the paper.
        json: Print a JSON list of {"model", "params", "paper_cost", "macs"}.
    """
    from san.checkpoints import load_model
    from san.evaluation.cost import COMPARED, complexity

    models = (load_model(name) if Path(name).exists() else name for name in networks or COMPARED)
    rows = [complexity(model, input_size) for model in models]
    if json:
        print(jsonlib.dumps(rows))
        return
    table = [
        {
            "model": row["model"],
            "params (M)": _millions(row["params"]),
            "paper (G)": _billions(row["paper_cost"]),
            "multiply-adds (G)": _billions(row["macs"]),
        }
        for row in rows
    ]
    print(_table(table))
    pixels = f"{input_size}×{input_size} pixels" if input_size else "the network's own size (the paper's: 224×224)"
    print(
        f"one image of {pixels}, 1000 classes (checkpoints: their own); millions of parameters, "
        "billions of operations as the paper counts them, of which multiply-adds"
    )


def benchmark(
    *models: str,
    baseline: str = "baseline_resnet26",
    batch: int | str = "1,4",
    resolution: int | str = 224,
    dtype: str = "float32",
    backend: str = "auto",
    mode: str = "inference,training",
    rounds: int = 15,
    threads: int | None = None,
    device: str | None = None,
    compile: bool = True,
    compile_models: bool = False,
    peak: bool = True,
    networks: bool = True,
    operators: bool = False,
    sweep: bool = False,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Measure speed and memory of networks, as ratios to a baseline in the same process.

    Everything takes turns: in each round each contestant runs once, and a ratio is the median of the rounds' ratios.
    Contestants run in the fastest of their variants; for the baseline these are eager and compiled, contiguous and
    channels-last, in inference with BatchNorm folded into the convolutions. A training step is forward, cross-entropy
    and backward, without the optimiser. In lower precision, training uses autocast, and inference that or cast
    weights. Lists are separated by commas.

    Args:
        models: Names, or checkpoints; default san10_pairwise and san10_patchwise.
        baseline: What they are compared with: a name that timm knows, or a checkpoint.
        batch: Batch sizes.
        resolution: Sides of the square images.
        dtype: Among float32, bfloat16, float16.
        backend: Backends of the attention layers; auto chooses by itself.
        mode: Among inference, training.
        rounds: How many rounds count.
        threads: Of PyTorch; default its own choice.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        compile: Whether the baseline may be compiled, which takes a minute for each variant.
        compile_models: Whether the models may be compiled too.
        peak: Also measure peak memory, in a process of its own for every network.
        networks: Measure the networks.
        operators: Also measure each attention layer of the models against the machine's peaks.
        sweep: Also measure how a layer's time and memory grow with the map and the footprint.
        out: Folder for benchmark.json, benchmark.md and benchmark.png, which replace those of an earlier run.
        json: Print JSON, with every single round.
    """
    from san.evaluation.speed import Settings, measure

    settings = Settings(
        models=models or Settings.models,
        baseline=baseline,
        batches=_numbers("batch", batch),
        resolutions=_numbers("resolution", resolution),
        dtypes=_listed(dtype),
        backends=_listed(backend),
        modes=_listed(mode),
        rounds=rounds,
        threads=threads,
        device=str(_device(device)),
        compile=compile,
        compile_models=compile_models,
        peak=peak,
        networks=networks,
        operators=operators,
        sweep=sweep,
    )
    # Before anything is measured: a missing package or folder should not cost the results.
    write = _writer(out) if out is not None else None
    with _saying() as say:
        result = measure(settings, say)
    _show_benchmark(result, json)
    if write is not None and not json:
        print("wrote " + ", ".join(map(str, write(result))))
    elif write is not None:
        write(result)


def _writer(folder: str) -> Callable[[dict[str, Any]], list[Path]]:
    from san.evaluation.speed.chart import make_folder, write_results

    path = make_folder(folder)
    return lambda result: write_results(result, path)


def _show_benchmark(result: dict[str, Any], json: bool) -> None:
    from san.evaluation.speed.tables import MEANINGS, heading, tables

    if json:
        print(jsonlib.dumps(result, ensure_ascii=False))
        return
    for name, rows in tables(result).items():
        print(_table(rows), MEANINGS[name], "", sep="\n")
    for note in result["notes"]:
        print(note)
    print(heading(result))


def convert(source: str, target: str) -> None:
    """Turn a published checkpoint into a .safetensors file, which also says which network it is.

    The network is recognised by its weights. Nothing in the file is run: one that holds code is refused.

    Args:
        source: The authors' .pth, or any checkpoint of ours.
        target: The .safetensors file to write.
    """
    from san.checkpoints import convert

    print(f"wrote {target} ({convert(source, target)})")


def _listed(words: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in words.split(",")))


def _numbers(name: str, words: int | str) -> tuple[int, ...]:
    try:
        return tuple(map(int, _listed(str(words))))
    except ValueError:
        raise UserError(f"--{name} must be whole numbers separated by commas, such as 1,4, not {words}") from None


def _fraction(name: str, word: float | str) -> float:
    try:
        return float(Fraction(str(word)))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--{name} takes numbers and fractions such as 8/255, not {word}") from None


@contextmanager
def _saying() -> Generator[Callable[[str], None]]:
    """A line on a terminal that tells what is going on; it moves only when told to, so as not to disturb timing."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    quiet = not terminal.is_terminal
    with Progress(*columns, console=terminal, transient=True, auto_refresh=False, disable=quiet) as progress:
        line = progress.add_task("measuring")
        yield lambda text: progress.update(line, description=text, refresh=True)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Only using a device shows whether it is there.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"there is no device {name} here; choose cpu, or cuda:0 on a machine with a GPU") from None


def _trained_on(checkpoint: str, data: str | None) -> dict[str, Any]:
    """What `load_dataset` is to be asked for: where a run is named, its data, and the very split that it used."""
    config = Path(checkpoint) / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if data is None and "data" not in settings:
        raise UserError(f"{checkpoint} does not say which images to use: add --data digits, a folder or an archive")
    split = {key: settings[key] for key in ("validation_share", "seed") if key in settings}
    return {"where": data or settings["data"], **split}


def _paths(images: Iterable[str]) -> Iterator[str]:
    """Every image that was named; what was named but is not there is a mistake, noticed before the first is read."""
    missing = [image for image in images if image != "-" and not Path(image).exists()]
    if missing:
        raise UserError(f"there is no file {missing[0]}; name image files, folders, or - for a list on standard input")
    return (path for image in images for path in _below(image))


def _below(image: str) -> Iterator[str]:
    if image == "-":
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
    elif Path(image).is_dir():
        yield from sorted(str(path) for path in Path(image).rglob("*") if path.suffix.lower() in _IMAGES)
    else:
        yield image


def _progress(batches: Any, what: str = "judging") -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    terminal = Console(stderr=True)
    return track(batches, what, console=terminal, transient=True, disable=not terminal.is_terminal)


def _table(rows: list[dict[str, Any]]) -> str:
    """Columns under their names, words to the left, numbers to the right."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    columns = [_aligned(column) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    is_number = all(cell[:1].isdigit() for cell in column[1:] if cell)
    return [cell.rjust(width) if is_number else cell.ljust(width) for cell in column]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e7 else f"{count / 1e6:.3f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}" if count >= 5e7 else f"{count / 1e9:.4f}"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def reproduce(
    *tables: str,
    scale: str = "digits",
    seeds: int = 1,
    data: str | None = None,
    out: str | None = None,
    only: str | None = None,
    shard: str = "0/1",
    base: str | None = None,
    small_images: bool | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    learning_rate: float | None = None,
    workers: int | None = None,
    precision: str | None = None,
    devices: str | None = None,
    list: bool = False,
    json: bool = False,
) -> None:
    """Repeat the paper's comparisons: train every variant of a table alike, and write the table with its chart.

    Every variant and seed is a run folder in OUT/runs, which tables share. The command may be stopped or killed and
    given again: what is finished is never trained again, and what was begun goes on. Several processes, also on several
    machines with one file system, may work on one OUT at once, with --shard or without: none takes what another has.
    Whoever ends last writes the whole table, the others what is finished by then.

    Args:
        tables: Such as main or relation; --list explains them.
        scale: digits, cifar10, tinyimagenet or imagenet: images, base network and recipe.
        seeds: Seeds 0 to N − 1 for every variant; tables show mean and standard deviation.
        data: Folder, archive or data set's name; default the scale's own.
        out: Folder of runs and tables; default runs/reproduce-SCALE.
        only: Some rows by their labels, separated by semicolons.
        shard: i/n trains the i-th of n parts alone, i from 0.
        base: Another base network: san4, san10, san15 or san19.
        small_images: Let networks of five stages halve maps three times instead of five.
        epochs: Instead of the scale's.
        batch_size: Instead of the scale's.
        image_size: Side of the networks' input; default the data's own.
        learning_rate: Instead of the scale's.
        workers: Processes that read images.
        precision: 32, bf16-mixed or 16-mixed.
        devices: Devices for each run, or auto.
        list: Explain tables and scales, and train nothing.
        json: Print JSON, an object for each table a line.
    """
    given = locals()
    from san.experiments import TABLES, reproduce

    if list:
        _list_tables(json)
        return
    if not tables:
        raise UserError(f"TABLES is missing; choose among: {', '.join(TABLES)}, or ask for --list")
    settings = {name: given[name] for name in _OF_TRAIN if given[name] is not None}
    command = shlex.join(["san", *sys.argv[1:]])
    for table in tables:
        result = reproduce(
            table,
            scale,
            seeds=seeds,
            data=data,
            out=out,
            only=[label.strip() for label in only.split(";")] if only else (),
            shard=shard,
            base=base,
            small_images=small_images,
            settings=settings,
            command=command,
        )
        _show_table(result, json)


def _list_tables(json: bool) -> None:
    from san.experiments import SCALES, TABLES

    if json:
        tables = {name: {"question": t.question, "rows": [v.label for v in t.variants]} for name, t in TABLES.items()}
        print(jsonlib.dumps({"tables": tables, "scales": {name: scale.summary for name, scale in SCALES.items()}}))
        return
    for name, table in TABLES.items():
        print(f"{name}: {table.question}")
        print("    " + "; ".join(variant.label for variant in table.variants))
    print("\nscales:")
    for name, scale in SCALES.items():
        settings = scale.settings
        print(
            f"{name}: {scale.summary}; base {scale.base}, {settings['epochs']} epochs, batch {settings['batch_size']}"
        )


def _show_table(result: dict[str, Any], json: bool) -> None:
    from san.experiments import columns

    if json:
        print(jsonlib.dumps(result, ensure_ascii=False))
    else:
        print(_table(columns(result)))
        if result["busy"]:
            print(f"{result['busy']} runs are with other processes; run the command again for the whole table")
        print(f"written: {', '.join(result['files'])}")
    if failed := [problem for row in result["rows"] for problem in row["failed"]]:
        raise UserError(f"{len(failed)} runs failed, the first because {failed[0]}")
