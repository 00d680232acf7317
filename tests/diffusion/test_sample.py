"""The command that draws: names, continuing where it was stopped, refusals, pictures beside the folder."""

import hashlib
import json
import os
import re
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests import processes

pytest.importorskip("fairseq")

from diffusion_ext import pictures
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import grid, to_uint8
from diffusion_ext.sample.__main__ import SampleOptions, begin, labels_of, main, plan_of
from diffusion_ext.sample.album import shown_of_each, spread
from ext_common.checkpoints import untouched_logging
from ext_common.cli import UserError

QUICK = "--steps 2 --device cpu"


@pytest.fixture
def draw(tiny_checkpoint, tmp_path):
    """Run the command in this process; returns the folder and what it holds by name."""

    def draw(flags="", name="samples", path=tiny_checkpoint):
        with untouched_logging():
            main([str(tmp_path / name), "--path", str(path), *QUICK.split(), *flags.split()])
        return content(tmp_path / name)

    draw.folder = tmp_path / "samples"
    return draw


def content(folder):
    """PNGs by name, without the manifest and the plan."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def pixels(path):
    return np.asarray(Image.open(path))


def names(numbers):
    return [f"{k:06}.png" for k in numbers]


# --- what is written -----------------------------------------------------------------------------


def test_pictures_and_nothing_else(draw, tiny_checkpoint, tmp_path, capsys):
    found = draw("--num 5 --batch-size 2")
    assert sorted(found) == names(range(5)) and len(set(found.values())) == 5
    assert sorted(p.name for p in draw.folder.iterdir()) == [
        ".plan.json",
        *names(range(5)),
        "manifest.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "samples",
        "samples.csv",
        "samples.grid.png",
    ]
    image = Image.open(draw.folder / "000003.png")
    assert (image.mode, image.size) == ("L", (16, 16))
    # the pixels are those of the model, the grid shows them in order
    with untouched_logging():
        model = DiffusionModel.from_checkpoint(tiny_checkpoint, "cpu")
    images = model.sample(5, steps=2, batch_size=2)
    for k in range(5):
        assert np.array_equal(pixels(draw.folder / f"{k:06}.png"), images[k, 0])
    sheet = grid(images)[0]
    shown = pixels(tmp_path / "samples.grid.png")
    # under a line that says what they are; the white around it is as wide as that line
    below = shown[-3 * len(sheet) :, : 3 * sheet.shape[1]]
    assert (
        np.array_equal(below, sheet.repeat(3, 0).repeat(3, 1))
        and shown[: -3 * len(sheet)].min() < 99
    )
    said = capsys.readouterr().out
    assert "5 images of 16 × 16" in said and "samples.grid.png shows 5" in said


def test_the_manifest_says_how(draw, tiny_checkpoint):
    draw("--num 3 --sampler ddim:eta=0.5 --seed 8")
    manifest = json.loads((draw.folder / "manifest.json").read_text())
    digest = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert manifest["inputs"] == {str(tiny_checkpoint): digest}
    assert manifest["counts"] == {"images": 3} and manifest["seed"] == 8
    assert manifest["plan"]["sampler"] == "ddim:eta=0.5" and manifest["plan"]["steps"] == 2
    assert manifest["plan"]["checkpoint"] == digest


def test_an_image_does_not_depend_on_batch_number_and_first(draw):
    """In the same folder: --num, --first and --batch-size are no other options."""
    whole = draw("--num 7 --batch-size 7", name="whole")
    for flags, numbers in (
        ("--num 7 --batch-size 2", range(7)),
        ("--num 3 --batch-size 3", range(3)),
        ("--num 2 --first 4 --batch-size 1", (4, 5)),
    ):
        part = draw(flags, name=flags.replace(" ", ""))
        assert sorted(part) == names(numbers)
        for name, image in part.items():
            a, b = (np.asarray(Image.open(BytesIO(data)), int) for data in (image, whole[name]))
            # rounding of sums differs with the size of a batch
            assert np.abs(a - b).max() <= 1 and (a == b).mean() > 0.99


def test_twice_is_equal(draw, tmp_path):
    flags = "--num 3 --sampler ddpm --trajectory"
    first = draw(flags, name="a")
    torch.manual_seed(99)
    assert draw(flags, name="b") == first
    for ending in ("grid.png", "strip.png", "gif"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    assert draw(f"{flags} --seed 2", name="c") != first


def test_trajectory(draw, tiny_checkpoint, tmp_path):
    """A row an image, what is left of the noise after each step; the GIF ends with the images."""
    draw("--num 3 --steps 5 --trajectory")
    with untouched_logging():
        model = DiffusionModel.from_checkpoint(tiny_checkpoint, "cpu")
    noisy = []
    list(model.batches(range(3), steps=5, watch=lambda i, x, x0: noisy.append(to_uint8(x))))
    strip = pixels(tmp_path / "samples.strip.png")
    cell, scale = 16 + 2, 3
    # what remains below and beside the names
    strip = strip[-(3 * cell + 2) * scale :, -(5 * cell + 2) * scale :]
    small = strip[::scale, ::scale]
    finals = [pixels(draw.folder / f"{k:06}.png") for k in range(3)]
    for row, final in enumerate(finals):
        top = 2 + row * cell
        stages = [small[top : top + 16, 2 + k * cell : 18 + k * cell] for k in range(5)]
        assert np.abs(stages[-1].astype(int) - final).max() <= 1
        assert all(np.array_equal(stage, x[row, 0]) for stage, x in zip(stages, noisy, strict=True))
    with Image.open(tmp_path / "samples.gif") as gif:
        assert gif.n_frames == 5
        gif.seek(4)
        last = np.asarray(gif.convert("L"))[::scale, ::scale]
    assert np.abs(last[2:18, 2:18].astype(int) - finals[0]).max() <= 1


def test_stages_are_spread_over_the_way():
    assert spread(5, 12) == [0, 1, 2, 3, 4]
    assert spread(1000, 4) == [0, 333, 666, 999]
    assert spread(1, 12) == [0]


# --- stopped and continued -----------------------------------------------------------------------


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_continues_where_it_was_stopped(draw, capsys):
    whole = draw("--num 6 --batch-size 1")
    for k in (1, 4, 5):
        (draw.folder / f"{k:06}.png").unlink()
    (draw.folder / "manifest.json").unlink()
    before = stamps(draw.folder)
    again = draw("--num 6 --batch-size 1")
    assert again == whole
    assert {k: v for k, v in stamps(draw.folder).items() if k in before} == before
    assert "3 of 6 images are there already" in capsys.readouterr().out
    assert (draw.folder / "manifest.json").exists()


def test_killed_between_two_images(draw, monkeypatch):
    """What is there is whole, and no manifest says that all is."""
    whole = draw("--num 4 --batch-size 1", name="whole")
    draw("--num 1 --batch-size 1")
    save = pictures.save_png

    def save_two(path, image, **options):
        if len(content(draw.folder)) == 2:
            raise KeyboardInterrupt
        save(path, image, **options)

    monkeypatch.setattr(pictures, "save_png", save_two)
    with pytest.raises(KeyboardInterrupt):
        draw("--num 4 --batch-size 1")
    assert content(draw.folder) == {name: whole[name] for name in names(range(2))}
    assert not (draw.folder / "manifest.json").exists()
    monkeypatch.undo()
    assert draw("--num 4 --batch-size 1") == whole


def test_a_finished_run_draws_nothing(draw, monkeypatch):
    whole = draw("--num 4")
    before = stamps(draw.folder)
    monkeypatch.setattr(
        DiffusionModel, "denoiser", lambda *args: pytest.fail("the network was asked")
    )
    assert draw("--num 4") == whole and stamps(draw.folder) == before
    assert draw("--num 2 --first 1") == whole


def test_more_of_them(draw):
    four = draw("--num 4 --batch-size 1")
    seven = draw("--num 7 --batch-size 1")
    assert sorted(seven) == names(range(7)) and {k: seven[k] for k in four} == four


def test_of_other_options_only_with_overwrite(draw):
    draw("--num 3")
    before = content(draw.folder)
    for other in ("--seed 2", "--steps 3", "--sampler ddim", "--no-clip", "--ema -1"):
        with pytest.raises(
            UserError, match="samples of another model or other options.*--overwrite"
        ):
            draw(f"--num 3 {other}")
        assert content(draw.folder) == before
    new = draw("--num 2 --seed 2 --overwrite")
    assert sorted(new) == names(range(2)), "none of the old ones is left among them"
    assert not set(new.values()) & set(before.values())
    assert draw("--num 2 --seed 2") == new


def test_of_another_checkpoint(draw, tiny_checkpoint, tmp_path):
    draw("--num 2")
    state = torch.load(tiny_checkpoint, weights_only=True)
    state["model"]["ema.weights"] *= 1.5
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="samples of another model"):
        draw("--num 2", path=tmp_path / "other.pt")
    # the same one in another place is the same one
    copy = tmp_path / "copy.pt"
    copy.write_bytes(tiny_checkpoint.read_bytes())
    draw("--num 2", path=copy)


def test_overwrite_takes_samples_alone(tmp_path):
    folder = tmp_path / "samples"
    begin(folder, {"seed": 1}, overwrite=False)
    for name in ("000001.png", "1000000.png", "2024-01-31 holiday.png", "notes.txt"):
        (folder / name).touch()
    begin(folder, {"seed": 2}, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".plan.json",
        "2024-01-31 holiday.png",
        "notes.txt",
    ]
    assert json.loads((folder / ".plan.json").read_text()) == {"seed": 2}


def test_foreign_folders_and_files_stay(draw, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_text("mine")
    for flags in ("", "--overwrite"):
        with pytest.raises(UserError, match="photos is not empty and holds no samples"):
            draw(flags, name="photos")
    assert (tmp_path / "photos" / "000000.png").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file: give a folder"):
        draw(name="file")
    (tmp_path / "empty").mkdir()
    assert len(draw("--num 1", name="empty")) == 1


def test_fewer_images_than_before_leave_the_others_and_say_so(draw, capsys):
    draw("--num 3")
    assert "other images" not in capsys.readouterr().out
    assert len(draw("--num 2")) == 3
    assert "1 other images of this model, drawn before, lie there too" in capsys.readouterr().out


def test_a_checkpoint_that_is_replaced_while_it_is_read(draw, monkeypatch):
    """The weights of one would go under the name of the other."""
    hashes = iter(["before", "after"])
    monkeypatch.setattr("diffusion_ext.sample.__main__.sha256_file", lambda path: next(hashes))
    with pytest.raises(UserError, match="was replaced while it was read"):
        draw("--num 1")
    assert not draw.folder.exists()


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 1001", "--steps 1001 is not possible: the model was trained with 1000 timesteps"),
        ("--sampler dpmpp2m", "unknown sampler 'dpmpp2m': did you mean 'dpmpp_2m'"),
        ("--sampler ddim:eta=2", r"sampler 'ddim': eta must be in \[0, 1\]"),
        ("--sampler ddpm:variance=learned", "--learned-variance: use small or large"),
        ("--spacing leading", "unknown spacing 'leading'"),
        ("--label 7", "--label 7 is no class of the model; known: none"),
        ("--guidance 2", "--guidance needs a model trained with --class-labels"),
        ("--ema 5", "--ema 5 is not there"),
        ("--user-dir nowhere", "--user-dir nowhere is not a folder"),
        ("--inpaint none.png --mask none.png", "none.png does not exist"),
        ("--interpolate a.png,b.png", "a.png does not exist"),
    ],
)
def test_a_mistake_leaves_nothing_in_the_way(draw, flags, words):
    """The same command without it draws into the same folder."""
    with pytest.raises(UserError, match=words) as caught:
        draw(f"--num 1 {flags}")
    assert "\n" not in str(caught.value)
    # what a model has learned shows when it is asked
    assert draw.folder.exists() == ("learned" in flags)
    assert len(draw("--num 1")) == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num": 0}, "--num must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"first": -1}, "--first must be at least 0"),
        ({"ema": -2}, "--ema must be at least -1"),
        ({"seed": 2**63}, "has more than 64 bits"),
        ({"noise_level": 0.0}, r"--noise-level must be in \(0, 1\]"),
        ({"noise_level": 1.5}, r"--noise-level must be in \(0, 1\]"),
        ({"interpolate": ["a.png"]}, "--interpolate takes two images"),
        ({"inpaint": "a.png"}, "--inpaint and --mask belong together"),
        ({"mask": "a.png"}, "--inpaint and --mask belong together"),
        ({"inpaint": "a", "mask": "b", "interpolate": ["a", "b"]}, "exclude each other"),
        ({"interpolate": ["a", "b"], "trajectory": True}, "--trajectory .* not --interpolate"),
        ({"interpolate": ["a", "b"], "sampler": "heun"}, "always by ddim: leave --sampler out"),
        ({"inpaint": "a", "mask": "b", "sampler": "ddim"}, "always by ddpm"),
        ({"inpaint": "a", "mask": "b", "guidance": 2.0}, "--guidance needs --label"),
    ],
)
def test_options_that_cannot_be_are_bad_usage(changes, words):
    with pytest.raises(ValueError, match=words):
        SampleOptions(**{"path": "x", **changes})


def test_editing_names_the_sampler_it_uses(tmp_path):
    """The plan tells samples apart, and is where one looks up how they were made."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text(name)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    (tmp_path / "ckpt").touch()
    path = str(tmp_path / "ckpt")
    between = plan_of(SampleOptions(path=path, interpolate=[a, b], num=5))
    assert between["sampler"] == "ddim" and between["num"] == 5 and between["first"] == 0
    assert between != plan_of(SampleOptions(path=path, interpolate=[a, b], num=5, first=1))
    assert between != plan_of(SampleOptions(path=path, interpolate=[b, a], num=5))
    filled = plan_of(SampleOptions(path=path, inpaint=a, mask=b))
    assert filled["sampler"] == "ddpm" and "num" not in filled
    (tmp_path / "b.png").write_text("another mask")
    assert filled != plan_of(SampleOptions(path=path, inpaint=a, mask=b))


