"""The speaker tab of `python -m ext_common.page`: who is it, and are these two the same?"""

from functools import partial
from pathlib import Path
from typing import Any, Optional

import gradio as gr
import numpy as np
import soundfile
from PIL import Image

from ext_common.cli import UserError
from ext_common.page import Loaded, Model, Settings, answered, choice, figure, tab_for
from fairseq_ext.speaker.features import audio_features
from fairseq_ext.speaker.gallery.identify import decide
from fairseq_ext.speaker.gallery.open_set import posteriors
from fairseq_ext.speaker.gallery.options import GalleryIdentifyOptions
from fairseq_ext.speaker.gallery.store import Gallery, changing
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.verify.backend import Backend, Side
from fairseq_ext.speaker.verify.scores import unit

LONGEST = 600  # seconds of a recording
SHOWN = 5
PRIOR = GalleryIdentifyOptions.prior_known


@tab_for("speaker_id")
def tab(models: list[Model], settings: Settings) -> None:
    """Draws it."""
    load = Loaded(
        partial(SpeakerModel.from_checkpoint, device=settings.device, user_dir=settings.user_dir)
    )

    @answered
    def identify(path: str, recording: Optional[str]) -> tuple[str, list[list[str]], str]:
        model, recording = load(path), usable(recording)
        found = model.identify(recording, top_k=SHOWN)
        rows = [[match.speaker, shown(match.score, model.score_kind)] for match in found.candidates]
        return f"## {found.speaker}", rows, picture(audio_features(recording, model.spec))

    @answered
    def compare(path: str, one: Optional[str], other: Optional[str]) -> str:
        a, b = unit(load(path).embed([usable(one), usable(other)]))
        cosine = float(a @ b)
        return f"## Cosine {cosine:.3f}\n1: the same voice; about 0: two voices that have nothing in common."

    @answered
    def enrol(path: str, recording: Optional[str], name: str) -> str:
        model, embedding = load(path), load(path).embed([usable(recording)])
        new = Gallery(model.sha256, Backend.unfitted("cosine", 0, model.sha256))
        with changing(str(settings.gallery), new) as gallery:
            gallery.check_model(model.sha256, str(settings.gallery))
            gallery.enrol(name.strip(), embedding)
            return f"{name.strip()} is one of {len(gallery.members)} people: {', '.join(gallery.names)}"

    @answered
    def recognise(path: str, recording: Optional[str]) -> tuple[str, list[list[str]]]:
        model, recording = load(path), usable(recording)
        if not Path(str(settings.gallery)).exists():
            raise UserError("nobody is enrolled yet: record somebody, give the name, and enrol")
        gallery = Gallery.load(str(settings.gallery))
        gallery.check_model(model.sha256, str(settings.gallery))
        seconds = np.array([soundfile.info(recording).duration])
        scores = gallery.scores(Side.of_tests(model.embed([recording]), seconds))
        return in_gallery(gallery, scores)

    busy: dict[str, Any] = dict(concurrency_id="speaker", concurrency_limit=1)
    with gr.Tab("Speaker"):
        model = choice(models)
        with gr.Row():
            with gr.Column():
                recording = recorder("Speak, or give a recording")
                ask = gr.Button("Who is it?", variant="primary")
            with gr.Column():
                name = gr.Markdown("## –", elem_id="speaker-name")
                scores = gr.Dataframe(
                    headers=["person", "score"], label="The nearest people", interactive=False
                )
        mel = gr.HTML()
        gr.on(
            [ask.click, recording.stop_recording, recording.upload],
            identify,
            [model, recording],
            [name, scores, mel],
            api_name="identify",
            **busy,
        )
        with gr.Accordion("People enrolled here", open=True, visible=settings.gallery is not None):
            with gr.Row():
                person = gr.Textbox(label="Name of who speaks above, one word")
                gr.Button("Enrol").click(
                    enrol,
                    [model, recording, person],
                    gr.Markdown(elem_id="enrolled"),
                    api_name="enrol",
                    **busy,
                )
            known = gr.Markdown(elem_id="known")
            people = gr.Dataframe(headers=["person", "score or probability"], interactive=False)
            gr.Button("Which of them is it?").click(
                recognise, [model, recording], [known, people], api_name="recognise", **busy
            )
        with gr.Accordion("Are these two the same?", open=False):
            with gr.Row():
                one, other = recorder("First recording"), recorder("Second recording")
            same = gr.Markdown()
            gr.Button("Compare").click(compare, [model, one, other], same, **busy)


def in_gallery(gallery: Gallery, scores: np.ndarray) -> tuple[str, list[list[str]]]:
    """What is said of scores (1, N), and the nearest people: by probability where it is calibrated."""
    found = gallery.threshold(None)
    threshold = None if found is None else float(found["threshold"])
    (name,), _ = decide(gallery, scores, threshold, PRIOR)
    calibrated = gallery.backend.calibration is not None
    values = posteriors(scores, PRIOR)[0, :-1] if calibrated else scores[0]
    rows = [
        [gallery.names[k], f"{values[k]:.1%}" if calibrated else f"{values[k]:.3f}"]
        for k in np.argsort(-values)[:SHOWN]
    ]
    note = ""
    if found is None and not calibrated:
        note = (
            "\n\nEverybody gets somebody's name: `gallery calibrate` finds what a stranger reaches."
        )
    elif found is not None and gallery.is_stale(found):
        note = "\n\nPeople were enrolled since it was calibrated: `gallery calibrate` again."
    return f"## {name}{note}", rows


def recorder(label: str) -> Any:
    """Where a recording is made or given."""
    return gr.Audio(sources=["microphone", "upload"], type="filepath", label=label, buttons=[])


def usable(recording: Optional[str]) -> str:
    """The path of a recording; UserError where there is none, or it is too long to be answered at once."""
    if recording is None:
        raise UserError("there is no recording yet: speak, or give a file")
    try:
        seconds = soundfile.info(recording).duration
    except soundfile.SoundFileError:
        return recording  # what reads it says what is wrong
    if seconds > LONGEST:
        raise UserError(
            f"the recording has {seconds:.0f} s, the page takes {LONGEST}: cut it, or use"
            " python -m fairseq_ext.speaker.identify"
        )
    return recording


def shown(score: float, kind: str) -> str:
    """A cosine as it is, a log-probability as a share."""
    return f"{score:.3f}" if kind == "cosine" else f"{np.exp(score):.1%}"


def picture(features: np.ndarray) -> str:
    """Log-mel features (T, F) as a picture, low bands below."""
    low, high = np.percentile(features, [1, 99])
    scaled = np.clip((features - low) / max(high - low, 1e-6), 0, 1)
    image = Image.fromarray((255 * scaled).astype(np.uint8).T[::-1])
    return figure(
        image, f"What the model hears: {len(features) / 100:.1f} s, low tones below", wide=True
    )
