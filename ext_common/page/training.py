"""The training tab: how the trainings stand whose folders were found; it reads and changes nothing."""

import tempfile
import time
from pathlib import Path

from PIL import Image

from ext_common.cli import UserError
from ext_common.page import answered, figure
from ext_common.plots import learning_curve
from ext_common.trainlog import parse_log

LOG = "train.log"
EVERY = 10  # seconds between two looks at a log
RUNNING = 120  # seconds after which a log that nothing was added to is of a training that stands
PICTURES = 4


def tab(folders: list[Path]) -> None:
    """Draws it, where any of the folders has a log."""
    import gradio as gr

    folders = [folder for folder in dict.fromkeys(folders) if (folder / LOG).is_file()]
    if not folders:
        return

    @answered
    def look(folder: str) -> tuple[str, str, str]:
        return standing(Path(folder)), curves(Path(folder)), pictures(Path(folder))

    names = [(str(folder), str(folder)) for folder in folders]
    with gr.Tab("Training") as this:
        chosen = gr.Dropdown(names, value=names[0][1], label="Folder of the training")
        state = gr.Markdown()
        with gr.Row():
            curve, drawn = gr.HTML(), gr.HTML()
        timer = gr.Timer(EVERY, active=False)
        out = [state, curve, drawn]
        gr.on(
            [this.select, chosen.change],
            look,
            chosen,
            out,
            show_progress="hidden",
            api_name="training",
        )
        gr.on([timer.tick], look, chosen, out, show_progress="hidden", api_visibility="private")
        this.select(
            lambda: gr.Timer(active=True), None, timer, queue=False, api_visibility="private"
        )


def standing(folder: Path) -> str:
    """Whether it runs, and what was logged last."""
    log = folder / LOG
    age = time.time() - log.stat().st_mtime
    found = {p.subset: p for p in parse_log(log.read_text("utf-8", errors="replace").splitlines())}
    words = "running" if age < RUNNING else f"nothing was logged for {age / 60:,.0f} minutes"
    lines = [f"**{folder.name}**: {words}"]
    for subset, point in found.items():
        figures = ", ".join(
            f"{key} {value:.4g}" for key, value in point.stats.items() if key in SHOWN
        )
        lines.append(f"- {subset}, update {point.update or 0:,}: {figures}")
    return "\n".join(lines)


SHOWN = ("loss", "accuracy", "bleu", "lr", "ups")


def curves(folder: Path) -> str:
    """The learning curve as a picture; nothing before anything was logged."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        try:
            learning_curve(folder / LOG, file.name)
        except UserError:
            return ""
        with Image.open(file.name) as image:
            return figure(image, "Loss, the figure on valid, and the rate, by updates")


def pictures(folder: Path) -> str:
    """Samples and confusion matrices that lie in the folder, the newest first."""
    found = [path for pattern in ("*.png", "samples/*.png") for path in folder.glob(pattern)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    shown = []
    for path in found[:PICTURES]:
        with Image.open(path) as image:
            shown.append(figure(image, path.name))
    return "".join(shown)
