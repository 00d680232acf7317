"""The training tab: how the trainings stand whose logs were found; it reads and changes nothing."""

import re
import tempfile
import time
from pathlib import Path

from PIL import Image

from ext_common.cli import UserError
from ext_common.page import Model, Settings, answered, figure, plain
from ext_common.plots import learning_curve
from ext_common.progress import minutes
from ext_common.trainlog import parse_log

EVERY = 10  # seconds between two looks at a log
RUNNING = 120  # seconds after which a log that nothing was added to is of a training that stands
PICTURES = 4
SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "bleu": "BLEU",
    "lr": "learning rate",
    "ups": "updates a second",
}
SUBSETS = {"train_inner": "the last updates", "train": "the last epoch of training"}
_TOTAL = re.compile(r"'max_update': (\d+)")


def tab(models: list[Model], settings: Settings) -> None:
    """Draws it."""
    import gradio as gr

    @answered
    def look(log: str) -> tuple[str, str, str]:
        return standing(Path(log)), curves(Path(log)), pictures(Path(log).parent)

    names = [(str(model.path.parent), str(model.path)) for model in models]
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


def standing(log: Path) -> str:
    """Whether it runs, how long it takes yet, and what was logged last."""
    age = time.time() - log.stat().st_mtime
    text = log.read_text("utf-8", errors="replace")
    found = {p.subset: p for p in parse_log(text.splitlines())}
    words = time_left(text, [(p.update, p.stats.get("ups")) for p in found.values()], age)
    lines = [f"**{plain(log.parent.name)}**: {words}"]
    for subset, point in found.items():
        figures = ", ".join(
            f"{SHOWN[key]} {value:.4g}" for key, value in point.stats.items() if key in SHOWN
        )
        of = SUBSETS.get(subset, f"on {plain(subset)}")
        lines.append(f"- {of}, update {point.update or 0:,}: {figures}")
    return "\n".join(lines)


def time_left(log: str, points: list[tuple[int | None, float | None]], age: float) -> str:
    """`running, 3:20 left of 5,000 updates` by (update, updates a second), as far as it is known.

    age: seconds since something was logged.
    """
    total = int(totals[-1]) if (totals := _TOTAL.findall(log)) else 0
    done = max((update for update, _ in points if update), default=0)
    rate = next((rate for _, rate in points if rate), None)
    if total and done >= total:
        return f"all {total:,} updates are done"
    if age >= RUNNING:
        return f"nothing was logged for {age / 60:,.0f} minutes"
    if not rate or not total:
        return "running"
    return f"running, {minutes((total - done) / rate)} left of {total:,} updates"


def curves(log: Path) -> str:
    """The learning curve as a picture; nothing before anything was logged."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        try:
            learning_curve(log, file.name)
        except UserError:
            return ""
        with Image.open(file.name) as image:
            return figure(image, "Loss, the figure on valid, and the rate, by updates", "smooth")


def pictures(folder: Path) -> str:
    """Samples and confusion matrices that lie in the folder, the newest first."""
    places = ("*.png", "samples/*.png", "*/samples/*.png")
    found = [path for place in places for path in folder.glob(place)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    shown = []
    for path in found[:PICTURES]:
        with Image.open(path) as image:
            shown.append(figure(image, path.name, "smooth"))
    return "".join(shown)
