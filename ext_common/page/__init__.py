"""What a job's tab of the page is made with: `python -m ext_common.page` shows the tabs.

    @tab_for("speaker_id")
    def tab(models: list[Model], settings: Settings) -> None:
        with gr.Tab("Speaker"): ...

    @reader_of(".onnx")
    def exported(path: Path) -> Optional[Model]: ...

The second says what a file is that is no checkpoint of fairseq-train; a tab gets all files of its kind.
A module with such functions is named in the entry points `ext_common.page` of the package that it is in, or
imported by a plugin that is given as --user-dir. It wires components to the API of its commands, no more.
"""

import base64
import functools
import html
import inspect
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ext_common.cli import UserError

ENTRY_POINTS = "ext_common.page"
MAX_UPLOAD = 50 * 2**20  # bytes


@dataclass
class Settings:
    """Options of the page: what it shows and who may see it."""

    data: Optional[str] = field(
        default=None,
        metadata={"help": "prepared images or a folder of them: samples get their nearest ones"},
    )
    gallery: Optional[str] = field(
        default=None,
        metadata={
            "help": "file of a gallery of speakers, made where it is not there; none: those that are found,"
            " or people.npz beside the model"
        },
    )
    backend: Optional[str] = field(
        default=None,
        metadata={
            "help": "file of speaker.verify --calibrate, by which two recordings, and a new gallery, get"
            " probabilities"
        },
    )
    device: str = field(default="cpu", metadata={"help": "of the models: cpu, cuda, cuda:1"})
    host: str = field(
        default="127.0.0.1",
        metadata={
            "help": "address to listen on; others than this machine's need the printed token"
        },
    )
    port: int = field(default=7860, metadata={"help": "port to listen on; 0: a free one"})
    user_dir: Optional[str] = field(
        default=None, metadata={"help": "folder of a plugin with parts or tabs of its own"}
    )


@dataclass(frozen=True)
class Model:
    """A file that a tab can use: `kind` is the task it was trained for, `about` what is said of it.

    card: the model card that came with it, Markdown.
    """

    kind: str
    path: Path
    about: dict[str, str] = field(default_factory=dict)
    card: str = ""

    @property
    def title(self) -> str:
        """Its name in a list: the folder and the file."""
        return (
            f"{self.path.parent.name}/{self.path.name}" if self.path.parent.name else self.path.name
        )

    @property
    def text(self) -> str:
        """What is said of it, as Markdown."""
        return " · ".join(
            f"{plain(name)}: **{plain(value)}**" for name, value in self.about.items()
        )


Reader = Callable[[Path], Optional[Model]]
READERS: dict[str, Reader] = {}


def reader_of(ending: str) -> Callable[[Reader], Reader]:
    """Registers the function that says what a file with this ending is; None: nothing for the page."""

    def register(reader: Reader) -> Reader:
        READERS[ending] = reader
        return reader

    return register


Tab = Callable[[list[Model], Settings], None]
TABS: dict[str, Tab] = {}


def tab_for(kind: str) -> Callable[[Tab], Tab]:
    """Registers the function that draws the tab of models of one kind; the last one counts."""

    def register(tab: Tab) -> Tab:
        TABS[kind] = tab
        return tab

    return register


def answered(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose mistakes are a sentence on the page, and no traceback there or in the log."""
    import gradio as gr

    def told(error: BaseException, args: tuple[Any, ...]) -> gr.Error:
        if isinstance(error, UserError | ValueError):
            text = named_as_given(str(error), args)
            return gr.Error(html.escape(text, False), title="Not this way", print_exception=False)
        print(f"page: {handler.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
        text = f"This went wrong here, not with you: {type(error).__name__}: {error}"
        return gr.Error(html.escape(text, False), title="Error", print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def steps(*args: Any) -> Iterator[Any]:
            try:
                yield from handler(*args)
            except gr.Error:
                raise
            except Exception as error:
                raise told(error, args) from None

        return steps

    @functools.wraps(handler)
    def once(*args: Any) -> Any:
        try:
            return handler(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise told(error, args) from None

    return once


def named_as_given(text: str, args: tuple[Any, ...]) -> str:
    """A sentence in which uploads have their names, not where they are kept meanwhile."""
    from gradio.utils import get_upload_folder

    for arg in args:
        if isinstance(arg, str) and arg.startswith(get_upload_folder()):
            text = text.replace(arg, os.path.basename(arg))
    return text


def plain(text: str) -> str:
    """Text that Markdown shows as it is: a name from a file is no link and no picture to be fetched."""
    return re.sub(r"([\\`*_\[\]()<>!#|~&:])", r"\\\1", " ".join(text.split()))


class Loaded:
    """Models by path, each read when first asked for, once however many ask."""

    def __init__(self, read: Callable[[str], Any]):
        self._read, self._lock = read, threading.Lock()
        self._found: dict[str, Any] = {}

    def __call__(self, path: str) -> Any:
        with self._lock:
            if path not in self._found:
                self._found[path] = self._read(path)
            return self._found[path]


def choice(models: list[Model]) -> Any:
    """A drop-down of models, hidden where there is one, and what is known of the chosen one under it."""
    import gradio as gr

    paths = [(model.title, str(model.path)) for model in models]
    chosen = gr.Dropdown(paths, value=paths[0][1], label="Model", visible=len(paths) > 1)
    about = gr.Markdown(models[0].text)
    with gr.Accordion("Its model card", open=False, visible=bool(models[0].card)) as opened:
        card = gr.HTML(as_text(models[0].card))
    by_path = {str(model.path): model for model in models}

    def describe(path: str) -> tuple[Any, ...]:
        model = by_path[path]
        return model.text, gr.update(visible=bool(model.card)), as_text(model.card)

    chosen.change(
        describe,
        chosen,
        [about, opened, card],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return chosen


def as_text(text: str) -> str:
    """HTML that shows text as it is, in its lines."""
    return f'<pre class="card">{html.escape(text)}</pre>'


def figure(image: Any, caption: str, kind: str = "pixels") -> str:
    """HTML of a Pillow image with its caption.

    kind: "pixels", which are squares, "wide", the same over the whole width, or "smooth", for a drawing.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source = base64.b64encode(buffer.getvalue()).decode()
    words = html.escape(caption)
    return (
        f'<figure class="{kind}"><img src="data:image/png;base64,{source}" alt="{words}">'
        f"<figcaption>{words}</figcaption></figure>"
    )
