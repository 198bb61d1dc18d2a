"""The page of `san demo` without a browser: what it answers, uploads of any kind, this machine only, the card."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest
import torch
from PIL import Image

import san
from plain_san import randomised
from san.checkpoints import save_model
from san.cli import main
from san.demo import answers
from san.demo.charts import draw_turning
from san.demo.networks import PACKAGED, load_networks
from san.demo.samples import samples_for
from san.demo.serving import HOST, serve, served
from san.demo.showing import Controls, Look, Showing
from san.demo.uploads import read_upload
from san.errors import UserError

NETWORK = {"widths": [64, 64, 128], "blocks": [1, 1, 1], "kernels": [3, 3, 3]}
CARD = PACKAGED.with_name("MODEL_CARD.md")


def _saved(path: Path, name: str = "san4_pairwise", **options) -> Path:
    """A small network with random tensors, for images of 28×28."""
    torch.manual_seed(0)
    model = san.create_model(name, 6, **(NETWORK if name.startswith("san4") else {}), **options)
    model.pretrained_cfg["input_size"] = (options.get("in_chans", 3), 28, 28)
    model.load_state_dict(randomised(model.state_dict()))
    save_model(model, path)
    return path


@pytest.fixture(scope="module")
def showing(tmp_path_factory) -> Showing:
    folder = tmp_path_factory.mktemp("networks")
    return Showing(load_networks([_saved(folder / f"{form}.safetensors", f"san4_{form}") for form in FORMS]))


FORMS = ("pairwise", "patchwise")


def _controls(showing: Showing, name: str = "pairwise.safetensors", **more) -> Controls:
    return Controls(name, **{"layer": showing.layers(name)[0], **more})


def _look(showing: Showing, **more) -> Look:
    return showing.take(showing.sample(0), _controls(showing, **more))


# What it answers


def test_probabilities_are_the_networks_own(showing):
    picture, look = showing.sample(0), _look(showing)
    network = showing.networks["pairwise.safetensors"]
    with torch.no_grad():
        expected = network.model(picture.prepared[network.name])[0].softmax(0)
    torch.testing.assert_close(look.taken.probabilities, expected)
    torch.testing.assert_close(look.changed.probabilities, expected)


def test_a_turned_picture_is_judged_anew_and_a_full_turn_is_none(showing):
    look = _look(showing, degrees=90)
    assert torch.equal(look.changed.pixels, torch.rot90(_look(showing).changed.pixels, -1, dims=(2, 3)))
    degrees, share, _ = look.taken.turning[6]
    assert degrees == 90
    assert share == pytest.approx(float(look.changed.probabilities[look.taken.answer]), abs=1e-5)
    around = showing.change(look, _controls(showing, degrees=360))
    torch.testing.assert_close(around.changed.probabilities, look.taken.probabilities)


def test_a_picture_whose_scores_overflow_stays_as_it_is_under_attack(tmp_path):
    (network,) = load_networks([_saved(tmp_path / "overflowing.safetensors")])
    with torch.no_grad():
        network.model.get_classifier().weight.fill_(torch.inf)
    taken = answers.Taken(torch.zeros(1, 3, 28, 28), torch.ones(6) / 6, [])
    changed = answers.change(network, taken, degrees=90, strength=8)
    assert changed.pixels.equal(changed.turned)


def test_the_attack_stays_within_its_strength_and_lowers_the_answer(showing):
    look = _look(showing)
    attacked = showing.change(look, _controls(showing, strength=8)).changed
    added = (attacked.pixels - attacked.turned).abs().max()
    assert 0 < float(added) <= 8 / 255 + 1e-6
    assert attacked.probabilities[look.taken.answer] < look.taken.probabilities[look.taken.answer]
    assert showing.change(look, _controls(showing)).changed.pixels.equal(look.changed.pixels)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_drawn_follows_pixel_layer_and_group(showing, form):
    name = f"{form}.safetensors"
    start = _controls(showing, name)
    look = showing.take(showing.sample(0), start)
    others = [
        start,
        _controls(showing, name, point=(0.1, 0.9)),
        _controls(showing, name, layer=showing.layers(name)[-1]),
        _controls(showing, name, group="group 1"),
    ]
    drawn = [showing.draw(look, each) for each in others]
    assert len(set(drawn)) == len(drawn)
    assert "pixel 14, 14 " in drawn[0]
    assert "pixel 2, 25 " in drawn[1]
    assert "weight α of group 1" in drawn[3]
    assert all(
        part.count("data-group=") == 1 + showing.networks[name].groups[showing.layers(name)[0]] for part in drawn[:2]
    )


def test_a_group_of_another_layer_and_a_point_outside_do_no_harm(showing):
    look = _look(showing)
    assert "pixel 27, 0 " in showing.draw(look, _controls(showing, point=(1.0, -3.0), group="group 99"))


def test_a_network_that_is_chosen_but_waits_for_its_turn_mixes_nothing_up(showing):
    """The menu says patchwise already, but what is known of the picture is the pairwise network's, and its layers."""
    early = _look(showing, strength=2)
    controls = _controls(showing, "patchwise.safetensors", strength=4)
    found = showing.change(early, controls)
    own = _controls(showing, strength=4)
    assert torch.equal(found.changed.probabilities, showing.change(early, own).changed.probabilities)
    assert showing.draw(found, controls) == showing.draw(found, own)
    unknown, middle = _controls(showing, layer="layer9"), showing.networks["pairwise.safetensors"].first_layer
    assert showing.draw(found, unknown) == showing.draw(found, _controls(showing, layer=middle))


