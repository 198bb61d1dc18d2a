"""The command `san`: finds the command's function, has its arguments parsed, and ends a user's mistake in one sentence.

A command's module is imported only when the command is named, so that `san --help` answers at once.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from inspect import cleandoc

from san import __version__
from san.errors import UserError

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """One word behind `san`.

    `home` names its typed function as "module:function", `summary` is its line in `san --help`, and `examples` end
    its own help.
    """

    home: str
    summary: str
    examples: str


COMMANDS = {
    "train": Command(
        "san.training:train",
        "train a network on the embedded digits or on your images",
        """
        san train                                         # the small network on the embedded digits
        san train --model san4_pairwise --epochs 5 --out runs/first
        san train --data photos --model san10_patchwise   # a folder with train/ and val/
        san train --config recipes/imagenet_san10_pairwise.yaml --data imagenet
        san train --resume runs/first                     # go on where it stopped
        """,
    ),
    "evaluate": Command(
        "san.cli.commands.evaluate:evaluate",
        "accuracy of a trained network on labelled images",
        """
        san evaluate runs/first                           # the test images of the data it was trained on
        san evaluate model.safetensors --data photos      # a folder with val/ or test/
        san evaluate published.pth --data photos.tar --json > accuracy.json
        """,
    ),
    "predict": Command(
        "san.cli.commands.predict:predict",
        "the likeliest classes of images",
        """
        san predict runs/first cat.jpg dog.png
        san predict model.safetensors photos --top 3      # every image below a folder
        find . -name '*.jpg' | san predict model.safetensors - --json
        san predict model.onnx cat.jpg                    # from `san export`; works without torch
        """,
    ),
    "explain": Command(
        "san.cli.commands.explain:explain",
        "what a network attends to in images, as figures and arrays",
        """
        san explain runs/first digit.png                  # figures, arrays and a table; files in explained/digit
        san explain model.safetensors cat.jpg --pixel 112,80 --layer layer2,layer4.0
        san explain model.safetensors cat.jpg --layer layer3.1 --group 5 --out figures
        san explain runs/first digit.png --target 3 --whole-maps --json
        """,
    ),
    "robustness": Command(
        "san.cli.commands.robustness:robustness",
        "accuracy on rotated images and under attack",
        """
        san robustness runs/first                         # the test images of the data it was trained on
        san robustness runs/first runs/second --limit 500 --out results
        san robustness model.safetensors --data photos --attack none --angles 0,15,30,45,60,75,90
        san robustness model.safetensors --data photos --no-rotation --curve --epsilon 4/255 --step 1/255
        san robustness runs/first --attack untargeted --random-start --restarts 5 --json
        """,
    ),
    "complexity": Command(
        "san.cli.commands.complexity:complexity",
        "parameters and multiply-adds of networks",
        """
        san complexity                                    # the nine networks that the paper compares
        san complexity san10_patchwise runs/first --input-size 128
        san complexity resnet50 --json                    # any network that timm knows
        """,
    ),
    "benchmark": Command(
        "san.cli.commands.benchmark:benchmark",
        "speed and memory of networks, as ratios to a ResNet",
        """
        san benchmark                                     # both SAN10 against ResNet26; minutes
        san benchmark san4_pairwise --resolution 64 --batch 8 --rounds 5 --no-compile
        san benchmark san10_pairwise --backend auto,reference --mode inference --out results
        san benchmark --no-networks --operators --sweep --json
        """,
    ),
    "reproduce": Command(
        "san.cli.commands.reproduce:reproduce",
        "the paper's tables, on any images",
        """
        san reproduce --list                              # what can be asked, and on what
        san reproduce relation                            # on the embedded digits; minutes
        san reproduce main --scale cifar10 --only 'ResNet26; SAN10 pairwise' --seeds 3
        san reproduce footprint mapping --scale tinyimagenet --data tinyimagenet.tar --base san4 --epochs 20
        san reproduce main --scale imagenet --data imagenet --shard 2/9 --precision bf16-mixed
        """,
    ),
    "export": Command(
        "san.cli.commands.export:export",
        "a network for use elsewhere: ONNX, torch.export, AOTInductor",
        """
        san export runs/first                             # runs/first/model.onnx, compared with PyTorch on its images
        san export model.safetensors --check photos --input-size 224 --out network.onnx
        san export model.safetensors --format torch-export
        san export published.pth --format aot-inductor --check photos.tar --limit 100 --json
        """,
    ),
    "convert": Command(
        "san.cli.commands.convert:convert",
        "a published checkpoint to a safetensors file",
        """
        san convert published.pth san10_patchwise.safetensors
        """,
    ),
    "demo": Command(
        "san.cli.commands.demo:demo",
        "a page in the browser on which to look at networks",
        """
        san demo                                          # the small network that comes with the package
        san demo --checkpoint runs/first --checkpoint runs/second    # side by side
        san demo --checkpoint model.safetensors --port 8000 --no-open-browser
        """,
    ),
}


def main(words: list[str] | None = None) -> int:
    """Run one command line and return its exit code.

    The code is 0, 2 after a user's mistake (one sentence on standard error), 130 after Ctrl-C, and 141 when the
    reader of our output went away. Anything else that goes wrong is a defect and keeps its traceback.

    Args:
        words: the command line behind `san`; by default that of the process.
    """
    try:
        _run(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
    except UserError as error:
        print(f"san: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("san: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _run(words: list[str]) -> None:
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"san {__version__}")
    elif name in COMMANDS:
        _run_command(name, words[1:])
    else:
        what = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {what} {name}; the commands are {', '.join(COMMANDS)}")


def _run_command(name: str, words: list[str]) -> None:
    command = COMMANDS[name]
    module, _, function = command.home.partition(":")
    try:
        from san.cli.parsing import call

        call(f"san {name}", getattr(import_module(module), function), words, cleandoc(command.examples))
    except ModuleNotFoundError as error:
        if (error.name or "san").partition(".")[0] == "san":
            raise
        raise UserError(
            f"san {name} needs the package {error.name}: pip install {_bringing(str(error.name))}"
        ) from None


_COMMAND_LINE = "train"


def _bringing(module: str) -> str:
    """What brings a module: the extra that requires its package, or else the one that all commands need."""
    from importlib.metadata import PackageNotFoundError, requires

    package = module.partition(".")[0].lower()
    try:
        requirements = requires("san-vision") or []
    except PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        name = re.split(r"[^\w-]", requirement, maxsplit=1)[0]
        if name.replace("-", "_").lower() == package:
            extra = re.search(r"extra == .(\w+)", requirement)
            return f"'san-vision[{extra[1] if extra else _COMMAND_LINE}]'"
    return f"'san-vision[{_COMMAND_LINE}]'"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: san COMMAND [ARGUMENT ...] [--OPTION VALUE ...]",
            "",
            "Vector self-attention on images: train, evaluate and use the networks of SAN.",
            "",
            "commands:",
            *lines,
            "",
            "`san COMMAND --help` shows a command's options and examples; `san --version` the version.",
        ]
    )
