"""The pictures of README.md, from our own commands: `python -m benchmarks.pictures [JOB …]`.

speaker      the learning curve of configs/speaker_id/fsdd.yaml, a minute on one core
translation  attention of a Transformer after 2,000 updates on cmn-eng, about five minutes on one core;
                 needs a font with Chinese characters (fonts-noto-cjk)
diffusion    of the grid that `benchmarks.diffusion.tables` recorded
page         of the models below this folder and the logs of their trainings (bash scripts/quickstart.sh page
                 makes them), in Chromium, with a voice from --voice; needs the extra test and a font with
                 Chinese characters
"""

import argparse
import sys
import time
from pathlib import Path

from PIL import Image

from benchmarks.common import chromium
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


def page(args: argparse.Namespace) -> None:
    """Each tab after a question was put to it."""
    from playwright.sync_api import sync_playwright

    from ext_common.page import Settings
    from ext_common.page.__main__ import build, listen, load_tabs
    from ext_common.page.find import find

    settings = Settings(port=0, data=args.images)
    load_tabs(settings)
    shown = build(find(args.models)[0], settings)
    address = listen(shown, settings)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        looker = browser.new_page(viewport={"width": 900, "height": 760})
        looker.goto(address)

        def take(name: str, tab: str) -> None:
            time.sleep(2)
            path = PICTURES / f"page-{name}.png"
            looker.screenshot(path=path)
            # a third of the bytes, and nothing that the eye misses
            Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
            print(path, tab)

        looker.get_by_role("tab", name="Speaker").click()
        looker.get_by_label("Upload file").locator("visible=true").first.click()
        looker.locator("input[type=file][accept*=audio]").first.set_input_files(args.voice)
        looker.locator("figure.wide img").wait_for(timeout=60_000)
        take("speaker", "Speaker")
        looker.get_by_role("tab", name="Translation").click()
        looker.get_by_label("Text, a sentence a line").fill(SENTENCE)
        looker.get_by_role("button", name="Translate", exact=True).click()
        looker.locator(".looks .t2").hover(timeout=60_000)
        take("translation", "Translation")
        looker.get_by_role("tab", name="Pictures").click()
        looker.get_by_role("button", name="Draw", exact=True).click()
        looker.locator("#drawn img").wait_for(timeout=60_000)
        time.sleep(20)
        take("diffusion", "Pictures")
        looker.get_by_role("tab", name="Training").click()
        looker.get_by_alt_text("Loss, the figure on valid").wait_for(timeout=60_000)
        take("training", "Training")
        browser.close()
    shown.close(verbose=False)


READMES = {"speaker": speaker, "translation": translation, "diffusion": diffusion}
JOBS = {**READMES, "page": page}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help="which (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pictures")
    parser.add_argument("--models", nargs="*", default=["."], help="page: checkpoints, folders")
    parser.add_argument("--voice", help="page: a recording of somebody whom the model knows")
    parser.add_argument("--images", help="page: what the diffusion model was trained on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for job in args.jobs or (*READMES,):
        if job == "page":
            page(args)
        else:
            READMES[job](args.work)
            print(PICTURES / f"{job}.png")


if __name__ == "__main__":
    main()