def test_all_classes_in_turn(build):
    made = build({"class_labels": True})
    model = DiffusionModel(made.model, made.task.cfg, made.task.spec)
    assert labels_of(model, SampleOptions(path="x"), [5, 6, 7]) == [2, 0, 1]
    assert labels_of(model, SampleOptions(path="x", label="bee"), [5, 6, 7]) == [1, 1, 1]
    assert labels_of(model, SampleOptions(path="x", label="1"), [5, 6, 7]) == [1, 1, 1]
    for wrong in ("dog", "3", "-1"):
        with pytest.raises(
            UserError, match=f"--label {wrong} is no class of the model; known: ant, bee, cat"
        ):
            labels_of(model, SampleOptions(path="x", label=wrong), [0])
    # a name comes before a number, as with digits
    model.spec["classes"] = ["1", "0"]
    assert model.class_index("1") == 0


def test_classes_in_folders_and_in_a_table(build, tmp_path, monkeypatch, tiny_checkpoint):
    made = build({"class_labels": True})
    model = DiffusionModel(made.model, made.task.cfg, made.task.spec)
    monkeypatch.setattr(DiffusionModel, "from_checkpoint", lambda *args: model)
    arguments = ["--path", str(tiny_checkpoint), "--num", "5", *QUICK.split()]
    main([str(tmp_path / "flat"), *arguments])
    table = (tmp_path / "flat.csv").read_text().splitlines()
    kinds = ("ant", "bee", "cat", "ant", "bee")
    assert table == ["file,class,seed", *(f"{k:06}.png,{name},1" for k, name in enumerate(kinds))]
    main([str(tmp_path / "sorted"), *arguments, "--class-folders"])
    for k, name in enumerate(kinds):
        found = (tmp_path / "sorted" / name / f"{k:06}.png").read_bytes()
        assert found == (tmp_path / "flat" / f"{k:06}.png").read_bytes()
    assert (tmp_path / "sorted.csv").read_text().splitlines()[2] == "bee/000001.png,bee,1"
    with pytest.raises(UserError, match="samples of another model or other options"):
        main([str(tmp_path / "flat"), *arguments, "--class-folders"])


