"""An exported ONNX file in use: NumPy, Pillow and ONNX Runtime, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from san.errors import UserError
from san.evaluation.answers import Prediction, answer
from san.export.description import INPUT, KEY, OUTPUT, Description
from san.export.preparation import prepare

__all__ = ["OnnxModel"]

_FATAL = 4
"""ONNX Runtime's level of messages at which it leaves it to us to say what is wrong."""


class OnnxModel:
    """A network that `san export` wrote as ONNX, run by ONNX Runtime on the CPU.

    Calling it takes images [B, 3, H, W], float32 and prepared, to scores [B, classes], before softmax.

    Args:
        path: The .onnx file. It is checked before it is used, and nothing in it can run code of its own.

    Raises:
        UserError: The file is missing, no ONNX file, or not one of ours.
    """

    description: Description
    """How to prepare images, and what the classes are called."""

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}; give an .onnx file that `san export` wrote")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        # Threads that wait actively are no faster here, and take the cores from whoever decodes the next images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # Its exceptions have no common base.
        except Exception as problem:
            raise UserError(f"{path} is not a readable ONNX file: {_brief(problem)}") from problem
        self._path = path
        stored = self._session.get_modelmeta().custom_metadata_map
        self.description = Description.from_text(stored.get(KEY), path)
        self._check()

    def _check(self) -> None:
        """Compare what the graph takes and gives with what the file says about it."""
        expected = [
            (INPUT, "tensor(float)", list(self.description.input_size)),
            (OUTPUT, "tensor(float)", [len(self.description.label_names)]),
        ]
        ends = [*self._session.get_inputs(), *self._session.get_outputs()]
        if [(end.name, end.type, list(end.shape)[1:]) for end in ends] != expected:
            raise UserError(f"the graph in {self._path} is not what its metadata says; export it again")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Scores [B, classes] of prepared images [B, 3, H, W]; `UserError` where the graph cannot be run."""
        try:
            scores = np.asarray(self._session.run([OUTPUT], {INPUT: images})[0])
        except Exception as problem:
            raise UserError(f"{self._path} cannot be run: {_brief(problem)}") from problem
        if scores.shape != (len(images), len(self.description.label_names)):
            raise UserError(f"the graph in {self._path} gives scores of another shape than it says; export it again")
        return scores

    def predict(
        self, paths: Iterable[str | Path], *, top: int = 5, batch_size: int = 32, threads: int = 2
    ) -> Iterator[Prediction]:
        """Yield a `Prediction` for every path, in order; a file that is no image yields one with an `error`.

        Args:
            paths: Image files, of which only one batch is held at a time.
            top: How many classes to name; all of them where there are fewer.
            batch_size: Images at a time.
            threads: Images that are decoded at the same time.

        Raises:
            UserError: `top` or `batch_size` is not positive.
        """
        make_ready = partial(prepare, description=self.description)
        names, options = list(self.description.label_names), {"batch_size": batch_size, "threads": threads}
        return answer(paths, make_ready, self._judge, names, top=top, **options)

    def _judge(self, images: list[np.ndarray], count: int) -> tuple[list[list[float]], list[list[int]]]:
        scores = self(np.stack(images))
        likelihoods = np.exp(scores - scores.max(1, keepdims=True))
        probabilities = likelihoods / likelihoods.sum(1, keepdims=True)
        numbers = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(probabilities, numbers, 1).tolist(), numbers.tolist()


def _brief(problem: Exception) -> str:
    """The first line of what ONNX Runtime says, for a sentence."""
    return str(problem).strip().partition("\n")[0]
