"""Write a trained model as one ONNX file, which runs without torch and fairseq.

    python -m fairseq_ext.speaker.export CKPT/checkpoint_best.pt model.onnx --data DATA
    python -m fairseq_ext.speaker.identify a.wav b.flac --path model.onnx

The file is written only if it computes what the model does.
"""

import base64
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import (
    MANIFEST_NAME,
    atomic_json,
    atomic_write,
    beside,
    check_writable,
    known_sha256,
    versions,
)
from fairseq_ext.speaker.export.exported import (
    ENDING,
    INPUTS,
    Description,
    ExportedNetwork,
    import_runtime,
)

EPILOG = """
Inputs are `waveform` float32 (batch, samples), or with --features outside `features` float32 (batch,
frames, mels), and `lengths` int64 (batch,), how many of them are the utterance's; outputs are
`embedding` float32 (batch, D) and `scores` float32 (batch, speakers): cosines, or log-probabilities of a
model with a linear head. Samples are mono, in [-1, 1], at the rate of the specification; where this asks
for it, silence is trimmed and loudness set before. The metadata `fairseq_ext.speaker` holds, as JSON, the
speakers, the feature specification, the hash of the model and the --backend.

Written only if it agrees with the model: batches of 1, 2 and 5 utterances of 1 to 3,000 frames, alike and
padded, differ by no more than 1e-4; with --data, the file says the same name for each utterance of the
split. int8 (the matrices only, scaled while it runs) cannot agree so far: it needs --data, and may lose
half a point of accuracy there.

sherpa-onnx cannot run the file: it computes other features (pre-emphasis, other windows and mel bands) and
would give other embeddings. Needs pip install 'fairseq-ext[onnx]'; using the file needs only onnxruntime,
numpy and soundfile. Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class ExportOptions:
    """What to write."""

    features: str = field(
        default="inside",
        metadata={
            "help": "inside: the file takes samples and makes the features itself, for other programs;"
            " outside: it takes features, also those of prepared data",
            "choices": list(INPUTS),
        },
    )
    weights: str = field(
        default="float32",
        metadata={"help": "how matrices are stored", "choices": ["float32", "int8"]},
    )
    data: Optional[str] = field(
        default=None,
        metadata={"help": "prepared folder on whose --subset model and file are compared"},
    )
    subset: str = field(default="test", metadata={"help": "split of --data to compare on"})
    backend: Optional[str] = field(
        default=None,
        metadata={
            "help": "file of verify --fit or --calibrate to put into the file: verify and gallery then use it"
            " where they are given none"
        },
    )
    user_dir: Optional[str] = field(
        default=None,
        metadata={"help": "plugin with the model's parts; none: the one it was trained with"},
    )

    def __post_init__(self) -> None:
        if self.weights == "int8" and not self.data:
            raise ValueError(
                "--weights int8 changes what comes out: give --data to measure by how much"
            )


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m fairseq_ext.speaker.export", description=__doc__, epilog=EPILOG)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint that fairseq-train wrote")
    parser.add_argument("output", metavar="OUTPUT", help=f"file to write, named *{ENDING}")
    add_dataclass(parser, ExportOptions)
    args = parser.parse_args(argv)
    export(args.checkpoint, args.output, from_args(ExportOptions, args))


def export(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], options: ExportOptions
) -> None:
    """Write the file and, beside it, a manifest; UserError, and nothing written, where it does not agree."""
    if not os.fspath(output).endswith(ENDING):
        raise UsageError(f"{output}: name the file *{ENDING}, by which the other commands know it")
    check_writable(output)
    import_runtime()
    from fairseq_ext.speaker.inference import ExportedModel, SpeakerModel

    model = SpeakerModel.from_checkpoint(checkpoint, user_dir=options.user_dir)
    if isinstance(model, ExportedModel):
        raise UserError(f"{checkpoint} is an exported file: give the checkpoint it was made of")
    data, parity = checked(model, os.fspath(checkpoint), options)
    with atomic_write(output, "wb") as file:
        file.write(data)
    atomic_json(
        beside(output, MANIFEST_NAME),
        {
            "inputs": {os.fspath(checkpoint): known_sha256(checkpoint)},
            "counts": {"bytes": len(data), **parity},
            "options": options,
            "seed": None,
            "versions": versions(),
        },
    )
    print(f"{output}: {len(data) / 1e6:.1f} MB; {said(parity)}")


def checked(model, checkpoint: str, options: ExportOptions) -> tuple[bytes, dict]:
    """The file's bytes and how far it agrees with the model; UserError where that is not far enough."""
    from fairseq_ext.speaker.export import graph, parity
    from fairseq_ext.speaker.inference import ExportedModel

    described = Description(
        speakers=tuple(model.speakers),
        spec=model.spec.to_dict(),
        features="outside",
        score_kind=model.score_kind,
        weights=options.weights,
        sha256=model.sha256,
        scale=model.scale,
    )
    if options.backend:
        described = replace(described, backend=read_backend(options.backend, described))
    scorer = graph.Scorer(model.network.float(), model.score_kind == "log-probability")
    made = graph.scorer_graph(scorer, model.spec.n_mels)
    if options.weights == "int8":
        made = graph.in_integers(made)
    data = graph.to_bytes(made, described)
    network = ExportedNetwork(data, f"the file of {checkpoint}")
    result: dict = {}
    if options.data:
        # prepared data are features: measured before those are put inside
        result["accuracy"] = compare(model, ExportedModel(network), checkpoint, options)
    if options.features == "inside":
        made = graph.joined(graph.front_graph(model.spec), made)
        data = graph.to_bytes(made, replace(described, features="inside"))
        network = ExportedNetwork(data, f"the file of {checkpoint}")
    gap = parity.difference(scorer, network)
    if options.weights == "float32" and not gap.largest <= parity.TOLERANCE:
        raise UserError(
            f"{checkpoint} cannot be exported: the file's embeddings or scores differ from the model's by"
            f" up to {gap.largest:.1e}, {parity.TOLERANCE:.0e} is accepted: please report it"
        )
    return data, {**result, "difference": gap.largest, "cosine": gap.cosine}


