"""Speaker embeddings of a trained model for prepared data or audio files.

python -m fairseq_ext.speaker.embed DATA --path CKPT --output embeddings.npz
python -m fairseq_ext.speaker.embed a.wav b.flac --path CKPT --output embeddings.npz
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import MANIFEST_NAME, atomic_json, atomic_write, beside
from fairseq_ext.speaker.inference.inputs import (
    PredictOptions,
    check_output,
    load_model,
    open_inputs,
    predictions,
    provenance,
)

EPILOG = """
npz holds the arrays ids (N,), speakers (N,), text ("" without a speaker), recordings (N,), what each is cut
from, and embeddings (N, D) float32, in source order:

  found = numpy.load("embeddings.npz"); found["ids"], found["embeddings"]

Format ark is Kaldi's: OUTPUT holds the vectors, and the file of the same name with the ending .scp
their index. Ids are those of the data: source paths (path#start-end for a cut), or Kaldi's.
Embeddings are not scaled to a length:
compare them by cosine. The plot shows the two directions of largest variance (PCA) of embeddings
scaled to length 1, with the names of the speakers, or of the files.

Exit codes: 0 done, 1 failed (also where an audio file was left out), 2 bad usage.
"""


@dataclass
class EmbedOptions(PredictOptions):
    """Options of `embed`."""

    subset: Optional[str] = field(
        default=None, metadata={"help": "split of DATA; none: every utterance"}
    )
    output: Optional[str] = field(
        default=None, metadata={"help": "file to write; none: embeddings.npz or embeddings.ark"}
    )
    format: str = field(
        default="npz", metadata={"help": "format of the output", "choices": ("npz", "ark")}
    )
    plot: Optional[str] = field(
        default=None, metadata={"help": "picture of a projection on two dimensions to write (.png)"}
    )


def main(argv):
    """The command."""
    parser = Parser(prog="python -m fairseq_ext.speaker.embed", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="one folder made by fairseq_ext.speaker.prepare; or audio files, a folder or a list of them"
        " (.txt: a path a line; .scp), or - for audio on standard input",
    )
    add_dataclass(parser, EmbedOptions)
    args = parser.parse_args(argv)
    return embed(args.inputs, from_args(EmbedOptions, args))


def embed(inputs, options):
    """Compute, write and print; returns the exit code."""
    output = options.output or f"embeddings.{options.format}"
    if options.format == "ark" and Path(output).suffix == ".scp":
        raise UsageError(f"--output {output}: name the .ark file, its .scp lies beside it")
    for path in filter(None, (output, options.plot)):
        check_output(path, [*inputs, options.path])
    if options.format == "ark":
        import_kaldiio()
    source = open_inputs(inputs, options.subset, options.channel)
    if options.format == "ark":
        check_kaldi_ids(source.ids)
    model = load_model(source, options)
    rows = {}
    for positions, found in predictions(model, source, options, "embed"):
        rows.update(zip(positions, found["embedding"], strict=True))
    embeddings = np.stack([rows[i] for i in range(len(rows))])
    speakers = [name or "" for name in source.speakers]
    if options.format == "npz":
        write_npz(output, source.ids, speakers, source.recordings, embeddings)
    else:
        write_ark(output, source.ids, embeddings)
    counts = {"dimensions": embeddings.shape[1]}
    if os.path.isfile(output):
        atomic_json(beside(output, MANIFEST_NAME), provenance(source, options, counts))
    print(f"{source.name}: {len(embeddings)} embeddings of {embeddings.shape[1]} in {output}")
    if options.plot:
        from ext_common.plots import scatter_2d

        # without speakers the files' own names say which is which
        shown = speakers if any(speakers) else [Path(name).stem for name in source.ids]
        shown = [name or "unlabelled" for name in shown]
        scatter_2d(project(embeddings), shown, options.plot, source.name)
        print(f"projection in {options.plot}")
    return 1 if source.bad else 0


def write_npz(path, ids, speakers, recordings, embeddings):
    """Text as fixed-width unicode, so that numpy reads it without pickle."""
    with atomic_write(path, "wb") as file:
        np.savez(
            file,
            ids=np.array(ids, dtype=str),
            speakers=np.array(speakers, dtype=str),
            recordings=np.array(recordings, dtype=str),
            embeddings=embeddings,
        )


def write_ark(path, ids, embeddings):
    """Kaldi ark, and its scp (with the absolute path of the ark, as Kaldi runs from anywhere)."""
    kaldiio = import_kaldiio()
    ark, index = Path(path).resolve(), []
    with atomic_write(ark, "wb") as file:
        for key, vector in zip(ids, embeddings, strict=True):
            index.append(f"{key} {ark}:{file.tell() + len(key.encode()) + 1}\n")
            kaldiio.save_ark(file, {key: vector})
    with atomic_write(ark.with_suffix(".scp")) as file:
        file.writelines(index)


def import_kaldiio():
    """kaldiio, or a sentence on how to get it."""
    try:
        import kaldiio
    except ImportError:
        raise UserError(
            "--format ark needs the package kaldiio: pip install kaldiio, or use --format npz"
        ) from None
    return kaldiio


def check_kaldi_ids(ids):
    """UserError for ids that a Kaldi index cannot hold."""
    for key in ids:
        if not key or key.split() != [key]:
            raise UserError(f"Kaldi ids hold no white space, {key!r} does: use --format npz")


def project(embeddings):
    """(N, D) → (N, 2): the two largest principal components of the rows scaled to length 1.

    A component is turned so that its largest weight is positive: the same picture every time.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    x = x - x.mean(0)
    axes = np.linalg.svd(x, full_matrices=False)[2][:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    points = np.zeros((len(x), 2))
    points[:, : len(axes)] = x @ axes.T
    return points


if __name__ == "__main__":
    run(main)