def test_the_verdict_tells_whether_the_answer_holds(showing):
    network = showing.networks["pairwise.safetensors"]
    look = _look(showing)
    first, other = network.words[look.taken.answer], network.words[look.taken.answer - 1]
    assert f"<b>{first}</b>" in showing.draw(look, _controls(showing))
    fallen = torch.zeros(6)
    fallen[look.taken.answer - 1] = 1
    for probabilities, words in ((look.taken.probabilities, f"Holds: {first}"), (fallen, f"Falls to {other}")):
        changed = type(look.changed)(10, 0, look.changed.turned, look.changed.pixels, probabilities)
        assert words in showing.draw(replace(look, changed=changed), _controls(showing))


def test_the_curve_has_a_point_for_each_angle(showing):
    chart = draw_turning("<b>", _look(showing).taken, 45)
    assert chart.count("<circle") == 25
    assert "<b>" not in chart


def test_a_network_without_attention_is_shown_without_weights(tmp_path):
    path = _saved(tmp_path / "resnet.safetensors", "baseline_resnet26", small_images=True)
    showing = Showing(load_networks([path]))
    assert showing.layers("resnet.safetensors") == []
    controls = Controls("resnet.safetensors")
    assert "no attention layers" in showing.draw(showing.take(showing.sample(0), controls), controls)


def test_many_visitors_at_once_get_what_one_gets(showing):
    wanted = [(_controls(showing, degrees=5 * number, strength=number % 3), number) for number in range(8)]

    def visit(controls: Controls, number: int) -> torch.Tensor:
        return showing.take(showing.sample(number % 3), controls).changed.probabilities

    alone = [visit(*each) for each in wanted]
    found: dict[int, torch.Tensor] = {}
    threads = [Thread(target=lambda each=each: found.update({each[1]: visit(*each)})) for each in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected) for number, expected in enumerate(alone))


# Uploads


def _rejected(path: Path) -> str:
    with pytest.raises(UserError) as problem:
        read_upload(path)
    (sentence,) = problem.value.args
    assert sentence.startswith(path.name)
    assert "\n" not in sentence
    return sentence


