"""The page answers what the API answers, whoever asks besides, and mistakes by a sentence."""

import base64
import io
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import polib
import pytest
import soundfile
import torch
from PIL import Image

from ext_common.cli import UserError

pytest.importorskip("gradio", reason="the page needs the extra page")

import gradio as gr
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from diffusion_ext.inference import DiffusionModel
from diffusion_ext.page import taken_apart
from diffusion_ext.pictures import display_scale, grid, pil_image
from ext_common import packed
from ext_common.checkpoints import read_state
from ext_common.page import Settings, as_text, plain
from ext_common.page.__main__ import build, listen, load_tabs, main
from ext_common.page.find import find
from fairseq_ext.speaker import SpeakerModel
from fairseq_ext.speaker.export.exported import KEY, Description
from fairseq_ext.speaker.features import FeatureSpec
from fairseq_ext.speaker.gallery.store import Gallery
from fairseq_ext.speaker.inference import Identification, Match
from fairseq_ext.speaker.page import (
    BAND,
    COLOUR,
    backend_of,
    in_gallery,
    people_beside,
    shown,
    verdict,
)
from fairseq_ext.speaker.verify.backend import Backend, Side
from fairseq_ext.speaker.verify.calibration import Calibration
from fairseq_ext.translation import Translator
from fairseq_ext.translation.page import hover

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "before.tar.xz"
JOBS = ("speaker", "translation", "diffusion")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Small trained models of each job."""
    folder = tmp_path_factory.mktemp("models")
    shutil.unpack_archive(GOLDEN, folder)
    return folder


@pytest.fixture(scope="module")
def paths(before):
    return {job: str(before / job / "checkpoint.pt") for job in JOBS}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Where the page keeps its gallery."""
    return str(tmp_path_factory.mktemp("people") / "people.npz")


