"""The speaker tab of `python -m ext_common.page`: who is it, and are these two the same?"""

import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Optional

import gradio as gr
import numpy as np
import soundfile
from PIL import Image
from scipy.special import expit

from ext_common.cli import UserError
from ext_common.manifest import atomic_write, known_sha256
from ext_common.packed import Pack, is_pack
from ext_common.page import (
    Loaded,
    Model,
    Settings,
    answered,
    choice,
    figure,
    plain,
    reader_of,
    tab_for,
)
from ext_common.page.find import saved
from fairseq_ext.speaker.export.exported import ENDING, ExportedNetwork
from fairseq_ext.speaker.features import audio_features
from fairseq_ext.speaker.gallery.__main__ import new_backend
from fairseq_ext.speaker.gallery.identify import decide
from fairseq_ext.speaker.gallery.open_set import posteriors
from fairseq_ext.speaker.gallery.options import GalleryIdentifyOptions
from fairseq_ext.speaker.gallery.store import UNKNOWN, Gallery, changing
from fairseq_ext.speaker.inference import Identification, SpeakerModel
from fairseq_ext.speaker.verify.backend import Backend, Side
from fairseq_ext.speaker.verify.compared import compared_files
from fairseq_ext.speaker.verify.voices import Runner

KIND = "speaker_id"
GALLERY = ".npz"
PEOPLE = "people.npz"  # the gallery that is made where there is none
LONGEST = 600  # seconds of a recording
SHOWN = 5
PRIOR = GalleryIdentifyOptions.prior_known
BAND = 16  # rows of pixels above the features
COLOUR, GROUND = (232, 110, 0), (236, 236, 236)


@reader_of(GALLERY)
def gallery_at(path: Path) -> Optional[Model]:
    """A gallery of people; other files of the ending are nobody's business here."""
    return Model(KIND, path) if is_gallery(path) else None


def is_gallery(file: Path | BytesIO) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return "gallery.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def people_beside(model: Path) -> str:
    """The gallery of a model that none is given for: beside it, with the people of the pack that it is."""
    path = model.parent / PEOPLE
    if path.exists() or not is_pack(model):
        return str(path)
    pack = Pack(model)
    for name in pack.files:
        if name.endswith(GALLERY) and is_gallery(BytesIO(content := pack.read(name))):
            with atomic_write(path, "wb") as file:
                file.write(content)
            print(f"{path} has the people of {model}, as {name} in it")
            break
    return str(path)


@reader_of(ENDING)
def exported_at(path: Path) -> Model:
    """A model that `speaker.export` wrote."""
    found = ExportedNetwork(path).description
    about = {"export, weights in": found.weights, "people": f"{len(found.speakers):,}"}
    return Model(KIND, path, {**about, "saved": saved(path), "SHA-256": known_sha256(path)[:12]})


@tab_for(KIND)
def tab(models: list[Model], settings: Settings) -> None:
    """Draws it."""
    galleries = [str(model.path) for model in models if model.path.suffix == GALLERY]
    models = [model for model in models if model.path.suffix != GALLERY]
    if not models:
        print(f"left out: {', '.join(galleries)}: a gallery is shown with the model it was made by")
        return
    if settings.gallery:
        galleries = [settings.gallery]
    galleries = galleries or [people_beside(models[0].path)]
    load = Loaded(
        partial(SpeakerModel.from_checkpoint, device=settings.device, user_dir=settings.user_dir)
    )

    @answered
    def identify(path: str, recording: Optional[str]) -> tuple[str, list[list[str]], str]:
        model, features = load(path), audio_features(usable(recording), load(path).spec)
        (found,) = model.identify([features], top_k=SHOWN)
        rows = shown(found, model.score_kind)
        if model.scale is not None:
            what = "How probable, as on the recordings of validation"
        else:
            what = "Score: cosine, 1 at best" if model.score_kind == "cosine" else "Share of all"
        known = f"{len(model.speakers):,} people it was trained with"
        note = (
            f"One of the {known}, whoever speaks: for *nobody of them*, enrol people below. {what}."
        )
        return f"## {plain(found.speaker)}\n\n{note}", rows, picture(model, features)

    @answered
    def compare(path: str, people: str, one: Optional[str], other: Optional[str]) -> str:
        runner = Runner(load(path), path)
        backend = backend_of(runner, settings.backend, people)
        found = compared_files([usable(one), usable(other)], runner, backend)
        return verdict(backend, found.score, found.llr)

    @answered
    def enrol(path: str, people: str, recording: Optional[str], name: str) -> str:
        model, embedding = load(path), load(path).embed([usable(recording)])
        new = Gallery(model.sha256, new_backend(settings.backend, Runner(model, path)))
        with changing(people, new) as gallery:
            gallery.check_model(model.sha256, people)
            gallery.enrol(name.strip(), embedding)
            names = plain(", ".join(gallery.names))
            return f"{plain(name)} is one of {len(gallery.members)} people: {names}"

    @answered
    def recognise(path: str, people: str, recording: Optional[str]) -> tuple[str, list[list[str]]]:
        model, recording = load(path), usable(recording)
        if not Path(people).exists():
            raise UserError("nobody is enrolled yet: record somebody, give the name, and enrol")
        gallery = Gallery.load(people)
        gallery.check_model(model.sha256, people)
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
                    headers=["person", "score or probability"],
                    label="The nearest people",
                    interactive=False,
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
        with gr.Accordion("People enrolled here", open=True):
            people = gr.Dropdown(
                galleries, value=galleries[0], label="Gallery", visible=len(galleries) > 1
            )
            gr.Markdown(f"They are kept in {plain(galleries[0])}.", visible=len(galleries) == 1)
            with gr.Row():
                person = gr.Textbox(label="Name of who speaks above, one word")
                gr.Button("Enrol").click(
                    enrol,
                    [model, people, recording, person],
                    gr.Markdown(elem_id="enrolled"),
                    api_name="enrol",
                    **busy,
                )
            known = gr.Markdown(elem_id="known")
            nearest = gr.Dataframe(headers=["person", "score or probability"], interactive=False)
            gr.Button("Which of them is it?").click(
                recognise,
                [model, people, recording],
                [known, nearest],
                api_name="recognise",
                **busy,
            )
        with gr.Accordion("Are these two the same?", open=False):
            with gr.Row():
                one, other = recorder("First recording"), recorder("Second recording")
            same = gr.Markdown(elem_id="same")
            gr.Button("Compare").click(
                compare, [model, people, one, other], same, api_name="compare", **busy
            )