def _png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size, which is enough to be opened."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 99))]
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_is_no_image_gets_a_sentence(tmp_path):
    for name, content in (("notes.txt", b"hello"), ("cat.jpg", b"\x80\x04\x95."), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        assert "is not an image in one of the forms" in _rejected(tmp_path / name)


def test_forms_that_run_programs_are_not_read(tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert "is not an image in one of the forms" in _rejected(tmp_path / "page.jpg")


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_000, 9_000)])
def test_an_enormous_image_is_not_decoded(tmp_path, size):
    (tmp_path / "huge.png").write_bytes(_png_of(*size))
    assert "more than 64 million pixels" in _rejected(tmp_path / "huge.png")


def test_a_truncated_image_gets_a_sentence(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((200, 200), 80).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:2000])
    assert "damaged" in _rejected(tmp_path / "cut.jpg")


def test_a_thread_of_pixels_gets_a_sentence(tmp_path):
    Image.new("RGB", (4000, 2)).save(tmp_path / "line.png")
    assert "4000×2" in _rejected(tmp_path / "line.png")


def test_images_of_every_kind_come_upright_and_in_colour(tmp_path):
    red_left = Image.new("RGB", (40, 20), "blue")
    red_left.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90°
    red_left.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    red_left.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    frames = [red_left, Image.new("RGB", (40, 20), "green")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    red_left.convert("RGBA").save(tmp_path / "clear.webp", lossless=True)
    for name in ("turned.png", "print.jpg", "film.gif", "clear.webp"):
        pixels = np.asarray(read_upload(tmp_path / name)).astype(int)
        assert pixels.shape == (20, 40, 3)
        assert pixels[10, 10, 0] > 200 > 60 > pixels[10, 10, 2]
        assert pixels[10, 30, 2] > 200 > 60 > pixels[10, 30, 0]


def test_names_of_files_and_classes_cannot_be_markup(showing, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    model = san.create_model("san4_pairwise", 6, **NETWORK)
    model.pretrained_cfg["label_names"] = [f"{name}{number}" for number in range(6)]
    save_model(model, tmp_path / "named.safetensors")
    other = Showing(load_networks([tmp_path / "named.safetensors"]))
    controls = Controls("named.safetensors", degrees=30)
    assert "<img" not in other.draw(other.take(other.sample(0), controls), controls)


# Networks


def test_samples_fit_what_the_network_knows():
    assert [sample.name for sample in samples_for(list("0123456789"))] == ["a drawn 3", "a drawn 8", "a drawn 0"]
    things = samples_for(["goldfish"])
    assert len(things) == 6
    assert all(sample.image.mode == "RGB" for sample in things)


def test_wordnet_ids_are_shown_in_words(tmp_path):
    model = san.create_model("san4_pairwise", 2, **NETWORK)
    model.pretrained_cfg["label_names"] = ["n01443537", "n04398044"]
    save_model(model, tmp_path / "things.safetensors")
    assert load_networks([tmp_path / "things.safetensors"])[0].words == ["goldfish", "teapot"]


def test_networks_that_cannot_be_shown_are_refused(tmp_path):
    path = _saved(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="named twice"):
        load_networks([path, path])
    with pytest.raises(UserError, match="colour"):
        load_networks([_saved(tmp_path / "grey.safetensors", in_chans=1)])
    save_model(san.create_model("san4_pairwise", 0, **NETWORK), tmp_path / "headless.safetensors")
    with pytest.raises(UserError, match="classifier"):
        load_networks([tmp_path / "headless.safetensors"])


def test_alike_names_are_told_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        _saved(tmp_path / folder / "model.safetensors")
    names = [
        each.name for each in load_networks([tmp_path / "one/model.safetensors", tmp_path / "two/model.safetensors"])
    ]
    assert names == [str(tmp_path / "one/model.safetensors"), str(tmp_path / "two/model.safetensors")]


def test_the_packaged_network_is_small_and_its_card_tells_what_it_is():
    assert PACKAGED.stat().st_size <= 3 * 2**20
    (network,) = load_networks()
    card = CARD.read_text(encoding="utf-8")
    assert PACKAGED.name in card
    assert "san train" in card
    assert "Tiny ImageNet" in card
    assert len(network.words) == 20
    assert not [word for word in network.words if f"| {word} |" not in card]
    assert not [name for name in network.model.pretrained_cfg["label_names"] if name not in card]
    assert re.search(r"top-1[^\n]*\d\d\.\d", card)


def test_the_first_picture_is_recognised():
    """What is seen first must already work."""
    showing = Showing(load_networks())
    (network,) = showing.networks.values()
    look = showing.take(showing.sample(0), Controls(network.name))
    assert network.words[look.taken.answer] in showing.samples[0].name


# This machine only


def test_the_page_is_served_to_this_machine_alone(tmp_path, monkeypatch):
    """Nothing listens elsewhere, no other host or proxy is asked, another name is refused, and no file remains."""
    asked = []
    connect = socket.socket.connect

    def noted(self, address):
        asked.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Nobody listens there: who asks it fails.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    networks = load_networks([_saved(tmp_path / "network.safetensors")])
    with served(networks) as (page, address):
        assert address.startswith(f"http://{HOST}:")
        assert page.server.config.host == HOST
        # Not through a proxy that the environment may name.
        ask = build_opener(ProxyHandler({})).open
        answer = ask(address)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "What self-attention sees" in answer.read().decode()
        with pytest.raises(HTTPError, match="400"):
            ask(Request(address, headers={"Host": "elsewhere.example"}))
    assert {host for host, *_ in asked if isinstance(host, str)} == {HOST}
    assert [path.name for path in tmp_path.iterdir()] == ["network.safetensors"]


def test_a_port_that_is_taken_or_none_and_a_missing_checkpoint_end_in_a_sentence(tmp_path, capsys):
    path = str(_saved(tmp_path / "network.safetensors"))
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["demo", "--checkpoint", path, "--port", port, "--no-open-browser"]) == 2
    assert capsys.readouterr().err == f"san: error: port {port} is not free; name another with --port\n"
    assert main(["demo", "--checkpoint", path, "--port", "80000", "--no-open-browser"]) == 2
    assert capsys.readouterr().err == "san: error: port 80000 does not exist; --port takes 1 to 65535\n"
    assert main(["demo", "--checkpoint", "nowhere.pth", "--checkpoint", path, "--no-open-browser"]) == 2
    assert "nowhere.pth" in capsys.readouterr().err


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def _upload(address: str, **headers: str) -> int:
    """Send a file as a browser does; gives the answer's status."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    sent = Request(f"{address}gradio_api/upload", head + b"hello\r\n--x--\r\n", {**kind, **headers})
    try:
        return build_opener(ProxyHandler({})).open(sent).status
    except HTTPError as refusal:
        return refusal.code


def test_files_of_other_sites_are_refused_and_uploads_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("san.demo.page._UPLOADS", (0.1, 0.1))
    networks = load_networks([_saved(tmp_path / "network.safetensors")])
    with served(networks) as (_, address):
        for site in ("cross-site", "same-site"):
            assert _upload(address, **{"Sec-Fetch-Site": site}) == 403
        for origin in ("https://example.com", "null", "http://["):
            assert _upload(address, Origin=origin) == 403
        assert _files(tmp_path) == ["network.safetensors"]
        assert _upload(address, Origin=address.rstrip("/"), **{"Sec-Fetch-Site": "same-origin"}) == 200
        patience = time.monotonic() + 10
        while "a.png" in _files(tmp_path):
            assert time.monotonic() < patience
            time.sleep(0.02)


def test_sigterm_ends_the_page_and_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    networks = load_networks([_saved(tmp_path / "network.safetensors")])

    def unheard(*_: object) -> None:
        raise AssertionError("nobody listened to SIGTERM")

    def kill() -> None:
        while HOST not in capsys.readouterr().out:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, unheard)
    try:
        Thread(target=kill, daemon=True).start()
        with pytest.raises(SystemExit) as ended:
            serve(networks, open_browser=False)
        assert signal.getsignal(signal.SIGTERM) is unheard
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["network.safetensors"]