@pytest.fixture(scope="module")
def page(paths, people, tmp_path_factory):
    """A page with all three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        settings = Settings(port=0, gallery=people)
        page = build(find(paths.values())[0], settings)
        listen(page, settings)
        yield page
        page.close(verbose=False)


@pytest.fixture(scope="module")
def client(page):
    """Somebody who looks at it."""
    patient = {"timeout": 300}  # where another takes the processor, its 5 s are soon over
    return Client(page.local_url, verbose=False, download_files=False, httpx_kwargs=patient)


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    for number in range(5):
        time = np.arange(16000) / 16000
        buzz = np.sign(np.sin(2 * np.pi * (100 + 60 * number) * time)) * 0.1
        noise = np.random.default_rng(number).normal(size=len(time)) * 0.01
        soundfile.write(folder / f"{number}.wav", buzz + noise, 16000)
    return sorted(folder.iterdir())


def test_who_speaks_as_the_api_says(client, paths, voices):
    model = SpeakerModel.from_checkpoint(paths["speaker"])
    for voice in voices[:2]:
        said, scores, picture = client.predict(
            paths["speaker"], handle_file(str(voice)), api_name="/identify"
        )
        found = model.identify(str(voice), top_k=5)
        assert said.startswith(f"## {found.speaker}\n")
        assert scores["data"] == [[m.speaker, f"{m.score:.3f}"] for m in found.candidates]
        drawn, weights = pixels(picture), model.frame_weights(str(voice))
        assert "how much each moment counted" in picture and drawn.shape[1] == len(weights)
        # a bar for each frame, in proportion
        heights = (drawn[:BAND] == COLOUR).all(-1).sum(0)
        np.testing.assert_allclose(heights / BAND, weights / weights.max(), atol=0.5 / BAND)


def test_probabilities_are_shown_where_there_are_some():
    candidates = (Match("ann", 0.5), Match("bob", -0.25))
    assert shown(Identification(candidates, (0.9, 0.06)), "cosine") == [
        ["ann", "90.0%"],
        ["bob", "6.0%"],
    ]
    assert shown(Identification(candidates), "cosine") == [["ann", "0.500"], ["bob", "-0.250"]]
    linear = Identification((Match("ann", float(np.log(0.25))),))
    assert shown(linear, "log-probability") == [["ann", "25.0%"]]


def test_people_are_enrolled_and_known_again(client, paths, people, voices):
    who = paths["speaker"], people
    with pytest.raises(AppError, match="nobody is enrolled yet"):
        client.predict(*who, handle_file(str(voices[0])), api_name="/recognise")
    for name, voice in zip(("ann", "bob"), voices, strict=False):
        said = client.predict(*who, handle_file(str(voice)), name, api_name="/enrol")
    assert said == "bob is one of 2 people: ann, bob"
    said, rows = client.predict(*who, handle_file(str(voices[1])), api_name="/recognise")
    assert said.startswith("## bob") and "gallery calibrate" in said
    assert rows["data"][0] == ["bob", "1.000"] and len(rows["data"]) == 2
    # a page that is started anew
    again = build(find([paths["speaker"]])[0], Settings(gallery=people))
    recognise = next(fn.fn for fn in again.fns.values() if fn.api_name == "recognise")
    assert recognise(*who, str(voices[0]))[0].startswith("## ann")
    with pytest.raises(AppError, match="a name without white space"):
        client.predict(*who, handle_file(str(voices[1])), "two words", api_name="/enrol")


def test_two_recordings_are_compared(client, paths, people, voices):
    one, other = voices[:2]
    a, b = SpeakerModel.from_checkpoint(paths["speaker"]).embed([str(one), str(other)])
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    given = handle_file(str(one)), handle_file(str(other))
    said = client.predict(paths["speaker"], people, *given, api_name="/compare")
    assert said.startswith(f"## cosine {cosine:.3f}\n") and "--calibrate" in said


def calibrated():
    """Cosines whose log-likelihood ratio is 10 times (cosine − 0.5), as those of a model "m"."""
    backend = Backend.unfitted("cosine", 2, "m")
    return replace(backend, calibration=Calibration(np.array([10.0]), -5.0))


def test_probabilities_are_said_where_there_is_a_calibration(tmp_path):
    runner = SimpleNamespace(sha256="m", backend=None, path="m.pt")
    gallery = Gallery("m", calibrated())
    for k, name in enumerate(("ann", "bob", "cleo", "dan", "eve", "flo")):
        gallery.enrol(name, np.array([[np.cos(k), np.sin(k)]]))
    gallery.save(tmp_path / "people.npz")
    calibrated().save(tmp_path / "backend.npz")
    for given in (str(tmp_path / "backend.npz"), None):
        found = backend_of(runner, given, str(tmp_path / "people.npz"))
        assert found.calibration.offset == -5
    assert backend_of(runner, None, str(tmp_path / "none.npz")).calibration is None
    # odds of 9 to 1
    assert "## The same" in verdict(found, 0.7, np.log(9)) and "90.0%" in verdict(
        found, 0, np.log(9)
    )
    assert "## Not the same" in verdict(replace(found, threshold=3.0), 0.7, np.log(9))
    llr = 10 * (np.array([1.0, np.cos(1), np.cos(2), np.cos(3), np.cos(4), np.cos(5)]) - 0.5)
    odds = np.append(np.exp(llr) / 6, 1)
    said, rows = in_gallery(gallery, gallery.scores(Side.of_tests(np.array([[1.0, 0]]), [1.0])))
    order = np.argsort(-llr)[:5]
    expected = [[gallery.names[k], f"{odds[k] / odds.sum():.1%}"] for k in order]
    assert said == "## ann" and rows == [*expected, ["unknown", f"{odds[-1] / odds.sum():.1%}"]]
    stranger = np.full((1, 6), -3.0)
    assert in_gallery(gallery, stranger)[0] == "## unknown"


def test_translates_and_shows_where_it_looked(client, paths):
    best, rows, looks, _ = client.predict(
        paths["translation"], "I like red apples.", api_name="/translate"
    )
    assert [best] == Translator.from_checkpoint(paths["translation"])(
        ["I like red apples."], beam=5
    )
    assert rows["data"][0][0] == best and len(rows["data"]) == 5
    assert 'class="t0" tabindex="0"' in looks


def test_of_many_lines_the_first_are_seen_before_the_last(client, paths):
    text = "\n".join(f"I like {number} red apples." for number in range(20))
    job = client.submit(paths["translation"], text, api_name="/translate")
    best, rows, *_ = job.result()
    seen = [said.split("\n") for said, *_ in job.outputs()]
    assert [len(lines) for lines in seen] == [16, 20, 20] and seen[0] == seen[2][:16]
    assert best.split("\n") == Translator.from_checkpoint(paths["translation"])(text.split("\n"))
    assert rows["data"][-1][0].startswith("20: ")


def test_the_answer_is_translated_back_where_a_model_can(page, paths, tmp_path):
    state = read_state(paths["translation"])
    saved = state["task_state"]["translation"]
    # the same model under the names of the other direction
    for languages in (saved, state["cfg"]["task"]):
        languages["source_lang"], languages["target_lang"] = "zh", "en"
    saved["spm"] = {"zh": saved["spm"]["en"], "en": saved["spm"]["zh"]}
    torch.save(state, tmp_path / "reverse.pt")
    both = find([paths["translation"], tmp_path / "reverse.pt"])[0]
    for there, models in ((False, page), (True, build(both, Settings()))):
        translate = next(fn.fn for fn in models.fns.values() if fn.api_name == "translate")
        *_, (best, _, _, back) = translate(paths["translation"], "I like red apples.")
        assert back["visible"] is there
    assert [back["value"]] == Translator.from_checkpoint(tmp_path / "reverse.pt")([best])


def test_a_file_has_as_many_lines_when_it_is_translated(client, paths, tmp_path):
    given = tmp_path / "lines.txt"
    given.write_text("I like red\u2028apples.\n\nwe see big houses.\n", encoding="utf-8")
    job = client.submit(paths["translation"], handle_file(str(given)), api_name="/translate_file")
    button, _ = job.result()
    assert len(job.outputs()) == 2  # hidden while it works, so that it can be cancelled there
    text = httpx.get(button["value"]["url"]).text
    lines = ["I like red\u2028apples.", "", "we see big houses."]
    assert text.split("\n") == [*Translator.from_checkpoint(paths["translation"])(lines), ""]


def test_a_catalogue_is_filled_in(client, paths, tmp_path):
    given = tmp_path / "app.po"
    entries = ('"I like apples."', '""'), ('"%(n)d <b>big</b> houses"', '""'), ('"no"', '"不"')
    given.write_text("".join(f"msgid {a}\nmsgstr {b}\n\n" for a, b in entries), encoding="utf-8")
    button, said = client.predict(
        paths["translation"], handle_file(str(given)), api_name="/translate_file"
    )
    assert button["value"]["orig_name"] == "app.zh.po"
    assert "2 entries" in said and "1 there before" in said
    first, second, there = polib.pofile(httpx.get(button["value"]["url"]).text)
    assert first.msgstr and there.msgstr == "不"
    assert all(part in second.msgstr for part in ("%(n)d", "<b>", "</b>"))


def test_draws_what_the_command_draws(client, paths):
    asked = (paths["diffusion"], "each in turn", 1, 3, 4, 7, "ddim")
    job = client.submit(*asked, api_name="/draw")
    drawn, _ = job.result()
    model = DiffusionModel.from_checkpoint(paths["diffusion"], "cpu")
    images = model.sample(
        4, seed=7, sampler="ddim", steps=3, labels=model.classes_in_turn(range(4))
    )
    expected = pil_image(grid(images), display_scale(model.shape[1], 96))
    assert np.array_equal(pixels(drawn), np.asarray(expected))
    assert len(job.outputs()) > 3  # what it was on the way, too


def test_what_is_filled_is_seen_batch_by_batch(client, paths, tmp_path):
    """So that it can be stopped between two; what is not painted over is that of the image in all."""
    channels, height, width = DiffusionModel.from_checkpoint(paths["diffusion"], "cpu").shape
    image = Image.new("RGB" if channels == 3 else "L", (width, height), "gray")
    layer = Image.new("RGBA", image.size)
    layer.paste("white", (0, 0, 2, 2))
    for name, one in (("image", image), ("layer", layer)):
        one.save(tmp_path / f"{name}.png")
    given = {name: handle_file(str(tmp_path / f"{name}.png")) for name in ("image", "layer")}
    painted = {"background": given["image"], "layers": [given["layer"]], "composite": None}
    job = client.submit(paths["diffusion"], painted, "each in turn", 3, 5, 1, api_name="/fill")
    job.result()
    first, last = map(pixels, job.outputs())
    assert last.shape[1] > first.shape[1]  # four images, then five
    gray = [
        (shown == np.array(Image.new("L", (1, 1), "gray"))[0, 0]).mean() for shown in (first, last)
    ]
    assert all(0.4 < share < 1 for share in gray), gray


def pixels(shown):
    source = re.search(r"base64,([^\"]+)", shown)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))


@pytest.mark.slow
def test_many_at_once_get_their_own_answers(client, paths, voices):
    model = SpeakerModel.from_checkpoint(paths["speaker"])
    alone = [model.identify(str(voice), top_k=5) for voice in voices]

    def ask(number):
        voice = str(voices[number % 5])
        return client.predict(paths["speaker"], handle_file(voice), api_name="/identify")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    for number, (said, scores, _) in enumerate(answers):
        found = alone[number % 5]
        assert said.startswith(f"## {found.speaker}\n")
        assert scores["data"][0][1] == f"{found.score:.3f}"


@pytest.mark.slow
def test_mistakes_are_sentences(page, client, paths, voices, tmp_path, capfd):
    """One of ten goes the whole way; the others go to what answers it, which spares 180 uploads."""
    identify = next(fn.fn for fn in page.fns.values() if fn.api_name == "identify")
    whole = Path(voices[0]).read_bytes()
    rng = np.random.default_rng(1)
    for number in range(200):
        kind = number % 5
        bad = {
            0: b"",
            1: rng.bytes(1 + number),
            2: whole[: 4 + number % 40],  # ends in the header
            3: b"RIFF" + rng.bytes(200),
            4: b"no sound, only text\n" * number,
        }[kind]
        path = tmp_path / f"{number}.{('wav', 'flac', 'mp3', 'ogg')[number % 4]}"
        path.write_bytes(bad)
        with pytest.raises((AppError, gr.Error)) as told:
            if number % 50 < 5:
                client.predict(paths["speaker"], handle_file(str(path)), api_name="/identify")
            else:
                identify(paths["speaker"], str(path))
        said = getattr(told.value, "message", None) or str(told.value)
        assert "Traceback" not in said and "went wrong here" not in said
    with pytest.raises(AppError, match="no recording yet"):
        client.predict(paths["speaker"], None, api_name="/identify")
    with pytest.raises(AppError, match="no text yet"):
        client.predict(paths["translation"], " \n", api_name="/translate")
    with pytest.raises(AppError, match="no image yet"):
        client.predict(paths["diffusion"], None, "each in turn", 3, 1, 1, api_name="/fill")
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


@pytest.mark.parametrize("side", [8, 400, 37])
def test_what_is_not_painted_over_is_kept_to_the_pixel(side):
    rng = np.random.default_rng(side)
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    scale = max(1, side // 8)
    image = Image.fromarray(small).resize((8 * scale, 8 * scale), Image.Resampling.NEAREST)
    layer = Image.new("RGBA", image.size)
    layer.paste((255, 255, 255, 255), (3 * scale, 5 * scale, 3 * scale + 1, 5 * scale + 1))
    kept, mask = taken_apart({"background": image, "layers": [layer]}, (3, 8, 8))
    assert np.array_equal(kept, small.transpose(2, 0, 1))
    assert [tuple(place) for place in np.argwhere(mask)] == [(0, 5, 3)]


def test_pieces_are_text_not_markup():
    found = SimpleNamespace(
        source=["▁<script>"], target=["&", "</s>"], weights=np.array([[1.0], [1.0]])
    )
    shown = hover(found)
    assert "<script>" not in shown and "&lt;script&gt;" in shown and ">&amp;<" in shown


def test_finds_one_checkpoint_of_each_training(before, tmp_path):
    for name in ("checkpoint_last.pt", "checkpoint_best.pt", "checkpoint3.pt"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes((before / "speaker" / "checkpoint.pt").read_bytes())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint_best.pt").write_bytes(b"PK\x03\x04 not really")
    models, left_out = find([tmp_path])
    (model,) = models
    assert (model.kind, model.path) == ("speaker_id", tmp_path / "a" / "checkpoint_best.pt")
    assert model.about["updates"].isdigit() and len(model.about["SHA-256"]) == 12
    assert len(left_out) == 1 and "b/checkpoint_best.pt" in left_out[0]


def test_finds_galleries_exports_logs_and_cards(paths, tmp_path):
    load_tabs(Settings())
    Gallery("m", calibrated()).save(tmp_path / "people.npz")
    np.savez(tmp_path / "other.npz", x=1)
    (tmp_path / "train.log").touch()
    state = read_state(paths["speaker"])
    card = b"# Card\n![](http://elsewhere/) <img src=x>"
    packed.write(tmp_path / "voices.zip", {}, state, {packed.CARD: card})
    spec = FeatureSpec.from_dict(state["task_state"]["spec"])
    said = Description(("a", "b"), spec.to_dict(), "outside", "cosine", "int8", "m")
    (tmp_path / "voices.onnx").write_bytes(exported(said))
    (tmp_path / "broken.onnx").write_bytes(b"no")
    models, left_out = find([tmp_path])
    found = {model.path.name: model for model in models}
    assert {name: model.kind for name, model in found.items()} == {
        "people.npz": "speaker_id",
        "voices.onnx": "speaker_id",
        "voices.zip": "speaker_id",
        "train.log": "training",
    }
    assert len(left_out) == 1 and "broken.onnx" in left_out[0]
    assert found["voices.onnx"].about["people"] == "2"
    # what somebody wrote is text: no picture that is fetched from elsewhere
    assert as_text(found["voices.zip"].card).count("<") == 2
    assert plain("![](http://a) *b*") == r"\!\[\]\(http\://a\) \*b\*"
    with pytest.raises(UserError, match="nothing that a tab can use"):
        find([tmp_path / "other.npz"])


def test_the_people_of_a_pack_are_kept_beside_it(paths, tmp_path, capsys):
    gallery, packed_one = tmp_path / "g.npz", tmp_path / "out" / "voices.zip"
    packed_one.parent.mkdir()
    Gallery("m", calibrated()).save(gallery)
    np.savez(tmp_path / "other.npz", x=1)
    files = {name: tmp_path / name for name in ("other.npz", "g.npz")}
    packed.write(packed_one, {}, read_state(paths["speaker"]), files)
    people = Path(people_beside(packed_one))
    assert people.parent == packed_one.parent and people.read_bytes() == gallery.read_bytes()
    assert f"{people} has the people of {packed_one}" in capsys.readouterr().out
    people.write_bytes(b"somebody more")
    assert people_beside(packed_one) == str(people)
    assert people.read_bytes() == b"somebody more", "people enrolled on the page stay"
    assert not Path(people_beside(Path(paths["speaker"]))).exists()


def exported(description):
    """The least file that says it is such an export."""
    helper = pytest.importorskip("onnx").helper
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(made, {KEY: description.to_json()})
    return made.SerializeToString()


class Runs:
    """What a checkpoint of somebody else's could do when it is unpickled."""

    def __reduce__(self):
        return print, ("this was run",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"cfg": Runs()}, tmp_path / "checkpoint_best.pt")
    models, left_out = find([tmp_path])
    assert not models and len(left_out) == 1
    assert "this was run" not in capsys.readouterr().out


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here"):
        build([], Settings())
    with pytest.raises(UserError, match="does not exist"):
        main([str(tmp_path / "nothing")])


def test_training_shows_how_it_stands(tmp_path):
    from ext_common.page.training import curves, pictures, standing

    numbers = '"train_num_updates": "10", "train_lr": "0.1", "train_ups": "2"'
    line = f'[x][INFO] {{"epoch": 1, "train_loss": "2.5", {numbers}}}\n'
    log = tmp_path / "train.log"
    log.write_text("[x][INFO] {'optimization': {'max_update': 130}}\n" + line)
    assert "running, 1:00 left of 130 updates" in standing(log) and "loss 2.5" in standing(log)
    assert curves(log).startswith("<figure")
    log.write_text(log.read_text().replace("130", "10"))
    assert "all 10 updates are done" in standing(log)
    (tmp_path / "samples").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "samples" / "0010.png")
    assert "0010.png" in pictures(tmp_path)
