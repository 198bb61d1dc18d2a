"""Speed and memory: what is counted is right and every row is there. No test looks at a clock."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks import roofline
from torch import nn

import san
from san.cli import main
from san.errors import UserError
from san.evaluation.cost import complexity
from san.evaluation.speed import Settings, measure, networks
from san.evaluation.speed.attention import AttentionOperator, attention_operators
from san.evaluation.speed.clock import ratios, spread, take_turns
from san.evaluation.speed.contestants import Task, Variant, fold_batch_norm, prepare, variants
from san.evaluation.speed.machine import describe_machine
from san.evaluation.speed.memory import held_bytes, kept, peak_bytes, saved_bytes
from san.evaluation.speed.operators import measure_operators, measure_sweep
from san.evaluation.speed.tables import as_markdown, tables
from san.ops.kernels.native import library

EAGER = Variant(channels_last=False, compiled=False, autocast=False)
QUICK = Settings(("san4_patchwise",), batches=(2,), resolutions=(32,), rounds=2, compile=False, peak=False)
WORDS = ["--batch", "2", "--resolution", "32", "--rounds", "2", "--no-compile", "--no-peak"]


# Time


def test_steps_take_turns_in_changing_order():
    order: list[str] = []
    found = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, rounds=8)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert rounds[0] == "abc"
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3
    assert {name: len(times) for name, times in found.items()} == {"a": 8, "b": 8, "c": 8}


def test_ratios_are_taken_round_by_round():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}
    assert ratios([2.0, 40.0, 9.0], [1.0, 20.0, 3.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.5}


# Memory


def test_a_linear_layer_keeps_its_input():
    layer, x = nn.Linear(16, 4), torch.rand(8, 16)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 8 * 16 * 4
    assert saved_bytes(lambda: layer(x), [*layer.parameters(), x]) == 0


def test_views_of_a_storage_count_once():
    x, a, b = torch.rand(6, 4), torch.rand(6, 4, requires_grad=True), torch.rand(4, 6, requires_grad=True)
    assert saved_bytes(lambda: (x * a).sum() + (x.t() * b).sum() + (x[:3] * a[:3]).sum(), [a, b]) == 6 * 4 * 4


def test_allocator_holds_what_backward_and_the_result_need():
    layer, x = nn.Linear(16, 64), torch.rand(128, 16)
    size = 128 * 64 * 4
    assert held_bytes(lambda: layer(x).relu()) == size
    assert held_bytes(lambda: layer(x).exp().sigmoid()) == 2 * size
    with torch.no_grad():
        assert held_bytes(lambda: layer(x).exp().sigmoid()) == size


@pytest.mark.parametrize("network", ["san4_pairwise", "baseline_resnet26"])
def test_both_counts_of_kept_memory_agree(network):
    """The allocator also holds the loss and a few scalars."""
    found = kept(prepare(network, "reference", Task("training", 2, 32), EAGER))
    assert found["saved"] <= found["kept"] <= found["saved"] + 4096 + found["native"]
    assert found["saved"] > 1e5


def test_buffers_of_the_native_library_are_counted(monkeypatch):
    library = SimpleNamespace(instruction_set="v3", native_bytes=lambda: 1 << 30)
    monkeypatch.setitem(sys.modules, "san.ops.kernels.native.library", SimpleNamespace(load=lambda: library))
    task = Task("training", 2, 32)
    assert kept(prepare("san4_patchwise", "reference", task, EAGER))["kept"] > 1 << 30
    assert kept(prepare("baseline_resnet26", "reference", task, EAGER))["native"] == 0
    assert describe_machine()["instruction_set"] == "v3"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process' peak memory")
def test_peak_grows_with_the_batch():
    task = Task("inference", 16, 64)
    small, large = (peak_bytes("san4_patchwise", "reference", replace(task, batch=batch), EAGER) for batch in (16, 64))
    assert 1e6 < 2 * small < large


# Contestants


def test_folded_batch_norm_computes_the_same():
    model = san.create_model("baseline_resnet26", num_classes=10).eval()
    with torch.no_grad():
        for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 1.5)
        folded, is_folded = fold_batch_norm(model)
        x = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert is_folded
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())


def test_what_cannot_be_traced_stays_unfolded():
    model = san.create_model("san4_pairwise").eval()
    assert fold_batch_norm(model) == (model, False)


def test_variants():
    inference, training = Task("inference", 1, 32, "bfloat16"), Task("training", 1, 32)
    assert len(variants(inference, compiled=True)) == 8
    assert len(variants(training, compiled=True)) == 4
    assert not any(variant.compiled or variant.autocast for variant in variants(training, compiled=False))
    assert all(variant.autocast for variant in variants(replace(training, dtype="bfloat16"), compiled=False))


def test_training_step_starts_without_gradients():
    runner = prepare("san4_patchwise", "auto", Task("training", 2, 32), EAGER)
    runner()
    first = [parameter.grad.clone() for parameter in runner.model.parameters()]
    runner()
    for before, parameter in zip(first, runner.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, before)


@pytest.mark.parametrize("kind", ["PairwiseAttention", "PatchwiseAttention", "ScalarAttention"])
def test_operator_alone_is_the_layer_without_its_transformations(kind):
    layer = getattr(san, kind)(8, 16, kernel_size=3, stride=2, relation_channels=4)
    x = torch.rand(2, 8, 7, 6)
    operator = AttentionOperator("layer", layer, 7, 6)
    torch.testing.assert_close(operator(*layer.transform(x)), layer(x))


def test_operators_of_a_network_in_order():
    model = san.create_model("san4_pairwise")
    found = attention_operators(model, 32)
    assert [(each.name, each.height, each.width) for each in found] == [
        ("layer0.0.sam", 32, 32),
        ("layer1.0.sam", 16, 16),
        ("layer1.1.sam", 16, 16),
        ("layer2.0.sam", 8, 8),
    ]
    assert found[1].shape == found[2].shape != found[3].shape
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_operations_and_bytes_by_hand():
    pairwise = AttentionOperator("", san.PairwiseAttention(8, 16, 3, relation_channels=4), 5, 6)
    assert pairwise.operations(2) == 2 * 2 * 30 * 9 * (6 * 4 + 4 * 2 + 16)
    assert pairwise.least_bytes(2, torch.bfloat16) == 2 * 2 * 30 * (4 + 4 + 16 + 16)
    patchwise = AttentionOperator("", san.PatchwiseAttention(8, 16, 3, stride=2, relation_channels=4), 5, 6)
    assert patchwise.operations(1) == 2 * 9 * (40 * 2 + 2 * 18 + 9 * 16)
    assert patchwise.least_bytes(1, torch.float32) == 4 * (30 * (4 + 4 + 16) + 9 * 16)


# Results


@pytest.fixture(scope="module")
def result() -> dict:
    return measure(replace(QUICK, backends=("auto", "reference")))


def test_every_row_is_there(result):
    rows = [(row["mode"], row["network"], row["part"], row["backend"]) for row in result["networks"]]
    ours = [("san4_patchwise", backend) for backend in ("auto", "reference")]
    assert rows == [
        ("inference", "baseline_resnet26", "network", None),
        *(("inference", name, part, backend) for name, backend in ours for part in ("network", "attention layers")),
        ("training", "baseline_resnet26", "network", None),
        *(("training", name, "network", backend) for name, backend in ours),
    ]
    for row in result["networks"]:
        assert len(row["seconds"]) == 2
        assert bool(row.get("memory")) == (row["mode"] == "training")
        assert row["batch_norm_folded"] == (row["network"] == "baseline_resnet26" and row["mode"] == "inference")
    assert all(row["ratio"]["median"] == 1 for row in result["networks"] if row["network"] == "baseline_resnet26")


def test_result_names_machine_versions_and_date(result):
    loaded = json.loads(json.dumps(result))
    assert loaded["machine"]["processor"]
    assert loaded["machine"]["cores"] >= 1
    assert loaded["versions"]["torch"] == torch.__version__
    assert loaded["versions"]["san"] == san.__version__
    assert loaded["date"][:2] == "20"
    assert loaded["settings"]["threads"] == torch.get_num_threads()


def test_page_shows_every_table(result):
    page = as_markdown(result, "benchmark.png")
    assert page.count("\n| ") == len(result["networks"]) + 1
    assert "baseline_resnet26" in page
    assert result["machine"]["processor"] in page
    assert "the first of triton, native, tiled, reference that accepts it" in page


def test_operator_rows():
    notes: list[str] = []
    rows = measure_operators(replace(QUICK, rounds=1), print, notes)
    assert [row["layers"] for row in rows] == [["layer0.0.sam"], ["layer1.0.sam", "layer1.1.sam"], ["layer2.0.sam"]]
    assert all(row["share_of_peak"] > 0 and row["roof"] in ("operations", "bytes") for row in rows)
    assert notes == []


def test_sweep_rows():
    found = measure_sweep(replace(QUICK, rounds=1), print, [], sides=(8, 16), kernels=(3,))
    sizes = [(8, 7), (16, 7), (56, 3)]
    assert [(row["form"], row["side"], row["kernel_size"]) for row in found] == [
        (form, *size) for form in ("pairwise", "patchwise") for size in sizes
    ]
    assert all(row["kept_bytes_per_pixel"] > 0 for row in found)
    assert tables({"networks": [], "operators": [], "sweep": found})["sweep"][0]["map"] == "8×8"


def test_without_a_compiler_the_rest_is_measured(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("there is no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = measure(replace(QUICK, compile=True, modes=("inference",)))
    sentence = "compiled variants of baseline_resnet26 were left out in inference: there is no C++ compiler"
    assert found["notes"] == [sentence]
    assert len(found["networks"]) == 3


def test_a_named_backend_that_refuses_is_left_out(monkeypatch):
    def picky(network, backend, task, variant):
        if backend == "tiled":
            raise UserError("backend tiled cannot run this call: it is a test")
        return prepare(network, backend, task, variant)

    monkeypatch.setattr(networks, "prepare", picky)
    found = measure(replace(QUICK, backends=("tiled", "reference"), modes=("training",)))
    assert [row["backend"] for row in found["networks"]] == [None, "reference"]
    assert "it is a test" in found["notes"][0]


# The command


def test_command_prints_json_and_keeps_files(tmp_path, capsys):
    words = ["benchmark", "san4_patchwise", *WORDS, "--mode", "inference", "--json", "--out", str(tmp_path / "kept")]
    assert main(words) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out) == json.loads((tmp_path / "kept" / "benchmark.json").read_text())
    assert streams.err == ""
    assert (tmp_path / "kept" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "kept" / "benchmark.md").read_text().startswith("# Benchmark\n")


def test_command_prints_a_table(capsys):
    assert main(["benchmark", "san4_pairwise", *WORDS, "--mode", "training"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["network", "backend", "mode", "batch"]
    assert [row.split()[0] for row in rows[:2]] == ["baseline_resnet26", "san4_pairwise"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["san11_pairwise"], "'san11_pairwise' is unknown"),
        (["--baseline", "resnet26x"], "'resnet26x' is unknown"),
        (["--batch", "0"], "batch is 0, but it must be at least 1"),
        (["--batch", "1,two"], "--batch must be whole numbers separated by commas, such as 1,4, not 1,two"),
        (["--rounds", "0"], "rounds is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--backend", "auto,cuda"], "backend 'cuda' is unknown here; choose one of: auto"),
        (["--dtype", "int8"], "dtype 'int8' is unknown; choose among: float32"),
        (["--mode", "sleep"], "mode 'sleep' is unknown; choose among: inference, training"),
        (["--device", "meta"], "cpu or cuda only"),
        (["--no-networks"], "there is nothing to measure"),
        (["san4_pairwise", "--resolution", "2", "--mode", "inference", "--no-compile"], "2×2"),
    ],
)
def test_mistakes(words, sentence, capsys):
    assert main(["benchmark", *words]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert sentence in streams.err


def test_results_need_a_folder_and_matplotlib(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["benchmark", *WORDS, "--out", str(tmp_path / "file")]) == 2
    assert "cannot be the folder for the results" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "san.evaluation.speed.chart")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["benchmark", *WORDS, "--out", str(tmp_path / "new")]) == 2
    assert "needs the package matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# The roofline, benchmarks/roofline.py


def test_a_network_falls_into_parts_of_all_its_multiply_adds():
    """All but the classifier's, 1000 rows of what the last stage gives, and the position map's two by two."""
    for form in ("pairwise", "patchwise"):
        model = san.create_model(f"san10_{form}")
        found = roofline.parts(model, 64)
        counted = sum(part.multiply_adds for part in found) + 1000 * 2048
        position = sum(4 * size**2 * blocks for size, blocks in ((32, 2), (16, 1), (8, 2), (4, 4), (2, 1)))
        assert counted + (position if form == "pairwise" else 0) == complexity(model, 64)["macs"]
        # The 64-channel map of the first block's input of 32×32, read for φ, ψ and β and written as R = 4, 4 and 16.
        assert found[1].name == "φ, ψ, β"
        assert (found[1].map_bytes, found[1].weight_bytes) == (4 * (64 + 24) * 32**2, 4 * 64 * 24)


@pytest.mark.skipif(library.load() is None, reason="the native library is not installed")
@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
def test_every_part_of_a_network_has_its_kernels(form, monkeypatch):
    monkeypatch.setattr(roofline, "peaks", lambda: (100.0, 1e10))
    monkeypatch.setattr("san.fused._ROOM", 1 << 16)  # several shares, the last one smaller
    found = roofline.measure(f"san4_{form}", 3, 32, 1)
    assert [row["part"] for row in found["rows"]][:4] == ["pooling, product", "φ, ψ, β", "attention", "last product"]
    assert all(row["seconds"] > 0 and row["roof_seconds"] > 0 for row in found["rows"])
    assert len(roofline.table(found)) == len(found["rows"]) + 1
    monkeypatch.setattr(roofline, "build_network", lambda _: san.create_model("san4_patchwise", relation="star"))
    with pytest.raises(RuntimeError, match="kernels belong to no part"):
        roofline.measure("star has a product of its own", 3, 32, 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", "0"], "rounds is 0, but it must be at least 1"),
        (["san11_pairwise"], "'san11_pairwise' is unknown"),
        (["baseline_resnet26"], "baseline_resnet26 is no self-attention network"),
        (["--json", "nowhere/roofline.json"], "nowhere is no folder"),
    ],
)
def test_the_roofline_refuses_before_it_measures(words, sentence, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "measure_networks", None)
    with pytest.raises(SystemExit, match="2"):
        roofline.main(words)
    assert sentence in capsys.readouterr().err
