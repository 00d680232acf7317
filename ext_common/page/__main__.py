"""A local page to use trained models: record a voice, type a line, draw a picture.

python -m ext_common.page                 every training below this folder
python -m ext_common.page CKPT [CKPT...]  these, or what is in these folders
"""

import secrets
import sys
import time
from importlib.metadata import entry_points
from typing import Any

from ext_common.checkpoints import load_plugin
from ext_common.cli import Parser, UserError, add_dataclass, from_args, run
from ext_common.page import ENTRY_POINTS, MAX_UPLOAD, TABS, Model, Settings
from ext_common.page.find import TRAINING, find
from ext_common.page.training import tab as training
from ext_common.parallel import free_port

EPILOG = """
A tab for each kind of model, and one for the curves of the trainings. It listens on this machine only unless
--host says otherwise. Recordings and pictures that are given to it are deleted within ten minutes.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""
KEPT = 600  # seconds that what was uploaded is kept
HERE = ("127.0.0.1", "localhost", "::1")
# The colours that come with it are too faint, on some parts, to be read by everybody.
STYLE = """
:root {--body-text-color-subdued: #4b5563; --input-placeholder-color: #4b5563}
.dark {--body-text-color-subdued: #b6bcc6; --input-placeholder-color: #b6bcc6}
:root, .dark {--button-primary-background-fill: #b93b0a; --button-primary-background-fill-hover: #9a3008}
footer {display: none !important}
figure img {image-rendering: pixelated; max-width: 100%}
figure.smooth img {image-rendering: auto}
@media (max-width: 500px) {.tab-container button {padding: 0 6px !important}}
figure.wide img {width: 100%; height: 160px}
.card {white-space: pre-wrap; font: inherit}
.min_value, .max_value, .or, input.subdued {color: var(--body-text-color) !important; opacity: 1 !important}
"""


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m ext_common.page", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "models", nargs="*", metavar="CKPT", help="checkpoints, or folders with some (default: .)"
    )
    add_dataclass(parser, Settings)
    args = parser.parse_args(argv)
    settings = from_args(Settings, args)
    load_tabs(settings)
    models, left_out = find(args.models or ["."])
    for sentence in left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    page = build(models, settings)
    print(f"\nopen {listen(page, settings)} in a browser; Ctrl-C ends", flush=True)
    try:
        while page.is_running:
            time.sleep(0.2)
    finally:
        page.close(verbose=False)


def load_tabs(settings: Settings) -> None:
    """Import what draws tabs and reads files."""
    gradio()
    for point in entry_points(group=ENTRY_POINTS):
        point.load()
    load_plugin(settings.user_dir)
    # the last one, after those of models
    TABS[TRAINING] = TABS.pop(TRAINING, training)


def build(models: list[Model], settings: Settings) -> Any:
    """The page, not yet listening; UserError where no tab knows what to do with any model."""
    gr = gradio()
    load_tabs(settings)
    by_kind: dict[str, list[Model]] = {}
    for model in models:
        by_kind.setdefault(model.kind, []).append(model)
    if not set(by_kind) & set(TABS):
        raise UserError(
            "there is no checkpoint here that a tab can use: train one, or give a checkpoint or its folder"
        )
    with gr.Blocks(title="fairseq_ext", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gr.Markdown("# What was trained here")
        for kind, tab in TABS.items():
            if kind in by_kind:
                print(f"{kind}: {', '.join(str(model.path) for model in by_kind[kind])}")
                tab(by_kind[kind], settings)
        for kind in sorted(set(by_kind) - set(TABS)):
            paths = ", ".join(str(model.path) for model in by_kind[kind])
            print(f"no tab for {kind}: {paths}", file=sys.stderr)
    return page


def gradio() -> Any:
    """The module, or in a sentence how to get it."""
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            "the page needs gradio: install it with pip install 'fairseq_ext[page]'"
        ) from error
    return gradio


def listen(page: Any, settings: Settings) -> str:
    """Serve the page in the background; its address."""
    options: dict[str, Any] = {}
    if settings.host not in HERE:
        token = secrets.token_urlsafe(16)
        options["auth"] = lambda _, given: secrets.compare_digest(given.encode(), token.encode())
        options["auth_message"] = "Any name, and the token that the page printed as the password."
        print(
            f"warning: everybody who reaches {settings.host} can reach this page; any name and the"
            f" password {token} open it",
            file=sys.stderr,
        )
    page.queue(default_concurrency_limit=1, max_size=100)
    try:
        _, url, _ = page.launch(
            server_name=settings.host,
            server_port=settings.port or free_port(settings.host),
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD,
            css=STYLE,
            footer_links=[],
            **options,
        )
    except OSError as error:
        raise UserError(
            f"port {settings.port} cannot be used: give another --port, or 0"
        ) from error
    return str(url)


if __name__ == "__main__":
    run(main)
