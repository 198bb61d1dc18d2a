"""`san benchmark`: speed and memory of networks, as ratios to a ResNet."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from san.cli.arguments import chosen_device, listed, numbers
from san.cli.printing import as_table

__all__ = ["benchmark"]


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
        batches=numbers("batch", batch),
        resolutions=numbers("resolution", resolution),
        dtypes=listed(dtype),
        backends=listed(backend),
        modes=listed(mode),
        rounds=rounds,
        threads=threads,
        device=str(chosen_device(device)),
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
        print(as_table(rows), MEANINGS[name], "", sep="\n")
    for note in result["notes"]:
        print(note)
    print(heading(result))


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
