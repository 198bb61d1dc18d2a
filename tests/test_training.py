"""What a training run promises: it repeats exactly, leaves everything about itself behind, and says what is wrong."""

from __future__ import annotations

import inspect
import math
import sys
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from san import create_model, list_models
from san.checkpoints import load_model
from san.cli.parsing import call
from san.data import load_dataset
from san.errors import UserError
from san.evaluation.accuracy import evaluate
from san.training import journal, train
from san.training.folder import RunFolder, replacing
from san.training.module import Classifier, torch_label_smoothing
from san.training.settings import check, started
from tiny_run import NETWORK, VARIED, assert_same_result, command, make_images, recipe, rows, settings, start

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
DEFAULTS["learning_rate"] = 0.003  # what the network's name decides


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run without anything special."""
    return train(**settings(images), out=str(tmp_path_factory.mktemp("runs") / "plain"))


def test_run_folder_holds_everything_about_the_run(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "versions.txt", "metrics.csv", "model.safetensors", "report.md", "curves.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {"last.ckpt", "best.ckpt"} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert not list(run.rglob("*.part"))


def test_metrics_have_a_row_for_every_epoch_and_tensorboard_the_same(run):
    table = rows(run)
    assert [(row["epoch"], row["step"]) for row in table] == [("1", "4"), ("2", "8")]
    assert all(math.isfinite(float(value)) for row in table for value in row.values())
    events = EventAccumulator(str(run))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("validation_loss")]
    assert shown == [(int(row["epoch"]), pytest.approx(float(row["validation_loss"]))) for row in table]


def test_report_says_how_good_and_how_to_repeat(run):
    report = (run / "report.md").read_text()
    for part in ("test top-1", "last epoch", "best epoch", "curves.png", "torch: ", "threads: ", "learning_rate: 0.00"):
        assert part in report
    assert f"san train --config {run / 'config.yaml'}" in report


def test_configuration_in_the_run_folder_repeats_the_run_bit_for_bit(run, tmp_path):
    call("san train", train, ["--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")], examples="")
    assert_same_result(run, tmp_path / "again")


def test_saved_model_knows_classes_and_preprocessing_and_reaches_the_reported_accuracy(run, images):
    model = load_model(run)
    assert model.architecture == "san4_patchwise"
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert model.pretrained_cfg["input_size"] == (3, 16, 16) or model.pretrained_cfg["input_size"] == [3, 16, 16]
    dataset = load_dataset(str(images))
    accuracy = evaluate(model, dataset.split("test"), dataset.class_names)
    assert f"| {accuracy.top1:.2f} % |" in (run / "report.md").read_text()


def test_another_seed_gives_another_network(run, images, tmp_path):
    other = train(**settings(images, seed=1), out=str(tmp_path / "other"))
    first, second = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert not torch.equal(first["fc.weight"], second["fc.weight"])


def test_everything_random_repeats_too(images, tmp_path):
    one, other = (train(**settings(images, **VARIED), out=str(tmp_path / name)) for name in ("one", "other"))
    assert_same_result(one, other)


def test_number_of_workers_changes_nothing(run, images, tmp_path):
    assert_same_result(run, train(**settings(images, workers=2), out=str(tmp_path / "workers")))


def test_it_learns(images, tmp_path):
    learnt = train(**settings(images, epochs=8, learning_rate=0.01, batch_size=6), out=str(tmp_path / "run"))
    assert float(rows(learnt)[-1]["validation_top1"]) >= 90


def test_moving_average_is_what_is_judged_and_saved(images, tmp_path):
    averaged = train(**settings(images, ema_decay=0.9), out=str(tmp_path / "average"))
    state = torch.load(averaged / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    saved = load_file(averaged / "model.safetensors")["fc.weight"]
    assert torch.equal(saved, state["average.module.fc.weight"])
    assert not torch.equal(saved, state["model.fc.weight"])
    assert "moving average (0.9)" in (averaged / "report.md").read_text()


@pytest.mark.parametrize("change", [{"precision": "bf16-mixed"}, {"channels_last": False}, {"precision": 64}], ids=str)
def test_precision_and_memory_format_change_little(run, images, tmp_path, change):
    other = train(**settings(images, **change), out=str(tmp_path / "other"))
    assert float(rows(other)[0]["train_loss"]) == pytest.approx(float(rows(run)[0]["train_loss"]), rel=0.02)


@pytest.mark.long
def test_compiled_training_gives_nearly_the_same(run, images, tmp_path):
    compiled = train(**settings(images, compile=True), out=str(tmp_path / "compiled"))
    assert float(rows(compiled)[0]["train_loss"]) == pytest.approx(float(rows(run)[0]["train_loss"]), rel=1e-3)


def test_without_validation_images_there_is_no_best_epoch(images, tmp_path):
    whole = train(**settings(images, validation_share=0.0), out=str(tmp_path / "run"))
    assert not (whole / "checkpoints" / "best.ckpt").exists()
    assert rows(whole)[0]["validation_top1"] == ""
    assert "best epoch |" not in (whole / "report.md").read_text()


def test_broken_images_are_named_and_too_many_are_an_error(tmp_path):
    images = make_images(tmp_path / "images")
    (images / "train" / "red" / "3.png").write_bytes(b"not an image")
    (images / "test" / "blue" / "5.png").write_bytes(b"")
    patient = train(**settings(images, max_broken=0.05), out=str(tmp_path / "patient"))
    report = (patient / "report.md").read_text()
    assert "red/3.png" in report
    assert "blue/5.png" in report
    with pytest.raises(UserError, match=r"red/3\.png"):
        train(**settings(images, max_broken=0.0), out=str(tmp_path / "strict"))


def test_fine_tuning_starts_from_a_checkpoint_and_replaces_the_classifier_only_if_asked(run, images, tmp_path):
    tuned = train(**settings(images, epochs=1, options=None, checkpoint=str(run)), out=str(tmp_path / "tuned"))
    assert float(rows(tuned)[0]["train_loss"]) < float(rows(run)[0]["train_loss"])
    other = make_images(tmp_path / "images", names=("warm", "cold"))
    begin = settings(other, epochs=1, options=None, checkpoint=str(run))
    with pytest.raises(UserError, match="tells 3 classes apart, but the data have 2: add --new-classifier"):
        train(**begin, out=str(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()
    fresh = train(**begin, new_classifier=True, out=str(tmp_path / "fresh"))
    assert load_model(fresh).num_classes == 2


def test_smoothing_is_the_papers():
    logits, label, epsilon = torch.randn(1, 5, dtype=torch.float64), torch.tensor([2]), 0.1
    papers = torch.full((5,), epsilon / 4, dtype=torch.float64)
    papers[2] = 1 - epsilon
    expected = -(papers * logits.log_softmax(1)[0]).sum()
    ours = F.cross_entropy(logits, label, label_smoothing=torch_label_smoothing(epsilon, 5))
    torch.testing.assert_close(ours, expected)


def _classifier(**given) -> Classifier:
    """The optimiser's side of a run of 100 epochs of 10 steps, with nothing to train on."""
    chosen = SimpleNamespace(**{**DEFAULTS, "epochs": 100, **given})
    return Classifier(create_model("san4_patchwise", 10, **NETWORK), chosen, [None] * 10)


