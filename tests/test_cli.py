"""The commands as a user runs them: results, streams, exit codes, and the sentence for every kind of mistake."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module

import docstring_parser
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import san
from san.checkpoints import load_model, save_model
from san.cli import COMMANDS, Command, main
from san.cli.printing import progress
from tiny_run import make_images

SAN = [sys.executable, "-m", "san"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """An untrained network for two kinds of photos, as `san train` would leave it."""
    model = san.create_model("san4_patchwise", num_classes=2)
    model.pretrained_cfg.update(input_size=(3, 28, 28), label_names=["cat", "dog"])
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(model, path)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """A data set on disk: val/cat and val/dog with three images each."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (root / "val" / name).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / "val" / name / f"{number}.png")
    return str(root)


@pytest.fixture
def run(capsys):
    """Run a command line in this process; gives (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


# Help


def test_overview_names_every_command_and_costs_nothing():
    code = "import sys; from san.cli import main; main(['--help']); assert not {'torch', 'yaml'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_no_word_is_a_call_for_help(run):
    assert run() == run("--help")


def test_version(run):
    assert run("--version") == (0, f"san {san.__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(run, name):
    """Every parameter is an option with a text, and the examples call this very command."""
    code, out, _ = run(name, "--help")
    assert code == 0
    module, _, function = COMMANDS[name].home.partition(":")
    function = getattr(import_module(module), function)
    described = {param.arg_name for param in docstring_parser.parse(inspect.getdoc(function)).params}
    assert described == set(inspect.signature(function).parameters)
    for parameter in inspect.signature(function).parameters.values():
        is_option = parameter.kind is not parameter.VAR_POSITIONAL and parameter.default is not parameter.empty
        assert ("--" + parameter.name.replace("_", "-") if is_option else parameter.name) in out
    examples = [line for line in COMMANDS[name].examples.splitlines() if line.strip()]
    assert examples
    assert all(f"san {name}" in line for line in examples)


# Results


def test_evaluate_prints_a_table(run, checkpoint, photos):
    code, out, err = run("evaluate", checkpoint, "--data", photos)
    assert (code, err) == (0, "")
    header, *classes, total = out.splitlines()
    assert header.split() == ["class", "images", "top1", "confused_with"]
    assert [line.split()[:2] for line in classes] == [["cat", "3"], ["dog", "3"]]
    assert total.startswith("top-1 ")
    assert total.endswith(" % of 6 images")
    assert "top-5" not in total


def test_evaluate_shows_top5_where_it_can_fail(run, photos, tmp_path):
    model = san.create_model("san4_patchwise", num_classes=6)
    model.pretrained_cfg["label_names"] = ["ant", "bee", "cat", "dog", "eel", "fox"]
    save_model(model, tmp_path / "six.safetensors")
    code, out, _ = run("evaluate", tmp_path / "six.safetensors", "--data", photos)
    header, *_, total = out.splitlines()
    assert code == 0
    assert header.split() == ["class", "images", "top1", "top5", "confused_with"]
    assert ", top-5 " in total


def test_evaluate_prints_json(run, checkpoint, photos):
    code, out, err = run("evaluate", checkpoint, "--data", photos, "--json", "--batch-size", 4)
    accuracy = json.loads(out)
    assert (code, err) == (0, "")
    assert accuracy["images"] == 6
    assert sum(map(sum, accuracy["confusion"])) == 6
    assert accuracy["class_names"] == ["cat", "dog"]


def test_evaluate_takes_the_images_of_the_run(run, checkpoint, photos, tmp_path):
    """A run folder says what it was trained on; --data says otherwise."""
    save_model(load_model(checkpoint), tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(f"data: {photos}\nseed: 3\nvalidation_share: 0.2\n")
    assert run("evaluate", tmp_path) == run("evaluate", checkpoint, "--data", photos)


def test_evaluate_names_broken_images(run, checkpoint, photos, tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "test" / kind).mkdir(parents=True)
        Image.open(f"{photos}/val/{kind}/0.png").save(tmp_path / "test" / kind / "good.png")
    (tmp_path / "test" / "dog" / "bad.png").write_bytes(b"nothing")
    code, out, _ = run("evaluate", checkpoint, "--data", tmp_path, "--max-broken", 0.5)
    assert code == 0
    assert out.startswith(f"not readable: {os.path.join('test', 'dog', 'bad.png')}\n")


def test_predict_files_and_folders(run, checkpoint, photos):
    code, out, err = run("predict", checkpoint, f"{photos}/val/dog/1.png", photos, "--top", 1)
    lines = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    expected = [f"{photos}/val/{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)]
    assert [line[0] for line in lines] == [f"{photos}/val/dog/1.png", *expected]
    assert all(len(line) == 2 and line[1].split(": ")[0] in ("cat", "dog") for line in lines)


def test_wordnet_ids_are_told_in_words(run, photos, tmp_path):
    """As ImageNet's folders are named, which nobody reads; another name among them, and all stay as they are."""
    answers = []
    for names in (["n01443537", "n04398044"], ["n01443537", "teapot"]):
        model = san.create_model("san4_pairwise", num_classes=2)
        model.pretrained_cfg["label_names"] = names
        save_model(model, tmp_path / "things.safetensors")
        code, out, _ = run("predict", tmp_path / "things.safetensors", f"{photos}/val/cat/0.png", "--json")
        found = json.loads(out)
        answers.append(dict(zip(found["numbers"], found["classes"], strict=True)))
        assert code == 0
    assert answers == [{0: "goldfish, Carassius auratus", 1: "teapot"}, {0: "n01443537", 1: "teapot"}]


