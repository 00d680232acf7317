"""The page answers what the API answers, whoever asks besides, and mistakes by a sentence."""

import base64
import io
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from ext_common.cli import UserError

pytest.importorskip("gradio", reason="the page needs the extra page")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from diffusion_ext.inference import DiffusionModel
from diffusion_ext.page import taken_apart
from diffusion_ext.pictures import display_scale, grid, pil_image
from ext_common.page import Settings
from ext_common.page.__main__ import build, listen, main
from ext_common.page.find import find
from fairseq_ext.speaker import SpeakerModel
from fairseq_ext.translation import Translator
from fairseq_ext.translation.page import hover

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "before.tar.xz"
JOBS = ("speaker", "translation", "diffusion")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Small trained models of each job."""
    folder = tmp_path_factory.mktemp("models")
    with tarfile.open(GOLDEN) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def paths(before):
    return {job: str(before / job / "checkpoint.pt") for job in JOBS}


@pytest.fixture(scope="module")
def client(paths, tmp_path_factory):
    """Somebody who looks at a page with all three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        settings = Settings(port=0, gallery=str(tmp_path_factory.mktemp("people") / "people.npz"))
        page = build(find(paths.values())[0], settings)
        yield Client(listen(page, settings), verbose=False, download_files=False)
        page.close(verbose=False)


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
        assert said == f"## {found.speaker}"
        assert scores["data"] == [[m.speaker, f"{m.score:.3f}"] for m in found.candidates]
        assert "What the model hears" in picture


def test_people_are_enrolled_and_known_again(client, paths, voices):
    path = paths["speaker"]
    with pytest.raises(AppError, match="nobody is enrolled yet"):
        client.predict(path, handle_file(str(voices[0])), api_name="/recognise")
    for name, voice in zip(("ann", "bob"), voices, strict=False):
        said = client.predict(path, handle_file(str(voice)), name, api_name="/enrol")
    assert said == "bob is one of 2 people: ann, bob"
    said, rows = client.predict(path, handle_file(str(voices[1])), api_name="/recognise")
    assert said.startswith("## bob") and "gallery calibrate" in said
    assert rows["data"][0] == ["bob", "1.000"] and len(rows["data"]) == 2
    with pytest.raises(AppError, match="a name without white space"):
        client.predict(path, handle_file(str(voices[1])), "two words", api_name="/enrol")


def test_translates_and_shows_where_it_looked(client, paths):
    best, rows, looks, _ = client.predict(
        paths["translation"], "I like red apples.", api_name="/translate"
    )
    assert [best] == Translator.from_checkpoint(paths["translation"])(
        ["I like red apples."], beam=5
    )
    assert rows["data"][0][0] == best and len(rows["data"]) == 5
    assert 'class="t0" tabindex="0"' in looks


def test_a_file_has_as_many_lines_when_it_is_translated(client, paths, tmp_path):
    given = tmp_path / "lines.txt"
    given.write_text("I like red\u2028apples.\n\nwe see big houses.\n", encoding="utf-8")
    job = client.submit(paths["translation"], handle_file(str(given)), api_name="/translate_file")
    button = job.result()
    assert len(job.outputs()) == 2  # hidden while it works, so that it can be cancelled there
    text = httpx.get(button["value"]["url"]).text
    lines = ["I like red\u2028apples.", "", "we see big houses."]
    assert text.split("\n") == [*Translator.from_checkpoint(paths["translation"])(lines), ""]


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


def pixels(shown):
    source = re.search(r"base64,([^\"]+)", shown)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))


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
        assert said == f"## {found.speaker}"
        assert scores["data"][0][1] == f"{found.score:.3f}"


@pytest.mark.slow
def test_mistakes_are_sentences(client, paths, voices, tmp_path, capfd):
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
        with pytest.raises(AppError) as told:
            client.predict(paths["speaker"], handle_file(str(path)), api_name="/identify")
        assert "Traceback" not in str(told.value) and "went wrong here" not in str(told.value)
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

    line = '[x][INFO] {"epoch": 1, "train_loss": "2.5", "train_num_updates": "10", "train_lr": "0.1"}\n'
    (tmp_path / "train.log").write_text(line)
    assert "running" in standing(tmp_path) and "loss 2.5" in standing(tmp_path)
    assert curves(tmp_path).startswith("<figure")
    (tmp_path / "samples").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "samples" / "0010.png")
    assert "0010.png" in pictures(tmp_path)