def test_papers_recipe_is_plain_momentum_with_decay_on_every_parameter_and_a_cosine_to_zero():
    values = yaml.safe_load((RECIPES[0].parent / "imagenet_san10_pairwise.yaml").read_text())
    classifier = _classifier(**values)
    optimizer = classifier.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 1e-4)
    assert len(group["params"]) == len(list(classifier.model.parameters()))
    for epoch in (0, 1, 50, 99):
        classifier.set_learning_rate(epoch, step=10 * epoch + 3)
        assert group["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * epoch / 100)))


def test_learning_rate_rises_first_and_can_fall_at_every_step():
    classifier = _classifier(learning_rate=0.1, warmup_epochs=2, schedule_per="step")
    (group,) = classifier.configure_optimizers().param_groups
    seen = []
    for step in range(1000):
        classifier.set_learning_rate(step // 10, step)
        seen.append(group["lr"])
    assert seen[0] == pytest.approx(0.001)
    assert seen[:20] == sorted(seen[:20])
    assert seen[20:] == sorted(seen[20:], reverse=True)
    assert seen[-1] < 1e-5


def test_biases_and_normalisation_can_be_left_out_of_weight_decay():
    groups = _classifier(decay_all=False, weight_decay=0.1).configure_optimizers().param_groups
    decays = {group["weight_decay"]: {parameter.dim() for parameter in group["params"]} for group in groups}
    assert decays[0.0] == {1}
    assert 1 not in decays[0.1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_network_exists(path):
    @wraps(train)
    def note(*values):
        return dict(zip(DEFAULTS, values, strict=True))

    arguments = call("san train", note, ["--config", str(path)], examples="")
    assert arguments["model"] in list_models()
    check(started(SimpleNamespace(**arguments)))


def test_there_is_a_recipe_for_every_network_of_the_paper_and_they_differ_in_the_network_alone():
    recipes = [
        yaml.safe_load(path.read_text()) for path in RECIPES if path.stem.startswith(("imagenet_san", "imagenet_res"))
    ]
    assert {values.pop("model") for values in recipes} == {name for name in list_models() if "san4" not in name}
    assert all(values == recipes[0] for values in recipes)


MISTAKES = {
    "model": ({"model": "san11"}, "san10"),
    "option": ({"options": {"kernel": 3}}, "kernel"),
    "data": ({"data": "no/such/folder"}, "no/such/folder"),
    "optimizer": ({"optimizer": "adamv"}, "optimizer 'adamv' is unknown; timm has .*adamw"),
    "optimizer of a missing package": ({"optimizer": "bnbadam"}, "optimizer bnbadam does not work here"),
    "accelerator": ({"accelerator": "gpu"}, "No supported gpu"),
    "precision": ({"precision": "8"}, "precision '8' is unknown; choose one of 32, 64, bf16-mixed, 16-mixed"),
    "half on the CPU": ({"precision": "16-mixed"}, "16-mixed needs a GPU"),
    "fsdp on the CPU": ({"strategy": "fsdp"}, "fsdp needs a GPU"),
    "strategy": ({"strategy": "dpp"}, "dpp"),
    "epochs": ({"epochs": 0}, "--epochs must be at least 1, not 0"),
    "smoothing": ({"label_smoothing": 1.5}, "--label-smoothing must be from 0 to below 1, not 1.5"),
    "divisible": ({"accumulate": 5}, "12 images cannot be divided"),
    "too few images": ({"batch_size": 1000}, "48 training images do not fill a batch of 1000"),
    "odd mixup": ({"batch_size": 9, "mixup": 0.2}, "must be even, not 9"),
    "resume nothing": ({"resume": "no/such/run"}, "nothing to resume"),
}


@pytest.mark.parametrize(("wrong", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_answered_with_a_sentence_and_leaves_nothing_behind(images, tmp_path, wrong, sentence):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=sentence) as caught:
        train(**settings(images, **wrong), out=str(out))
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_run_killed_before_its_first_file_begins_anew(tmp_path):
    def begin():
        with replacing(tmp_path / "config.yaml") as unfinished:
            unfinished.write_text("epochs:")
            sys.exit()

    with pytest.raises(SystemExit):
        begin()
    assert list(tmp_path.iterdir())
    RunFolder(tmp_path).check_free()


def test_existing_run_is_never_overwritten(run, images):
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(
        UserError, match=f"exists already: continue that run with --resume {run} or choose another --out"
    ):
        train(**settings(images), out=str(run))
    assert (run / "metrics.csv").read_bytes() == before


def test_runs_without_a_folder_get_numbered_ones(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = settings(images, epochs=1, validation_share=0.0)
    assert train(**quick) == Path("runs/colours-san4_patchwise")
    assert train(**quick) == Path("runs/colours-san4_patchwise-2")


def test_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint_before(images, tmp_path):
    out = tmp_path / "run"
    wild = settings(images, optimizer="momentum", learning_rate=1e18, warmup_epochs=1, epochs=4, precision=64)
    with pytest.raises(UserError, match=r"loss is not a finite number any more .* smaller --learning-rate"):
        train(**wild, out=str(out))
    last = out / "checkpoints" / "last.ckpt"
    kept = torch.load(last, weights_only=True)["state_dict"] if last.exists() else {}
    assert all(tensor.isfinite().all() for tensor in kept.values())


class _Overflowing(Classifier):
    """Its scores overflow in the first epoch's validation, as happens while statistics run after young weights."""

    @property
    def evaluated(self) -> Any:
        network, first = super().evaluated, self.trainer.current_epoch == 0
        return (lambda images: network(images) * float("nan")) if first else network


def test_a_validation_without_finite_scores_does_not_end_the_run(images, tmp_path, monkeypatch, capsys):
    """What gets no finite scores is not recognised, so that such an epoch is not taken for the best."""
    monkeypatch.setattr("san.training.engine.Classifier", _Overflowing)
    train(**settings(images, epochs=2), out=str(tmp_path / "run"))
    first, second = rows(tmp_path / "run")
    assert [float(first[f"validation_{name}"]) for name in ("loss", "top1", "top5")] == [math.inf, 0, 0]
    assert math.isfinite(float(second["validation_loss"]))
    assert "some validation images get no finite scores" in capsys.readouterr().out


def test_weights_that_are_no_numbers_in_one_process_end_the_run_in_all(images, tmp_path, monkeypatch):
    """Else the others would wait for it for ever."""
    agree, asked = journal.agree, []

    def with_another(trainer: Any, *wishes: bool) -> list[bool]:
        asked.append(wishes)
        return [True] if wishes == (False,) else agree(trainer, *wishes)

    monkeypatch.setattr("san.training.engine.Classifier", _Overflowing)
    monkeypatch.setattr(journal, "agree", with_another)
    with pytest.raises(UserError, match="loss is not a finite number any more"):
        train(**settings(images), out=str(tmp_path / "run"))
    assert asked[-1] == (False,)


def _parameters(run: Path) -> dict[str, torch.Tensor]:
    """Those of the network and of its moving average, after the last step."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if "running" not in name}


def test_two_processes_train_like_one_when_batch_norm_is_synchronised(images, tmp_path):
    """Float64, no augmentation, the same global batches: the parameters agree to 1e-9; without it they do not."""
    exact = settings(images, optimizer="momentum", learning_rate=0.05, precision=64, crop_scale=[1.0, 1.0])
    exact |= {"horizontal_flip": 0.0, "epochs": 1, "sync_batch_norm": True, "ema_decay": 0.9}
    alone = train(**exact, out=str(tmp_path / "alone"))
    config = str(recipe(tmp_path / "recipe.yaml", {**exact, "devices": 2}))
    differences = {}
    for name, option in (("together", "--sync-batch-norm"), ("apart", "--no-sync-batch-norm")):
        done = start(command("--config", config, option, "--out", str(tmp_path / name)))
        _, errors = done.communicate()
        assert done.returncode == 0, errors
        pairs = zip(_parameters(alone).values(), _parameters(tmp_path / name).values(), strict=True)
        differences[name] = max(float((one - other).abs().max()) for one, other in pairs)
    assert differences["together"] < 1e-9
    assert differences["apart"] > 1e-6
    assert len(rows(tmp_path / "together")) == 1