def test_evaluate_tells_wordnet_ids_in_words(run, tmp_path):
    """In the table; JSON has the names that the folders have."""
    images, names = make_images(tmp_path / "things", ("n01443537", "n04398044")), ["n01443537", "n04398044"]
    model = san.create_model("san4_pairwise", num_classes=2)
    model.pretrained_cfg["label_names"] = names
    save_model(model, tmp_path / "things.safetensors")
    words = ("evaluate", tmp_path / "things.safetensors", "--data", images)
    assert [line.split()[0] for line in run(*words)[1].splitlines()[1:3]] == ["goldfish", "teapot"]
    assert json.loads(run(*words, "--json")[1])["class_names"] == names


def test_predict_reads_a_list(run, checkpoint, photos, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/val/cat/0.png\n\n{photos}/val/dog/0.png\n"))
    code, out, _ = run("predict", checkpoint, "-", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["image"] for row in rows] == [f"{photos}/val/cat/0.png", f"{photos}/val/dog/0.png"]
    assert all(set(row["classes"]) == {"cat", "dog"} and row["error"] is None for row in rows)
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)


def test_predict_says_where_scores_overflow(run, photos, tmp_path):
    """As in patchwise networks, where what is far too large is squared from layer to layer."""
    model = san.create_model("san4_patchwise", num_classes=2)
    with torch.no_grad():
        next(model.parameters()).mul_(1e30)
    save_model(model, tmp_path / "wild.safetensors")
    image = f"{photos}/val/cat/0.png"
    code, out, err = run("predict", tmp_path / "wild.safetensors", image)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"san: the network gives {image} no finite scores; skipped"


