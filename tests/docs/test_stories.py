"""Every block of every page is run, page by page, in a folder with tiny data under the names of the pages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests import processes
from tests.docs.reading import PAGES, ROOT, blocks
from tests.speaker.conftest import SPEAKERS, voice
from tests.translation.conftest import toy_pairs

BIN = Path(sys.executable).parent
STORIES = [page for page in PAGES if any(block.why is None for block in blocks(page))]
# What is put behind a training, so that it is small: a flag given twice has its second value.
SMALL = {
    "speaker_id": "--max-update 12 --epoch-updates 1 --crop-frames 50 --warmup-updates 1"
    " --d-model 16 --nhead 2 --d-ffn 32 --layers 1 --kernel-size 7 --embedding-dim 16 --num-workers 0",
    "translation_spm": "--max-update 60 --save-interval-updates 5 --max-tokens 1000 --dropout 0"
    " --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32"
    " --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2"
    " --decoder-attention-heads 2 --num-workers 0",
    "diffusion": "--max-update 2 --image-size 16 --base-channels 8 --channel-mults 1,2 --blocks 1"
    " --attention-resolutions 8 --head-channels 8 --batch-size 4 --warmup-updates 1 --sample-interval 0",
    # with the optimizer that presets choose, and with one that is named
    "chosen": "--lr 3e-2 --warmup-updates 5",
    "named": "--lr-scheduler inverse_sqrt --lr 1e-2 --warmup-updates 10",
    "recipe": f"common.user_dir={ROOT}/fairseq_ext optimization.max_update=12 dataset.max_tokens=600"
    " lr_scheduler.warmup_updates=4",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """RECORDINGS, a.wav, b.flac, corpus.tsv, mono.zh, IMAGES."""
    folder = tmp_path_factory.mktemp("things")
    for speaker in SPEAKERS:
        (folder / "RECORDINGS" / speaker).mkdir(parents=True)
        for n in range(12):
            path = folder / "RECORDINGS" / speaker / f"{n}.wav"
            soundfile.write(path, voice(speaker, 0.5, n), 16000)
    soundfile.write(folder / "a.wav", voice("anna", 0.5, 90), 16000)
    soundfile.write(folder / "b.flac", voice("ben", 0.5, 91), 16000)
    pairs = toy_pairs(700)
    table = "".join(f"{source}\t{target}\n" for source, target in pairs[:600])
    (folder / "corpus.tsv").write_text(table, encoding="utf-8")
    mono = "".join(f"{target}\n" for _, target in pairs[600:])
    (folder / "mono.zh").write_text(mono, encoding="utf-8")
    rng = np.random.default_rng(1)
    for number in range(24):
        path = folder / "IMAGES" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", STORIES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_their_order(page, things, tmp_path):
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    for needed in before(page, tmp_path):
        run(needed, tmp_path, page.name)
    for block in blocks(page):
        if block.why is None:
            place = f"{page.name}, line {block.line}"
            for words in of_block(block, tmp_path):
                run(words, tmp_path, place)


def before(page, folder):
    """What another page makes."""
    prepare = ["python", "-m", "fairseq_ext.translation.prepare", "corpus.tsv", "DATA"]
    if page.stem == "backtranslation":
        return [[*prepare, "--source-lang", "en", "--target-lang", "zh"]]
    if page.stem in ("extending", "training"):
        return [["python", "-m", "fairseq_ext.speaker.prepare", "RECORDINGS", "DATA"]]
    return []


def of_block(block, folder):
    """The commands of a block; one of Python is written to its file, or run from one."""
    if block.kind == "sh":
        return block.commands()
    path = folder / (block.file or f"block_{block.line}.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(block.text, encoding="utf-8")
    return [] if block.file else [["python", path.name]]


def here(word):
    """A path in this repository, which is the folder that readers of a page stand in."""
    return (
        str(ROOT / word)
        if word.split("/")[0] in ("fairseq_ext", "diffusion_ext", "configs")
        else word
    )


def run(words, folder, place):
    words = [here(word) for word in words]
    if "--num" in words:
        words[words.index("--num") + 1] = "4"
    program = words[0]
    if program == "python":
        words[0] = sys.executable
        if "diffusion_ext.train" in words:
            words += SMALL["diffusion"].split()
    elif program == "fairseq-train":
        task = words[words.index("--task") + 1]
        rate = SMALL["named" if "--optimizer" in words else "chosen"] if "spm" in task else ""
        words = [str(BIN / program), *words[1:], *SMALL[task].split(), *rate.split()]
    elif program == "fairseq-hydra-train":
        words = [str(BIN / program), *words[1:], *SMALL["recipe"].split()]
    else:
        raise AssertionError(f"{place}: {program} is run by no test: say why before the block")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    done = processes.run(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{place}: {' '.join(words)}\n{done.stdout[-3000:]}"
