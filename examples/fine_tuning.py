"""Fine-tuning: a network that knows the digits 0 to 4 learns 5 to 9 from few images, beside one that starts anew.

The images lie in folders, as yours would. The checkpoint is made here by training on 0 to 4, or is one of yours: a run
folder, a .safetensors file, or a .pth as the authors published them. Both networks then see the same images of 5 to 9
equally often; printed is their accuracy on test images. The same from the command line:

    san train --data photos --checkpoint published.pth --new-classifier --learning-rate 0.001

    python examples/fine_tuning.py                                     # about a minute on 2 cores
    python examples/fine_tuning.py --checkpoint published.pth --rate 0.001
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from san.checkpoints import load_model
from san.data import load_dataset
from san.evaluation.accuracy import evaluate
from san.training import train


def write_images(folder: Path, digits: range, **most: int) -> Path:
    """Digits as files folder/SPLIT/DIGIT/N.png, so many of each: `train=10, test=100`, say."""
    dataset = load_dataset("digits", validation_share=0)
    for split, count in most.items():
        images, written = dataset.split(split), Counter()
        for index, digit in enumerate(images.labels.tolist()):
            if digit in digits and written[digit] < count:
                place = folder / split / str(digit)
                place.mkdir(parents=True, exist_ok=True)
                images.load(index).save(place / f"{written[digit]}.png")
                written[digit] += 1
    return folder


def accuracy(run: Path, data: Path) -> float:
    """Percent of the test images that the network of a run gets right."""
    images = load_dataset(str(data))
    return evaluate(load_model(run), images.split("test"), images.class_names).top1


def compare(checkpoint: Path, data: Path, out: Path, **settings: Any) -> dict[str, float]:
    """Accuracy on `data` of the checkpoint's architecture, trained from scratch and from the checkpoint's weights."""
    network: Any = load_model(checkpoint)
    # Digits are 28 pixels wide. Networks that pool often want more, so that their last map is not a single place.
    settings["image_size"] = max(28, 2 * network.feature_info[-1]["reduction"])
    scratch = train(network.architecture, str(data), network.options, out=str(out / "scratch"), **settings)
    # Weights from the checkpoint, but for the classifier: the classes are others, and may be more or fewer.
    tuned = train(
        data=str(data), checkpoint=str(checkpoint), new_classifier=True, out=str(out / "fine-tuned"), **settings
    )
    return {"from scratch": accuracy(scratch, data), "fine-tuned": accuracy(tuned, data)}


def main(words: list[str] | None = None) -> dict[str, float]:
    """Train all that is needed; print and return the accuracy from scratch and fine-tuned."""
    parser = ArgumentParser(description="Fine-tuning to new classes", formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="start from this one; if none, train on 0 to 4")
    parser.add_argument("--known", type=int, default=400, help="images of each digit from 0 to 4")
    parser.add_argument("--tested", type=int, default=100, help="test images of each digit from 5 to 9")
    parser.add_argument("--images", type=int, default=10, help="images of each digit from 5 to 9")
    parser.add_argument("--pretraining-epochs", type=int, default=4, help="on 0 to 4")
    parser.add_argument("--epochs", type=int, default=10, help="on 5 to 9")
    parser.add_argument("--rate", type=float, default=0.005, help="learning rate on 5 to 9")
    parser.add_argument("--batch-size", type=int, default=10, help="images a step")
    options = parser.parse_args(words)

    # All images are for training: the last epoch counts, so none has to be chosen.
    settings: dict[str, Any] = {"batch_size": options.batch_size, "validation_share": 0.0}
    with TemporaryDirectory() as name:
        work, checkpoint = Path(name), options.checkpoint
        if checkpoint is None:
            known = str(write_images(work / "known", range(5), train=options.known))
            settings["epochs"] = options.pretraining_epochs
            checkpoint = train(data=known, out=str(work / "pretrained"), **settings)
        new = write_images(work / "new", range(5, 10), train=options.images, test=options.tested)
        settings |= {"epochs": options.epochs, "learning_rate": options.rate}
        found = compare(checkpoint, new, work, **settings)
    for start, percent in found.items():
        print(f"{start}: {percent:.1f} % of the test images right")
    return found


if __name__ == "__main__":
    main()
