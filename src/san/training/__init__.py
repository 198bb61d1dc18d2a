"""Training: `train` is the function behind `san train`, its arguments are the command's options.

Lightning's Trainer does the work of devices, processes, precision and accumulation; `module` says what a step computes,
`journal` keeps what an interrupted run needs to go on, `folder` and `report` write what a run leaves behind.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

__all__ = ["train"]


def train(
    model: str = "san4_patchwise",
    data: str = "digits",
    options: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    new_classifier: bool = False,
    out: str | None = None,
    resume: str | None = None,
    epochs: int = 18,
    batch_size: int = 32,
    accumulate: int = 1,
    optimizer: str = "adamw",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.05,
    decay_all: bool = True,
    clip_gradient: float | None = None,
    schedule: Literal["cosine", "poly", "tanh"] = "cosine",
    schedule_per: Literal["step", "epoch"] = "step",
    warmup_epochs: int = 1,
    label_smoothing: float = 0.1,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    drop_path: float = 0.0,
    ema_decay: float | None = None,
    image_size: int | None = None,
    crop_scale: tuple[float, float] | None = None,
    horizontal_flip: float | None = None,
    color_jitter: float | None = None,
    rand_augment: str | None = None,
    random_erasing: float | None = None,
    validation_share: float = 0.1,
    max_broken: float = 0.01,
    seed: int = 0,
    workers: int | None = None,
    precision: int | str = "32",
    channels_last: bool = True,
    compile: bool = False,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    sync_batch_norm: bool = False,
    checkpoint_minutes: float = 5.0,
) -> Path:
    """Train a network on labelled images and leave everything about the run in a folder, which is returned.

    Without options it trains the small network on the embedded digits. An interrupted run, even one that was killed,
    goes on with `--resume`; on the CPU it ends with the very numbers of an uninterrupted one.

    Args:
        model: Network, one of `san.list_models()`.
        data: "digits", a folder or archive with train/ and val/ or test/, or the name of a public data set.
        options: What `san.create_model` takes besides, such as {small_images: true}.
        checkpoint: Start from these weights, a run folder, .safetensors or published .pth; its network is taken.
        new_classifier: Replace the checkpoint's classifier by a fresh one for the classes of the data.
        out: Run folder to create; by default runs/DATA-MODEL, numbered where that exists.
        resume: Run folder to continue; its settings are kept, only those of the machine may be given anew.
        epochs: Passes over the training images.
        batch_size: Images per step of the optimiser, over all processes and accumulated micro-batches.
        accumulate: Micro-batches per step, to fit large batches into little memory.
        optimizer: Name in timm, such as adamw, lamb or momentum, which is plain SGD with momentum.
        learning_rate: At the height of the schedule, for the whole batch; by default 0.005 for SAN4, 0.003 for others.
        momentum: For optimisers that have one.
        weight_decay: On every parameter, unless `decay_all` is off.
        decay_all: Also on biases and BatchNorm, as in the paper.
        clip_gradient: Largest norm of the gradient; none by default.
        schedule: How the learning rate falls to 0.
        schedule_per: Whether it falls at every step or at every epoch.
        warmup_epochs: Epochs in which the learning rate rises from a hundredth; at most half of all.
        label_smoothing: ε, spread over the other classes as in the paper; PyTorch's is ε·C/(C−1) for C classes.
        mixup: α of mixup; 0 for none.
        cutmix: α of CutMix; 0 for none. With both, each batch takes one of them.
        drop_path: Stochastic depth of the last block; it grows from 0 with the depth.
        ema_decay: Keep a moving average of the weights, such as 0.9998, and judge and save that.
        image_size: Side of the network's input; by default the data's own.
        crop_scale: Share of the image that a random crop keeps, from and to; by default what suits the data.
        horizontal_flip: Probability of mirroring; by default what suits the data.
        color_jitter: Strength of random changes of brightness, contrast and saturation.
        rand_augment: timm's RandAugment, such as rand-m9-mstd0.5-inc1.
        random_erasing: Probability that a random box is replaced by noise.
        validation_share: Part of the training images on which the best epoch is chosen.
        max_broken: Share of the images that may be unreadable before the run ends with an error.
        seed: Of initialisation, order, augmentation and the choice of validation images.
        workers: Processes that read images; by default none for tiny images, else one a core up to 8.
        precision: 32, 64, bf16-mixed or 16-mixed.
        channels_last: Lay images out channels-last, which is faster.
        compile: Compile the network with torch.compile.
        accelerator: auto, cpu, gpu or what else Lightning knows.
        devices: Devices of each machine, or auto for all.
        num_nodes: Machines.
        strategy: auto, ddp, fsdp or what else Lightning knows; FSDP has not been measured.
        sync_batch_norm: Take BatchNorm's statistics over all processes.
        checkpoint_minutes: Save at least this often; a killed run repeats no more than that.

    Raises:
        UserError: A setting is wrong or does not fit the data, or the loss stopped being a number.
    """
    settings = SimpleNamespace(**locals())
    # Here, so that `san train --help` need not wait for Lightning.
    from san.training.engine import run

    return run(settings, train)
