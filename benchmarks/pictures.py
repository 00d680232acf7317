"""The pictures of README.md, from our own commands: `python -m benchmarks.pictures [JOB …]`.

speaker      the learning curve of configs/speaker_id/fsdd.yaml, a minute on one core
translation  attention of a Transformer after 2,000 updates on cmn-eng, about five minutes on one core;
                 needs a font with Chinese characters (fonts-noto-cjk)
diffusion    of the grid that `benchmarks.diffusion.tables` recorded
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from benchmarks.recorded import RESULTS, ROOT, changed_recipe, digest_of, run, train
from benchmarks.speaker.protocols import prepare_digits
from benchmarks.translation import tables as translation_tables
from benchmarks.translation.runs import python

PICTURES = ROOT / "docs" / "pictures"
UPDATES = {"optimization.max_update": 2000, "task.no_valid_text": True}
SENTENCE = "I don't want to go to school today."
ROWS, TILE = 3, 54  # pixels of a row of the grid


def speaker(work: Path) -> None:
    """Loss and accuracy of six people who say digits."""
    config = changed_recipe(ROOT / "configs" / "speaker_id" / "fsdd.yaml", {})
    folder = work / "speaker"
    models = ROOT / "configs" / "speaker_id" / "model"
    train(config, prepare_digits(work), digest_of(config), folder, models)
    command = [sys.executable, "-m", "ext_common.plots", folder / "train.log"]
    run([*command, PICTURES / "speaker.png"], work / "plots.log")


def translation(work: Path) -> None:
    """Where the decoder looks while it writes Chinese."""
    recipe, changes = translation_tables.shallow(0.45, 1)
    config = changed_recipe(translation_tables.CONFIGS / f"{recipe}.yaml", {**changes, **UPDATES})
    folder, data = work / "translation", translation_tables.prepare(work)
    train(config, data, digest_of(config), folder, translation_tables.CONFIGS / "model")
    average = folder / "checkpoints" / "average.pt"
    command = [*python("average"), folder / "checkpoints", "--last", "5", "--output", average]
    run(command, work / "average.log")
    command = [*python("translation.attention"), PICTURES / "translation.png", "--path", average]
    run([*command, "--source", SENTENCE], work / "attention.log")


def diffusion(work: Path) -> None:
    """The first rows of a recorded grid."""
    grid = Image.open(RESULTS / "grids" / "digits-1.png")
    border = grid.height % TILE
    rows = grid.crop((0, 0, grid.width, border + ROWS * TILE))
    rows.save(PICTURES / "diffusion.png", optimize=True)


JOBS = {"speaker": speaker, "translation": translation, "diffusion": diffusion}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help="which (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pictures")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for job in args.jobs or JOBS:
        JOBS[job](args.work)
        print(PICTURES / f"{job}.png")


if __name__ == "__main__":
    main()
