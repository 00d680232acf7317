"""Checkpoints and folders of the version before this house was laid out anew are read as that version did."""

import json
import shutil
from pathlib import Path

import pytest

from tests.golden import read as reading
from tests.golden.make import BIN, DIFFUSION, GENERATE, PREPARE, SPEAKER, TRANSLATION
from tests.trainings import read, run_command

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXPECTED = json.loads((HERE / "expected.json").read_text("utf-8"))
# float32 by other kernels than those of the machine that wrote it
CLOSE = {"rel": 1e-4, "abs": 1e-4}


@pytest.fixture
def before(tmp_path, monkeypatch):
    """The files, in a folder that is the current one: they name each other by relative paths."""
    shutil.unpack_archive(HERE / "before.tar.xz", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(found, expected, where=""):
    """Equal, numbers nearly."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for n, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{n}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **CLOSE), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("job", ["speaker", "translation", "backtranslation"])
def test_read_as_before(before, job):
    found = json.loads(json.dumps(getattr(reading, job)(before / job)))
    assert_same(found, EXPECTED[job])


def test_images_are_drawn_as_before(before):
    found, expected = reading.diffusion(before / "diffusion"), EXPECTED["diffusion"]
    drawn, were = found.pop("drawn"), expected["drawn"]
    assert_same(found, {key: value for key, value in expected.items() if key != "drawn"})
    # uint8: what is near .5 may be rounded to either side
    differ = [abs(a - b) for a, b in zip(flat(drawn), flat(were), strict=True)]
    assert max(differ) <= 1 and sum(differ) <= len(differ) // 100


def flat(images):
    if not isinstance(images, list):
        return [images]
    return [value for part in images for value in flat(part)]


def test_what_is_prepared_is_not_prepared_again(before, capsys):
    """The same command as before finds nothing to do, another one is refused."""
    from ext_common.cli import UserError
    from fairseq_ext.translation.prepare.__main__ import main

    words = [
        "translation/toy.tsv",
        "translation/data",
        "--source-lang",
        "en",
        "--target-lang",
        "zh",
    ]
    was = stamps(before / "translation" / "data")
    main([*words, *PREPARE.split()])
    assert (
        "is already prepared with these options and files: nothing to do" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="prepared with --seed 1, not 2: use --overwrite"):
        main([*words, *PREPARE.split(), "--seed", "2"])
    assert stamps(before / "translation" / "data") == was


def test_generation_that_was_stopped_goes_on(before):
    """What is in its chunks stays, and the rest is what a run without a stop wrote."""
    from fairseq_ext.backtranslation.generate.__main__ import main

    stopped, whole = (before / "backtranslation" / name for name in ("stopped", "synthetic"))
    chunk = stopped / ".work" / "done" / "000000.jsonl"
    first, *rest = chunk.read_text("utf-8").splitlines()
    chunk.write_text("\n".join(['[["kept", -1.0, null]]', *rest, ""]), "utf-8")
    main(["backtranslation/mono.en", "backtranslation/stopped", *GENERATE.split()])
    first, *rest = (stopped / "synthetic.zh").read_text("utf-8").split("\n")
    assert first == "kept" and rest == (whole / "synthetic.zh").read_text("utf-8").split("\n")[1:]
    for name in ("real.en", "rejects.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, flags",
    [("speaker", SPEAKER), ("translation", TRANSLATION), ("diffusion", DIFFUSION)],
    ids=["speaker", "translation", "diffusion"],
)
def test_training_goes_on(before, job, flags):
    """Three more updates, optimizer and all, on the prepared data of before."""
    checkpoints = before / job / "checkpoints"
    checkpoints.mkdir()
    shutil.copy(before / job / "checkpoint.pt", checkpoints / "checkpoint_last.pt")
    for package in ("ext_common", "fairseq_ext", "diffusion_ext"):
        (before / package).symlink_to(ROOT / package)
    flags = flags.replace("--max-update 3", "--max-update 6")
    log = run_command([BIN / "fairseq-train", flags], before, PYTHONPATH=str(ROOT))
    assert "Loaded checkpoint" in log
    state = read(checkpoints / "checkpoint_last.pt")
    old = read(before / job / "checkpoint.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 6
    assert state["model"].keys() == old["model"].keys()
    assert any((state["model"][key] != old["model"][key]).any() for key in old["model"])