def backend_of(runner: Runner, given: Optional[str], people: str) -> Backend:
    """What two recordings are compared by: --backend, that of the model or of the gallery, or the cosine."""
    if found := given or runner.backend:
        backend = Backend.load(found)
        backend.check_model(runner.sha256, given or runner.path)
        return backend
    if Path(people).exists():
        gallery = Gallery.load(people)
        if gallery.model == runner.sha256 and gallery.backend.calibration is not None:
            return gallery.backend
    return Backend.unfitted("cosine", 0, runner.sha256)


def verdict(backend: Backend, score: float, llr: Optional[float]) -> str:
    """What is said of two recordings: by probability where the backend is calibrated."""
    if llr is None:
        return (
            f"## {backend.score} {score:.3f}\n\n1: the same voice; about 0: two voices that have nothing in"
            " common. For a probability start the page with `--backend`, a file of `speaker.verify"
            " --calibrate`."
        )
    threshold = 0.0 if backend.threshold is None else backend.threshold
    same = "The same person" if llr >= threshold else "Not the same person"
    share = f"**{expit(llr):.1%}**, where it is as likely as not beforehand."
    return f"## {same}\n\nProbability that it is one person: {share}"


def in_gallery(gallery: Gallery, scores: np.ndarray) -> tuple[str, list[list[str]]]:
    """What is said of scores (1, N), and the nearest people: by probability where it is calibrated."""
    found = gallery.threshold(None)
    threshold = None if found is None else float(found["threshold"])
    (name,), _ = decide(gallery, scores, threshold, PRIOR)
    calibrated = gallery.backend.calibration is not None
    shares = posteriors(scores, PRIOR)[0] if calibrated else scores[0]
    nearest = np.argsort(-scores[0], kind="stable")[:SHOWN]
    rows = [
        [gallery.names[k], f"{shares[k]:.1%}" if calibrated else f"{shares[k]:.3f}"]
        for k in nearest
    ]
    if calibrated:
        rows.append([UNKNOWN, f"{shares[-1]:.1%}"])
    note = ""
    if found is None and not calibrated:
        note = (
            "\n\nEverybody gets somebody's name: `gallery calibrate` finds what a stranger reaches."
        )
    elif found is not None and gallery.is_stale(found):
        note = "\n\nPeople were enrolled since it was calibrated: `gallery calibrate` again."
    return f"## {plain(name)}{note}", rows


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


def shown(found: Identification, kind: str) -> list[list[str]]:
    """Name and probability of each; without these, a cosine as it is and a log-probability as a share."""
    if found.probabilities is not None:
        cells = [f"{share:.1%}" for share in found.probabilities]
    elif kind == "cosine":
        cells = [f"{match.score:.3f}" for match in found.candidates]
    else:
        cells = [f"{np.exp(match.score):.1%}" for match in found.candidates]
    return [[m.speaker, cell] for m, cell in zip(found.candidates, cells, strict=True)]


def picture(model: SpeakerModel, features: np.ndarray) -> str:
    """Log-mel features (T, F) as a picture, low bands below, and above it how much each frame counted."""
    if features.ndim != 2:
        return "This file makes its features itself: there is no picture of what it hears."
    low, high = np.percentile(features, [1, 99])
    scaled = np.clip((features - low) / max(high - low, 1e-6), 0, 1)
    pixels = np.repeat((255 * scaled).astype(np.uint8).T[::-1, :, None], 3, axis=2)
    seconds = len(features) * model.spec.seconds_per_frame
    words = f"What the model hears: {seconds:.1f} s, low tones below."
    weights = model.frame_weights(features)
    if weights is None:
        words += " Which part counted is not shown: its pooling has no attention, or its file does not say."
    else:
        words += " Orange, above: how much each moment counted for the answer."
        pixels = np.concatenate([bars(weights), pixels])
    return figure(Image.fromarray(pixels), words, "wide")


def bars(weights: np.ndarray) -> np.ndarray:
    """uint8 (BAND, T, 3): a bar for each weight (T,), the largest over the whole height."""
    heights = BAND * weights / max(float(weights.max()), 1e-12)
    filled = heights[None] >= np.arange(BAND, 0, -1)[:, None] - 0.5
    found: np.ndarray = np.where(filled[..., None], COLOUR, GROUND).astype(np.uint8)
    return found
