"""A recurrent network of attention alone that predicts the next frame of moving digits, at footprints 3 to 11.

The cell is ConvLSTM's (Shi et al., 2015): input and state go through one layer, which gives the gates of an LSTM at
every pixel. Here that layer is attention. All the rest works on single pixels, so the footprint alone says how far a
step can see, while digits move by up to 3 pixels a frame. Printed is the mean squared error for each footprint,
beside that of copying the last frame.

    python examples/next_frame.py                                   # about two minutes on 2 cores
    python examples/next_frame.py --layer pairwise --footprints 5   # or convolution
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
from digits import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import san

SIDE, DIGIT, FRAMES, FASTEST = 20, 10, 6, 3
HIDDEN = 16


def gates(layer: str, channels: int, footprint: int) -> nn.Module:
    """The layer that gives the four gates, [B, channels, H, W] → [B, 4·HIDDEN, H, W]."""
    if layer == "convolution":
        return nn.Conv2d(channels, 4 * HIDDEN, footprint, padding=footprint // 2)
    kind = {"pairwise": san.PairwiseAttention, "patchwise": san.PatchwiseAttention}[layer]
    # Nothing lies beyond the border: a mirrored digit would be one more digit.
    return kind(channels, 4 * HIDDEN, footprint, relation_channels=4, border="zeros")


class NextFrame(nn.Module):
    """Frames [B, T, H, W] → for each of them, from it and those before it, the next one [B, T, H, W]."""

    def __init__(self, layer: str, footprint: int) -> None:
        super().__init__()
        self.see = nn.Conv2d(1, HIDDEN, 1)
        self.gates = gates(layer, 2 * HIDDEN, footprint)
        self.change = nn.Conv2d(HIDDEN, 1, 1, bias=False)
        # A network that has learnt nothing copies the last frame.
        nn.init.zeros_(self.change.weight)

    def forward(self, frames: Tensor) -> Tensor:
        output = memory = frames.new_zeros(len(frames), HIDDEN, *frames.shape[2:])
        predicted = []
        for frame in frames.split(1, dim=1):
            seen = torch.cat([self.see(frame), output], dim=1)
            keep, write, read, new = self.gates(seen).chunk(4, dim=1)
            memory = keep.sigmoid() * memory + write.sigmoid() * new.tanh()
            output = read.sigmoid() * memory.tanh()
            predicted.append(frame + self.change(output))
        return torch.cat(predicted, dim=1)


def films(digits: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Films [count, FRAMES, SIDE, SIDE] of one digit each, which moves straight on and rebounds at the border."""
    chosen = digits[torch.randint(len(digits), (count,), generator=random)]
    room = SIDE - DIGIT
    start = torch.randint(room + 1, (count, 1, 2), generator=random)
    step = torch.randint(-FASTEST, FASTEST + 1, (count, 1, 2), generator=random)
    way = start + step * torch.arange(FRAMES)[:, None]
    places = room - (way % (2 * room) - room).abs()
    made = torch.zeros(count, FRAMES, SIDE, SIDE)
    for film, digit, path in zip(made, chosen, places.tolist(), strict=True):
        for frame, (row, column) in zip(film, path, strict=True):
            frame[row : row + DIGIT, column : column + DIGIT] = digit
    return made


def error(predicted: Tensor, frames: Tensor) -> Tensor:
    """Mean squared error of the predictions of all frames but the first two, before which no motion is to be seen."""
    return F.mse_loss(predicted[:, 1:-1], frames[:, 2:])


def trained(model: nn.Module, digits: Tensor, steps: int, batch: int) -> nn.Module:
    """AdamW on new films at every step, the same ones for every model."""
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(steps):
        frames = films(digits, batch, random)
        loss = error(model(frames), frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main(words: list[str] | None = None) -> dict[str, float]:
    """Train a network for each footprint; print and return the errors on films of digits that none has seen."""
    parser = ArgumentParser(description="The next frame, by attention", formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layer", default="patchwise", choices=["pairwise", "patchwise", "convolution"])
    parser.add_argument("--footprints", nargs="+", type=int, default=[3, 5, 7, 9, 11], help="widths, in pixels")
    parser.add_argument("--steps", type=int, default=300, help="of training, for each footprint")
    parser.add_argument("--batch", type=int, default=8, help="films a step")
    options = parser.parse_args(words)

    # Without their margin, at half their size: 10×10.
    small = {split: F.avg_pool2d(load_digits(split)[0][:, 4:24, 4:24], 2) for split in ("train", "test")}
    frames = films(small["test"], 100, torch.Generator().manual_seed(1))
    errors = {"copying the last frame": float(error(frames, frames))}
    print(f"{'copying the last frame':24} {errors['copying the last frame']:.4f}")
    for footprint in options.footprints:
        torch.manual_seed(0)
        model = trained(NextFrame(options.layer, footprint), small["train"], options.steps, options.batch)
        with torch.no_grad():
            name = f"{options.layer} {footprint}×{footprint}"
            errors[name] = float(error(model(frames), frames))
        print(f"{name:24} {errors[name]:.4f}")
    return errors


if __name__ == "__main__":
    main()
