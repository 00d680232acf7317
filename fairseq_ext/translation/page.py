"""The translation tab of `python -m ext_common.page`: a text, its translations, and where the model looks."""

import html
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Optional

import gradio as gr

from ext_common.cli import UserError
from ext_common.page import Loaded, Model, Settings, answered, choice, tab_for
from fairseq_ext.translation.attention import Attention, attention
from fairseq_ext.translation.decode.checkpoint import (
    Vocabulary,
    build_model,
    read_state,
    vocabulary_of,
)
from fairseq_ext.translation.decode.options import DecodeOptions
from fairseq_ext.translation.decode.translator import Translator
from fairseq_ext.translation.documents import open_document
from fairseq_ext.translation.text.normalise import read_lines
from fairseq_ext.translation.translate import Counts

NBEST = 5
LONGEST = 10_000  # characters that are typed, lines of a file
PROGRESS = gr.Progress()  # a default, as which Gradio finds it
HOW_TO_LOOK = (
    "Point at a piece of the translation, the second line, or step to it with the tab key: what the"
    " model looked at when it wrote it is shaded."
)
END = "(end)"
STEP = 64  # lines of a file between two looks at the progress
SOON = 16  # lines that are typed, until the next are seen


@tab_for("translation_spm")
def tab(models: list[Model], settings: Settings) -> None:
    """Draws it."""
    load = Loaded(
        partial(Translator.from_checkpoint, device=settings.device, user_dir=settings.user_dir)
    )
    # decoding changes a model for speed, and then it has no attention to give
    look = Loaded(partial(whole, user_dir=settings.user_dir))
    # of every model, of which only those that are used are built
    languages = Loaded(languages_of)

    def backwards(path: str) -> Optional[str]:
        """The model of the other direction, where there is one."""
        wanted = languages(path)[::-1]
        return next((str(m.path) for m in models if languages(str(m.path)) == wanted), None)

    @answered
    def translate(path: str, text: str) -> Iterator[tuple[str, list[list[str]], str, Any]]:
        lines, reverse = usable(text), backwards(path)
        several = len(lines) > 1
        found: list[Any] = []
        for start in range(0, len(lines), SOON):
            found += load(path).translate(lines[start : start + SOON], DecodeOptions(nbest=NBEST))
            best = "\n".join(one.text for one in found)
            rows = [
                [f"{number}: {each.text}" if several else each.text, f"{each.score:.2f}"]
                for number, one in enumerate(found, 1)
                for each in one.hypotheses
            ]
            yield best, rows, "", gr.update(visible=reverse is not None)
        back = "\n".join(load(reverse)(best.split("\n"))) if reverse else ""
        shown_back = gr.update(value=back, visible=reverse is not None)
        shown = "" if several or not lines[0].strip() else looked(look(path), lines[0], best)
        yield best, rows, shown, shown_back

    @answered
    def translate_file(path: str, given: Optional[str], progress: Any = PROGRESS) -> Iterator[Any]:
        if given is None:
            raise UserError("there is no file yet: give text, a sentence a line, or a catalogue")
        document = open_document(given)
        lines = held(given, read_lines(given) if document is None else document.texts)
        counts, done = Counts(), []
        for start in range(0, len(lines), STEP):
            progress((start, len(lines)), unit="lines")
            yield gr.DownloadButton(visible=False), ""  # where a cancelled one ends
            for found in load(path).translate_window(lines[start : start + STEP]):
                counts.add(found)
                done.append(found.text)
        content = "".join(f"{line}\n" for line in done).encode()
        if document is not None:
            content, counts.document = document.render(done)
        name, language = Path(given), load(path).vocabulary.target_lang
        with tempfile.TemporaryDirectory() as folder:
            # the page takes a copy, which it deletes in time
            out = Path(folder, f"{name.stem}.{language}{name.suffix if document else '.txt'}")
            out.write_bytes(content)
            said = "\n".join(f"- {sentence}" for sentence in counts.sentences())
            yield gr.DownloadButton(value=str(out), visible=True), said

    busy: dict[str, Any] = dict(concurrency_id="translation", concurrency_limit=1)
    with gr.Tab("Translation"):
        model = choice(models)
        with gr.Row():
            source = gr.Textbox(label="Text, a sentence a line", lines=3, max_length=LONGEST)
            target = gr.Textbox(label="Translation", lines=3, interactive=False, buttons=["copy"])
        with gr.Row():
            ask, end = gr.Button("Translate", variant="primary"), gr.Button("Cancel")
        looks = gr.HTML()
        with gr.Row():
            others = gr.Dataframe(
                headers=["translation", "score"],
                label="The best ones; score: log-probability of a piece, 0 at best",
                interactive=False,
            )
            back = gr.Textbox(label="Translated back", lines=3, interactive=False, visible=False)
        asked = gr.on(
            [ask.click, source.submit],
            translate,
            [model, source],
            [target, others, looks, back],
            api_name="translate",
            **busy,
        )
        end.click(None, cancels=[asked])
        with gr.Accordion("A whole file", open=False):
            given = gr.File(
                label="Text, UTF-8, a sentence a line, or a catalogue of gettext (.po)",
                file_types=[".txt", ".po", "text"],
            )
            start, stop = gr.Button("Translate the file"), gr.Button("Cancel")
            out = gr.DownloadButton("Save its translation", visible=False)
            became = gr.Markdown()
            running = start.click(
                translate_file, [model, given], [out, became], api_name="translate_file", **busy
            )
            stop.click(None, cancels=[running])


