"""Translate a text file line by line: as many lines out as in, in the same order.

python -m fairseq_ext.translation.translate INPUT OUTPUT --path CKPT/checkpoint_best.pt
echo "How are you?" | python -m fairseq_ext.translation.translate - - --path CKPT/checkpoint_best.pt
"""

import contextlib
import itertools
import json
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Optional

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, progress, run
from ext_common.manifest import (
    MANIFEST_NAME,
    atomic_json,
    atomic_write,
    beside,
    check_writable,
    known_sha256,
    versions,
)
from fairseq_ext.translation.decode.checkpoint import split_paths
from fairseq_ext.translation.decode.options import DecodeOptions
from fairseq_ext.translation.decode.translator import BACKENDS, WINDOW, Translation, Translator
from fairseq_ext.translation.documents import open_document
from fairseq_ext.translation.text.normalise import read_lines
from fairseq_ext.translation.unfinished import Unfinished, unfinished

# Lines after which what is done is kept.
KEPT = 2000
# What may differ between two runs that write the same bytes.
RUN_ONLY = ("path", "threads", "max_tokens", "user_dir")
EPILOG = """
INPUT is UTF-8 text (.gz and .zst are unpacked), - the standard input: lines that are typed are translated
at once, those of a pipe in batches. Only a newline ends a line. An empty line stays empty. A line of several
sentences is translated one by one, where the training had single ones or the line is longer than 99 of 100
of its lines; one longer than the model can hold is split at the ends of sentences, then at commas, then
between words. Parts are joined again, and such lines counted on stderr.

A catalogue of gettext (.po), and with --column or --json-field a table or JSON Lines, is translated in
place: OUTPUT is the same document. Placeholders and markup of a catalogue stay what they are; an entry that
cannot be kept intact stays in its own language and is counted, one that is translated already is left alone.

OUTPUT is text, one line for each line of INPUT. With --nbest above 1 or --scores it is a table with
tabs: number of the line (from 1), score, text; nbest rows for each line, best first, one for an empty
line. A score is the log-probability (base e) of the output divided by its number of pieces to the
power of --lenpen. Chinese and Japanese are written without spaces between their characters.

--path takes an ensemble as a.pt:b.pt. With --backend ctranslate2 the model is converted once and kept
beside the checkpoint (CKPT.ctranslate2-*); greedy output is compared with fairseq's at conversion.

Killed and started again with the same files and options, it goes on where it was (.OUTPUT.partial).
Beside OUTPUT is written OUTPUT.manifest.json (inputs, options, counts, versions). Nothing here is
random. Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class TranslateOptions(DecodeOptions):
    """Options of `translate`."""

    path: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint that fairseq-train wrote, or several: a.pt:b.pt"},
    )
    backend: str = field(
        default="fairseq",
        metadata={"help": "what decodes; ctranslate2 is faster on CPUs", "choices": BACKENDS},
    )
    compute_type: Optional[str] = field(
        default=None,
        metadata={
            "help": "float32, float16 or bfloat16, and int8 with ctranslate2; none: float32",
        },
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, cuda:1; auto: CUDA where there is one"}
    )
    threads: Optional[int] = field(
        default=None, metadata={"help": "threads on the CPU; none: one for each CPU"}
    )
    ema: bool = field(
        default=False,
        metadata={"help": "use the averaged weights of a training with --store-ema"},
    )
    column: Optional[str] = field(
        default=None,
        metadata={
            "help": "translate this column of a table (.csv, or with tabs), by number from 1 or by its name "
            "in the first row; FROM:TO writes another column"
        },
    )
    json_field: Optional[str] = field(
        default=None,
        metadata={"help": "translate this field of JSON Lines; FROM:TO writes another field"},
    )
    scores: bool = field(default=False, metadata={"help": "write a table with scores"})
    user_dir: Optional[str] = field(
        default=None,
        metadata={"help": "plugin with the model's parts; none: the one it was trained with"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("--path is missing: give a checkpoint that fairseq-train wrote")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")


def main(argv):
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.translation.translate", description=__doc__, epilog=EPILOG
    )
    parser.add_argument("input", metavar="INPUT", help="text file, - for the standard input")
    parser.add_argument("output", metavar="OUTPUT", help="file to write, - for the standard output")
    add_dataclass(parser, TranslateOptions)
    args = parser.parse_args(argv)
    return translate(args.input, args.output, from_args(TranslateOptions, args))


def translate(source: str, output: str, options: TranslateOptions) -> int:
    """Translate a file; returns the exit code."""
    paths = split_paths(options.path)
    check_files(source, output, paths)
    whole = os.path.isfile(source) and output != "-" and may_wait(output)
    document = open_document(source, options.column, options.json_field) if whole else None
    wanted = document or options.column or options.json_field
    if wanted and (not whole or options.nbest > 1 or options.scores):
        raise UsageError(
            "a document is translated from a file to a file, one translation for each text: leave --nbest "
            "and --scores out, and give no pipe"
        )
    translator = Translator.from_checkpoint(
        paths,
        options.backend,
        options.device,
        options.compute_type,
        options.user_dir,
        options.threads,
        options.ema,
    )
    if not whole:
        counts = translate_stream(source, output, translator, options)
    else:
        plan = plan_of(source, paths, options)
        with unfinished(output, plan) as work:
            lines = read_lines(source) if document is None else iter(document.texts)
            total = count_lines(source) if document is None else len(document.texts)
            counts = go_on(lines, total, work, translator, options)
            with atomic_write(output, "wb") as file, open(work.path, "rb") as done:
                if document is None:
                    shutil.copyfileobj(done, file)
                else:
                    texts = done.read().decode().split("\n")[:-1]
                    content, found = document.render(texts)
                    file.write(content)
                    counts.document = found
    for sentence in counts.sentences():
        print(sentence, file=sys.stderr)
    if output != "-" and os.path.isfile(output):
        record = provenance(source, output, paths, options, counts)
        atomic_json(beside(output, MANIFEST_NAME), record)
    return 0


def translate_stream(
    source: str, output: str, translator: Translator, options: TranslateOptions
) -> "Counts":
    """Translate to or from a standard stream or a pipe; nothing of it is kept."""
    counts = Counts()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_output(output))
        typed = source == "-"
        windows = available(read_lines("-")) if typed else whole_windows(read_lines(source))
        silent = typed and sys.stdin.isatty()
        total = None if typed else count_lines(source)
        bar = stack.enter_context(progress(range(0), "translate", "lines", total=total))
        for window in windows:
            show = (lambda n: None) if silent else bar.update
            file.write(rows_of(window, translator, options, counts, show))
            if typed:
                file.flush()
    return counts


def go_on(
    lines: Iterator[str],
    total: Optional[int],
    work: Unfinished,
    translator: Translator,
    options: TranslateOptions,
) -> "Counts":
    """Translate what an earlier run has not, keeping it window by window."""
    counts = Counts(**work.counts)
    if work.done:
        print(f"{work.done:,} lines of an earlier run are there already", file=sys.stderr)
    lines = itertools.islice(lines, work.done, None)
    total = None if total is None else total - work.done
    with progress(range(0), "translate", "lines", total=total) as bar:
        for window in whole_windows(lines, KEPT):
            rows = rows_of(window, translator, options, counts, bar.update)
            work.write(rows, counts.lines, counts.of_lines())
    return counts


def rows_of(
    window: list[str],
    translator: Translator,
    options: TranslateOptions,
    counts: "Counts",
    show: Callable[[int], object],
) -> bytes:
    """What OUTPUT has for some lines, which are counted."""
    rows = []
    for line in translator.translate_window(window, options, show):
        counts.add(line)
        rows.append(as_text(line, counts.lines, options))
    return "".join(rows).encode()


def may_wait(output: str) -> bool:
    """Whether a file may appear when all is written: not under the name of a pipe or a device."""
    return os.path.isfile(output) or not os.path.exists(output)


def plan_of(source: str, paths: list[str], options: TranslateOptions) -> dict[str, Any]:
    """What decides the bytes of OUTPUT."""
    chosen = {key: value for key, value in asdict(options).items() if key not in RUN_ONLY}
    hashes = [known_sha256(path) for path in (source, *paths)]
    return {"inputs": hashes, "options": json.loads(json.dumps(chosen))}


@dataclass
class Counts:
    """What became of the lines."""

    lines: int = 0
    empty: int = 0
    split: int = 0
    cut: int = 0
    broken: int = 0
    nothing: int = 0
    document: dict[str, int] = field(default_factory=dict)

    def of_lines(self) -> dict[str, int]:
        return {key: value for key, value in vars(self).items() if key != "document"}

    def add(self, line: Translation) -> None:
        self.lines += 1
        self.empty += line.parts == 0
        self.split += line.parts > 1
        self.cut += line.cut
        self.broken += line.broken
        self.nothing += line.parts > 0 and not line.text

    def sentences(self) -> Iterator[str]:
        """One for everything that a reader of the output should know."""
        if self.document:
            parts = (f"{count:,} {name.replace('_', ' ')}" for name, count in self.document.items())
            yield f"the document: {', '.join(parts)}"
        if self.split:
            yield (
                f"{self.split:,} of {self.lines:,} lines were translated in parts, sentences or what the"
                " model can hold, that were joined again"
            )
        if self.cut:
            yield (
                f"{self.cut:,} of {self.lines:,} outputs reached the longest length and may be cut: raise"
                " --max-len-b where the model does not just repeat itself"
            )
        if self.broken:
            yield (
                f"{self.broken:,} of {self.lines:,} outputs had bytes that are no character, which are left"
                " out: a sign of too little training, or of characters that it had too few of"
            )
        if self.nothing:
            yield f"{self.nothing:,} of {self.lines:,} lines have text, but an empty translation"


def as_text(line: Translation, number: int, options: TranslateOptions) -> str:
    """The rows of a line, each with its newline."""
    if options.nbest == 1 and not options.scores:
        return line.text + "\n"
    return "".join(f"{number}\t{h.score:.6f}\t{h.text}\n" for h in line.hypotheses)


def check_files(source: str, output: str, paths: list[str]) -> None:
    """UserError where there is nothing to read; UsageError where writing would destroy an input."""
    if source != "-" and not os.path.exists(source):
        raise UserError(f"{source} does not exist: give a text file, or - for the standard input")
    if os.path.isdir(source):
        raise UsageError(f"{source} is a folder: give a text file")
    if output == "-":
        return
    if os.path.isdir(output):
        raise UsageError(f"{output} is a folder: give the file to write")
    check_writable(output)
    written = {os.path.realpath(output), os.path.realpath(beside(output, MANIFEST_NAME))}
    for path in [source, *paths]:
        if path != "-" and os.path.realpath(path) in written:
            raise UsageError(f"{output} would replace {path}: give another file to write")


@contextlib.contextmanager
def open_output(output: str) -> Iterator[IO[bytes]]:
    """A binary file; a path appears only when all is written."""
    if output == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with atomic_write(output, "wb") as file:
        yield file


def whole_windows(lines: Iterable[str], size: int = WINDOW) -> Iterator[list[str]]:
    """Lists of `size` lines."""
    window = []
    for line in lines:
        window.append(line)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def available(lines: Iterable[str], size: int = WINDOW) -> Iterator[list[str]]:
    """Lists of the lines that are there: one that is typed alone, of a pipe up to `size`."""
    waiting: queue.Queue = queue.Queue(maxsize=size)
    end = object()

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
            waiting.put(end)
        except BaseException as error:
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        window = [waiting.get()]
        with contextlib.suppress(queue.Empty):
            while len(window) < size and isinstance(window[-1], str):
                window.append(waiting.get_nowait())
        last = window[-1]
        if isinstance(last, str):
            yield window
            continue
        if window[:-1]:
            yield window[:-1]
        if isinstance(last, BaseException):
            raise last
        return


def count_lines(path: str) -> Optional[int]:
    """Lines of a plain file; None for a packed one or a pipe, which would have to be read twice."""
    if not os.path.isfile(path) or path.endswith((".gz", ".zst")):
        return None
    lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def provenance(source, output, paths, options, counts: Counts) -> dict:
    """The content of a manifest: what went in, how, and what came out."""
    inputs = [path for path in (source, *paths) if path != "-"]
    return {
        "inputs": {path: known_sha256(path) for path in inputs if Path(path).is_file()},
        "counts": {
            "in": counts.lines,
            "out": counts.lines,
            **counts.of_lines(),
            **({"document": counts.document} if counts.document else {}),
        },
        "options": options,
        "seed": None,
        "versions": versions(),
    }


if __name__ == "__main__":
    run(main)