def test_predict_skips_folders_in_a_list(run, checkpoint, photos, monkeypatch):
    """As `find DIR` lists them."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/val\n{photos}/val/cat/0.png\n"))
    code, out, err = run("predict", checkpoint, "-", "--json")
    sentence = f"{photos}/val is a folder, not an image"
    assert code == 2
    assert [json.loads(line)["error"] for line in out.splitlines()] == [sentence, None]
    assert err.splitlines()[0] == f"san: {sentence}; skipped"


def test_predict_skips_broken_images_and_says_so(run, checkpoint, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    words = ("predict", checkpoint, tmp_path / "bad.jpg", f"{photos}/val/cat/0.png")
    code, out, err = run(*words)
    assert code == 2
    assert out.startswith(f"{photos}/val/cat/0.png\t")
    skipped, sentence = err.splitlines()
    assert skipped == f"san: {tmp_path}/bad.jpg is not a readable image; skipped"
    assert sentence == "san: error: 1 of 2 images could not be judged and were skipped; they are named above"
    code, out, _ = run(*words, "--json")
    assert [json.loads(line)["error"] is None for line in out.splitlines()] == [False, True]


def test_complexity_of_the_nine(run):
    code, out, err = run("complexity", "--json")
    rows = json.loads(out)
    assert (code, err, len(rows)) == (0, "", 9)
    assert all(list(row) == ["model", "params", "paper_cost", "macs"] for row in rows)


def test_complexity_of_names_and_checkpoints(run, checkpoint):
    code, out, _ = run("complexity", checkpoint, "san10_patchwise", "resnet18", "--input-size", 64)
    header, *rows, assumptions = out.splitlines()
    assert code == 0
    assert header.startswith("model")
    assert [row.split()[0] for row in rows] == ["san4_patchwise", "san10_patchwise", "resnet18"]
    assert [row.split()[1] for row in rows] == ["0.123", "11.8", "11.7"]
    assert assumptions.startswith("one image of 64×64 pixels, 1000 classes")


def test_convert_a_published_checkpoint(run, tmp_path):
    model = san.create_model("san10_patchwise").eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 100, "top1_val": 77.1}, tmp_path / "published.pth")
    target = tmp_path / "ours.safetensors"
    assert run("convert", tmp_path / "published.pth", target) == (0, f"wrote {target} (san10_patchwise)\n", "")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_model(target)(image), model(image))


def test_options_from_a_file_yield_to_the_line(run, tmp_path):
    (tmp_path / "small.yaml").write_text("input_size: 32\njson: true\n")
    words = ("complexity", "san4_pairwise", "--config", tmp_path / "small.yaml")
    (small,), (large,) = json.loads(run(*words)[1]), json.loads(run(*words, "--input-size=64")[1])
    assert 3.5 < large["macs"] / small["macs"] < 4.5


def test_arguments_from_a_file_yield_to_the_line_wherever_it_stands(run, tmp_path):
    file = tmp_path / "networks.yaml"
    file.write_text("networks: [san4_pairwise, san10_pairwise]\ninput_size: 32\njson: true\n")

    def models(*words):
        return [row["model"] for row in json.loads(run("complexity", *words)[1])]

    assert models("--config", file) == ["san4_pairwise", "san10_pairwise"]
    for words in (("san4_patchwise", "--config", file), (f"--config={file}", "san4_patchwise")):
        assert models(*words) == ["san4_patchwise"]


def test_progress_is_told_line_by_line_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr("san.cli.printing.SECONDS", 0.0)
    assert list(progress([10, 11], "judging")) == [10, 11]
    assert capsys.readouterr() == ("", "judging: 0 of 2\njudging: 1 of 2\n")


# Mistakes: one sentence, exit code 2, nothing on standard output


def _mistakes(tmp_path, checkpoint, photos):
    """Each mistake with the words that its sentence must hold."""
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"PK\x03\x04 half a file")
    state = {"state_dict": torch.nn.Linear(2, 2).state_dict()}
    torch.save(state, tmp_path / "other.pth")
    (tmp_path / "three" / "val").mkdir(parents=True)
    for kind in ("a", "b", "c"):
        (tmp_path / "three" / "val" / kind).mkdir()
        Image.new("RGB", (28, 28)).save(tmp_path / "three" / "val" / kind / "0.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("top: [\n")
    (tmp_path / "unknown.yaml").write_text("tpo: 3\n")
    (tmp_path / "word.yaml").write_text("networks: san4_pairwise\n")
    image = f"{photos}/val/cat/0.png"
    return {
        "no such command": (["trian"], "unknown command trian; the commands are train, evaluate"),
        "no such option": (["predict", checkpoint, image, "--tpo", 3], "unknown option --tpo, did you mean --top?"),
        "abbreviated option": (["evaluate", checkpoint, "--batch", 3], "unknown option --batch"),
        "no such argument": (["convert", "a", "b", "c"], "unknown argument c"),
        "value of a switch": (["evaluate", checkpoint, "--json", "false"], "write --NAME or --no-NAME"),
        "missing argument": (["evaluate"], "CHECKPOINT is missing"),
        "missing value": (["evaluate", checkpoint, "--data"], "--data needs a value"),
        "wrong type": (["predict", checkpoint, image, "--top", "x"], "--top must be a whole number, not x"),
        "wrong choice": (
            ["evaluate", "x", "--split", "dev"],
            "--split must be one of test, validation, train, not dev",
        ),
        "wrong value": (["predict", checkpoint, image, "--top", 0], "top and batch size must be at least 1"),
        "no name of a configuration": (["evaluate", checkpoint, "--config"], "--config needs a value"),
        "word instead of list": (["complexity", "--config", tmp_path / "word.yaml"], "needs a list, such as [a, b]"),
        "no configuration": (["predict", "--config", "no.yaml"], "there is no configuration file"),
        "broken configuration": (["predict", "--config", tmp_path / "broken.yaml"], "not valid YAML"),
        "unknown key": (["predict", "--config", tmp_path / "unknown.yaml"], "unknown key tpo"),
        "missing checkpoint": (["evaluate", tmp_path / "no.safetensors"], "no.safetensors does not exist"),
        "empty run folder": (["evaluate", tmp_path / "empty"], "without model.safetensors"),
        "foreign safetensors": (["evaluate", foreign, "--data", photos], "foreign.safetensors"),
        "foreign weights": (["evaluate", tmp_path / "other.pth", "--data", photos], "other.pth"),
        "damaged checkpoint": (["predict", garbage, image], "garbage.pth"),
        "wrong target": (["convert", checkpoint, tmp_path / "x.pth"], "must end in .safetensors"),
        "unknown data": (["evaluate", checkpoint, "--data", "no-such-data"], "no data called 'no-such-data'"),
        "no data": (["evaluate", checkpoint], "add --data digits, a folder or an archive"),
        "empty data": (["evaluate", checkpoint, "--data", tmp_path / "empty"], "holds no images"),
        "missing split": (["evaluate", checkpoint, "--data", photos, "--split", "train"], "has no train images"),
        "wrong classes": (["evaluate", checkpoint, "--data", tmp_path / "three"], "the data's 3 classes"),
        "missing image": (["predict", checkpoint, "no.jpg"], "there is no file no.jpg"),
        "no image": (["predict", checkpoint], "there is nothing to predict"),
        "empty folder": (["predict", checkpoint, tmp_path / "empty"], "there is no image in"),
        "broken image": (["predict", checkpoint, garbage], "1 of 1 images could not be judged"),
        "no such device": (["predict", checkpoint, image, "--device", "tpu9"], "there is no device tpu9"),
        "unknown network": (["complexity", "san11_pairwise"], "'san11_pairwise' is unknown"),
        "bad shape": (["complexity", "san10_pairwise", "--input-size", 8], "8×8"),
        "bad size": (["complexity", "san10_pairwise", "--input-size", 0], "at least 1"),
        "unknown model": (["train", "--model", "san5"], "'san5' is unknown"),
        "no run": (["train", "--resume", tmp_path / "empty"], "is not a run folder"),
    }


def test_every_mistake_has_its_sentence(run, subtests, tmp_path, checkpoint, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (words, sentence) in _mistakes(tmp_path, checkpoint, photos).items():
        with subtests.test(name):
            code, out, err = run(*words)
            last = err.splitlines()[-1]
            assert (code, out) == (2, "")
            assert last.startswith("san: error: ")
            assert sentence in last
            assert "Traceback" not in err


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(COMMANDS, "defect", Command("test_cli:_defect", "", ""))
    with pytest.raises(ZeroDivisionError):
        main(["defect"])


def _defect() -> None:
    """Fail as only a defect can."""
    _ = 1 / 0


def test_core_installation_says_what_is_missing():
    code = "import sys; sys.modules['jsonargparse'] = None; from san.cli import main; sys.exit(main(['complexity']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "san: error: san complexity needs the package jsonargparse: pip install 'san-vision[train]'\n"


# The process


@pytest.fixture
def predicting(checkpoint, photos):
    """`san predict` in a process of its own that has answered one line of its list and waits for the next."""
    words = [*SAN, "predict", checkpoint, "-", "--batch-size", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that runs tests in the background lets them, and so this process, ignore interrupts.
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, text=True, preexec_fn=listens, **pipes) as process:
        process.stdin.write(f"{photos}/val/cat/0.png\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(photos)
        yield process
        process.kill()


def test_ctrl_c(predicting):
    predicting.send_signal(signal.SIGINT)
    _, err = predicting.communicate(timeout=60)
    assert (predicting.returncode, err) == (130, "san: interrupted\n")


def test_reader_that_goes_away(predicting, photos):
    predicting.stdout.close()
    predicting.stdin.write(f"{photos}/val/cat/1.png\n")
    predicting.stdin.close()
    assert predicting.wait(timeout=60) == 141
    assert predicting.stderr.read() == ""
