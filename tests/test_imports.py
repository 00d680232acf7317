"""What importing the public API of each package, and using a trained model, loads and does not load."""

import os
import subprocess
import sys

import pytest

# as README and docs import it
PUBLIC = {
    "ext_common": """
        from ext_common import checkpoints, cli, manifest, parallel, random, registry, store, trainlog
    """,
    "speaker": """
        import fairseq_ext.speaker
        from fairseq_ext.speaker import SpeakerModel
        from fairseq_ext.speaker.batching import pad
        from fairseq_ext.speaker.conformer import ENCODERS
        from fairseq_ext.speaker.corpus import Corpus
        from fairseq_ext.speaker.features import FeatureSpec, log_mel
        from fairseq_ext.speaker.margins import am_softmax
        from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork
        from fairseq_ext.speaker.pooling import SelfAttentionPooling
        from fairseq_ext.speaker import embed, identify
        from fairseq_ext.speaker.prepare import prepare
    """,
    "translation": """
        import fairseq_ext.translation
        from fairseq_ext.translation import Translator
        from fairseq_ext.translation import attention, translate
        from fairseq_ext.translation.prepare import prepare
        from fairseq_ext.translation.score import score
        from fairseq_ext.translation.text.normalise import normalise
        from fairseq_ext.translation.text.spm import Codec
    """,
    "backtranslation": """
        import fairseq_ext.backtranslation
        from fairseq_ext.backtranslation import back_translate
        from fairseq_ext.backtranslation.assemble import assemble
        from fairseq_ext.backtranslation.generate import generate
        from fairseq_ext.backtranslation.models.backends import BACKENDS, open_model
        from fairseq_ext.backtranslation.modes import MODES
    """,
    "diffusion": """
        import diffusion_ext
        from diffusion_ext.inference import DiffusionModel
        from diffusion_ext.network import AveragedUNet
        from diffusion_ext.objectives import OBJECTIVES
        from diffusion_ext.samplers import SAMPLERS
        from diffusion_ext.schedules import sigmoid_beta_schedule
        from diffusion_ext.unet import UNet
        from diffusion_ext import sample
        from diffusion_ext.evaluate import evaluate
        from diffusion_ext.prepare import prepare
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_api_loads_nothing_heavy(package, repo_root):
    lines = [line.strip() for line in PUBLIC[package].splitlines()]
    check = "print(*sorted({'fairseq', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines, check])],
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["diffusion_ext.train", "fairseq_ext.translation.prepare"])
def test_commands_of_fairseq_load_nothing_of_its_other_tasks(command, tmp_path, repo_root):
    """scikit-learn, which two of them are for, takes longer to import than all of ours."""
    from PIL import Image

    from tests.translation.conftest import toy_pairs

    if command == "diffusion_ext.train":
        for number in range(4):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
        words = [str(tmp_path), "--save-dir", str(tmp_path / "ck"), "--print-command"]
    else:
        (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in toy_pairs(700)))
        words = [str(tmp_path / "pairs.tsv"), str(tmp_path / "data"), "--no-check-language"]
        words += ["--source-lang", "en", "--target-lang", "zh"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", command, *words],
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "fairseq" in loaded and "sklearn" not in loaded