def test_what_is_shown_of_each_class():
    assert shown_of_each([0, 1] * 30) == list(range(20))  # ten of each
    assert len(shown_of_each(list(range(300)))) == 100
    assert shown_of_each([5, 5, 5]) == [0, 1, 2]


def test_a_file_that_a_power_cut_left_empty_is_drawn_again(draw):
    """Pictures are brought to the disk together, at the end."""
    whole = draw("--num 3 --batch-size 1")
    (draw.folder / "000001.png").write_bytes(b"")
    assert draw("--num 3 --batch-size 1") == whole


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda whole: whole[: len(whole) // 2], "is truncated"),
        (lambda whole: b"no checkpoint", "no checkpoint at all"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_no_checkpoint(draw, tiny_checkpoint, tmp_path, make, words):
    path = tmp_path / "bad.pt"
    if make:
        path.write_bytes(make(tiny_checkpoint.read_bytes()))
    with pytest.raises(UserError, match=words) as caught:
        draw(path=path)
    assert str(path) in str(caught.value) and not draw.folder.exists()


def run(cwd, *arguments):
    return processes.run(
        [sys.executable, "-m", "diffusion_ext.sample", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_as_one_types_it(tiny_checkpoint, tmp_path, repo_root):
    done = run(tmp_path, "out", "--path", tiny_checkpoint, "--num", 2, *QUICK.split())
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.csv", "out.grid.png"]
    speaker = {"speakers": ["a"], "spec": {"n_mels": 80}}
    state = {"model": {}, "task_state": speaker, "cfg": {"task": {"_name": "speaker_id"}}}
    torch.save(state, tmp_path / "speaker.pt")
    done = run(tmp_path, "other", "--path", "speaker.pt")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        r"error: speaker.pt is of another task \(speaker_id\), .*: give a checkpoint of .*\n",
        done.stderr,
    )
    done = run(tmp_path, "other", "--path", tiny_checkpoint, "--num", 0)
    assert done.returncode == 2 and done.stderr == "error: --num must be at least 1\n"
    assert not (tmp_path / "other").exists()


def test_help_lists_what_there_is(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for word in ("dpmpp_2m", "ddim", "eta", "logsnr", "--interpolate", "none: 20"):
        assert word in said
