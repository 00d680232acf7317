"""How the files of this folder were made, with the version of the house before its rooms were named anew.

cp -r OLD/{ext_common,fairseq_ext,diffusion_ext,tests} /tmp/golden && cp tests/golden/*.py /tmp/golden
cd /tmp/golden && PYTHONPATH=. python make.py

and what it wrote is before.tar.xz (a tar, for the sake of folders that are empty).
OLD: a checkout of that version; checkpoints name the folder, hence a neutral one. They are not made anew with
later versions: what they show is that what somebody has from before is read as it was then. `expected.json`
holds what the version that wrote them read in them.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

BIN = Path(sys.executable).parent
COMMON = (
    "--log-interval 1 --no-progress-bar --cpu --num-workers 0 --max-update 3 --no-epoch-checkpoints"
)
SPEAKER = f"""speaker/data --user-dir fairseq_ext --task speaker_id --arch conformer_speaker
    --criterion am_softmax --optimizer adam --lr 2e-3 --batch-size 4 --crop-frames 20 --epoch-updates 3
    --d-model 8 --nhead 2 --d-ffn 8 --layers 1 --kernel-size 3 --embedding-dim 8
    --save-dir speaker/checkpoints {COMMON}"""
TRANSLATION = f"""translation/data --user-dir fairseq_ext --task translation_spm --arch transformer
    -s en -t zh --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16
    --encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 --encoder-attention-heads 2
    --decoder-attention-heads 2 --share-all-embeddings --optimizer adam --lr 1e-2
    --criterion label_smoothed_cross_entropy --max-tokens 500
    --save-dir translation/checkpoints {COMMON}"""
DIFFUSION = f"""diffusion/data --user-dir diffusion_ext --task diffusion --arch ddpm_unet --criterion ddpm
    --optimizer adam --lr 1e-3 --batch-size 4 --epoch-updates 3 --sample-interval 0 --timesteps 50
    --base-channels 4 --head-channels 4 --channel-mults 1,1 --blocks 1
    --attention-resolutions 4 --save-dir diffusion/checkpoints {COMMON}"""
PREPARE = "--spm-size 340 --valid-fraction 0.1 --test-fraction 0.1 --filters none --workers 1"
GENERATE = (
    "--model translation/checkpoint.pt --chunk-lines 2 --no-sanity-check --device cpu --threads 1"
)


def call(*words):
    words = [w for part in words for w in str(part).split()]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(flags, job):
    call(BIN / "fairseq-train", flags)
    shutil.move(f"{job}/checkpoints/checkpoint_last.pt", f"{job}/checkpoint.pt")
    shutil.rmtree(f"{job}/checkpoints")


def speaker():
    import soundfile

    for number, name in enumerate(("anna", "ben", "carl")):
        Path("speaker/recordings", name).mkdir(parents=True)
        for n in range(6):
            time = np.arange(4800) / 16000
            draw = np.random.default_rng((number, n))
            tone = sum(np.sin(2 * np.pi * (120 + 60 * number) * k * time) / k for k in range(1, 9))
            samples = 0.1 * tone + 0.01 * draw.standard_normal(len(time))
            soundfile.write(f"speaker/recordings/{name}/{n}.wav", samples, 16000)
    call(
        sys.executable,
        "-m fairseq_ext.speaker.prepare speaker/recordings speaker/data --n-mels 20 --workers 1",
        "--valid-fraction 0.2 --test-fraction 0.2",
    )
    shutil.rmtree("speaker/recordings")
    train(SPEAKER, "speaker")


def translation():
    from tests.translation.conftest import toy_pairs

    Path("translation").mkdir()
    rows = "".join(f"{source}\t{target}\n" for source, target in toy_pairs(120))
    Path("translation/toy.tsv").write_text(rows, "utf-8")
    call(
        sys.executable,
        "-m fairseq_ext.translation.prepare translation/toy.tsv translation/data",
        "--source-lang en --target-lang zh",
        PREPARE,
    )
    train(TRANSLATION, "translation")


def backtranslation():
    from fairseq_ext.backtranslation import generate_work
    from fairseq_ext.backtranslation.generate import main

    Path("backtranslation").mkdir()
    mono = "backtranslation/mono.en"
    Path(mono).write_text("I like red apples.\nwe see big houses.\n\nhe eat fish.\n" * 2, "utf-8")
    main([mono, "backtranslation/synthetic", *GENERATE.split()])
    # and one that was stopped after two chunks of four
    write, written = generate_work.Chunks.write, []

    def stopping(chunks, number, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(chunks, number, *rest)

    generate_work.Chunks.write = stopping
    try:
        main([mono, "backtranslation/stopped", *GENERATE.split()])
    except KeyboardInterrupt:
        pass


def diffusion():
    from PIL import Image

    for n in range(12):
        path = Path("diffusion/images", ("ant", "bee")[n % 2], f"{n}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(n)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    call(
        sys.executable,
        "-m diffusion_ext.prepare diffusion/images diffusion/data --image-size 8 --class-labels",
    )
    shutil.rmtree("diffusion/images")
    train(DIFFUSION, "diffusion")


if __name__ == "__main__":
    from read import read

    for job in (speaker, translation, backtranslation, diffusion):
        shutil.rmtree(job.__name__, ignore_errors=True)
        job()
    Path("expected.json").write_text(json.dumps(read(Path()), indent=1, ensure_ascii=False) + "\n")
    with tarfile.open("before.tar.xz", "w:xz") as tar:
        for job in (speaker, translation, backtranslation, diffusion):
            tar.add(job.__name__)