def whole(path: str, user_dir: Optional[str]) -> tuple[Any, Vocabulary]:
    """(model, vocabulary) as they were trained."""
    state = read_state(path)
    return build_model(state, path, user_dir), vocabulary_of(state, path)


def languages_of(path: str) -> tuple[str, str]:
    """(source, target) of a model."""
    found = read_state(path)["task_state"]["translation"]
    return found["source_lang"], found["target_lang"]


def usable(text: str) -> list[str]:
    """The lines of what was typed; UserError for nothing, or more than is answered at once."""
    if not text.strip():
        raise UserError("there is no text yet: type a sentence")
    if len(text) > LONGEST:
        raise UserError(
            f"the text has {len(text):,} characters, the page takes {LONGEST:,}: give it as a file"
        )
    return text.strip("\n").split("\n")


def held(path: str, texts: Iterable[str]) -> list[str]:
    """The lines of a file, or the texts of a document; UserError for none, or too many."""
    lines = list(itertools.islice(texts, LONGEST + 1))
    if not lines:
        raise UserError(f"{Path(path).name} has nothing to translate: give another file")
    if len(lines) > LONGEST:
        raise UserError(
            f"{Path(path).name} has more than {LONGEST:,} lines to translate, which the page takes: use"
            " python -m fairseq_ext.translation.translate"
        )
    return lines


def looked(model: tuple[Any, Vocabulary], source: str, target: str) -> str:
    """Where the model looks when it writes `target`, as HTML."""
    return hover(attention(*model, source, target))


def hover(found: Attention) -> str:
    """Pieces of source and target; pointing at one of the target shades what it looked at."""

    def piece(kind: str, number: int, text: str, more: str = "") -> str:
        shown = END if text == "</s>" else html.escape(text.replace("▁", "␣")) or "␣"
        return f'<span class="{kind}{number}"{more}>{shown}</span>'

    rules = []
    for row, weights in enumerate(found.weights):
        top = max(float(weights.max()), 1e-9)
        for column, weight in enumerate(weights):
            if weight > top / 10:
                shade = f"background:rgba(255,140,0,{weight / top:.2f})"
                rules.append(f".looks:has(.t{row}:is(:hover,:focus)) .s{column}{{{shade}}}")
    source = " ".join(piece("s", k, text) for k, text in enumerate(found.source))
    target = " ".join(piece("t", k, text, ' tabindex="0"') for k, text in enumerate(found.target))
    rows = f"<p>{HOW_TO_LOOK}</p><p>{source}</p><p>{target}</p>"
    return f'<style>{"".join(rules)}</style><div class="looks">{rows}</div>'