def read_backend(path: str, described: Description) -> str:
    """The bytes of a backend, in base 64; UserError where it is none, or of another model."""
    from fairseq_ext.speaker.verify.backend import Backend

    Backend.load(path).check_model(described.model_sha256, path)
    return base64.b64encode(Path(path).read_bytes()).decode()


def compare(model, theirs, checkpoint: str, options: ExportOptions) -> dict:
    """Top-1 of both on the split's known speakers, on how many they say different names.

    UserError where the file's is not good enough.
    """
    from fairseq_ext.speaker.export.parity import LOSS
    from fairseq_ext.speaker.identify import IdentifyOptions, known_labels, ranked_predictions
    from fairseq_ext.speaker.inference.inputs import PreparedSplit

    assert options.data is not None
    source = PreparedSplit(options.data, options.subset)
    source.check(model, checkpoint)
    truth, _ = known_labels(source.speakers, model.speakers)
    known = truth >= 0
    if not known.any():
        raise UserError(
            f"{options.data}: the model knows none of the speakers of its split {options.subset!r}: give the"
            " data it was trained on"
        )
    ours, other = (
        ranked_predictions(one, source, IdentifyOptions(checkpoint))[0][known, 0]
        for one in (model, theirs)
    )
    found = {
        "utterances": int(known.sum()),
        "model": float((ours == truth[known]).mean()),
        "file": float((other == truth[known]).mean()),
        "others": int((ours != other).sum()),
    }
    if options.weights == "float32" and found["others"]:
        raise UserError(
            f"the file says another name than the model for {found['others']} of {found['utterances']}"
            f" utterances of {options.data}: it is not written, please report it"
        )
    if found["model"] - found["file"] > LOSS:
        raise UserError(
            f"in int8 the accuracy on {options.data} falls from {100 * found['model']:.1f} % to"
            f" {100 * found['file']:.1f} %, by more than half a point: use --weights float32"
        )
    return found


def said(parity: dict) -> str:
    """The figures in a sentence."""
    text = (
        f"embeddings and scores differ from the model's by at most {parity['difference']:.1e},"
        f" smallest cosine {parity['cosine']:.6f}"
    )
    found = parity.get("accuracy")
    if found:
        text += (
            f"; top-1 of {found['utterances']} utterances {100 * found['file']:.1f} %,"
            f" the model's {100 * found['model']:.1f} %"
        )
    return text


if __name__ == "__main__":
    run(main)
