"""The likeliest classes of any number of images, judged by a model of PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from san.data import transform
from san.evaluation.accuracy import eval_mode
from san.evaluation.answers import Prediction, answer
from san.evaluation.classes import class_words

__all__ = ["Prediction", "predict"]


def predict(
    model: nn.Module, paths: Iterable[str | Path], *, top: int = 5, batch_size: int = 32, threads: int = 2
) -> Iterator[Prediction]:
    """Yield a `Prediction` for every path, in order; a file that is no image yields one with an `error`.

    Only one batch of images is held at a time, so `paths` may be of any length.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it; used in eval mode, where it is.
        paths: Image files.
        top: How many classes to name; all of them where the model has fewer.
        batch_size: Images at a time.
        threads: Images that are decoded at the same time.

    Raises:
        UserError: `top` or `batch_size` is not positive.
    """
    prepare = transform(resolve_model_data_config(model), training=False)

    @torch.inference_mode()
    def judge(images: list[Tensor], count: int) -> tuple[list[list[float]], list[list[int]]]:
        scores = model(torch.stack(images).to(next(model.parameters()).device)).float().softmax(1)
        probabilities, numbers = scores.topk(count)
        return probabilities.tolist(), numbers.tolist()

    with eval_mode(model):
        yield from answer(paths, prepare, judge, class_words(model), top=top, batch_size=batch_size, threads=threads)
