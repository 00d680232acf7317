"""Where a model looks: its attention over the source, piece by piece, as a picture.

python -m fairseq_ext.translation.attention OUT.png --path CKPT --source "It is raining."
python -m fairseq_ext.translation.attention OUT.png --path CKPT --source "It is raining." --target "下雨了。"
"""

import inspect
import io
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import atomic_write
from fairseq_ext.translation.decode.checkpoint import (
    Vocabulary,
    build_model,
    read_state,
    vocabulary_of,
)
from fairseq_ext.translation.decode.translator import Translator
from fairseq_ext.translation.fonts import fonts_for
from fairseq_ext.translation.text.normalise import normalise

EPILOG = """
A row is a piece of the target, a column a piece of the source ("▁" is a space, </s> the end), and the
shade how much the model looked at it when it wrote the row: the mean over the heads of one decoder
layer, each row adding up to 1. Without --target the rows are the model's own translation.

Pieces that no installed font can draw are numbered, and the screen says which is which; a picture
named OUT.svg leaves the letters to the viewer's fonts.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""
_FORMATS = ("png", "svg", "pdf")
_CELL = 0.3  # inches
_LARGEST = 30.0


@dataclass
class AttentionOptions:
    """Options of `attention`."""

    path: str = field(metadata={"help": "checkpoint that fairseq-train wrote"})
    source: str = field(metadata={"help": "sentence in the source language"})
    target: Optional[str] = field(
        default=None, metadata={"help": "its translation; none: the model's own (beam 5)"}
    )
    layer: Optional[int] = field(
        default=None, metadata={"help": "decoder layer, counted from 1; none: the last"}
    )
    user_dir: Optional[str] = field(
        default=None,
        metadata={"help": "plugin with the model's parts; none: the one it was trained with"},
    )

    def __post_init__(self):
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"--layer counts from 1, got {self.layer}")


@dataclass(frozen=True)
class Attention:
    """weights: float32 (target pieces, source pieces), each row adds up to 1."""

    source: list[str]
    target: list[str]
    weights: np.ndarray
    title: str


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.translation.attention", description=__doc__, epilog=EPILOG
    )
    parser.add_argument("out", metavar="OUT.png", help="picture to write: png, svg or pdf")
    add_dataclass(parser, AttentionOptions)
    args = parser.parse_args(argv)
    options = from_args(AttentionOptions, args)
    if Path(args.out).suffix[1:].lower() not in _FORMATS:
        raise UsageError(f"{args.out} must end in .{', .'.join(_FORMATS)}")
    target = options.target
    if target is None:
        # A model of its own: decoding changes it for speed, and then it has no attention to give.
        translate = Translator.from_checkpoint([options.path], user_dir=options.user_dir)
        (target,) = translate([options.source])
        print(f"translation: {target}")
    state = read_state(options.path)
    vocabulary = vocabulary_of(state, options.path)
    model = build_model(state, options.path, options.user_dir)
    found = attention(model, vocabulary, options.source, target, options.layer)
    for line in draw(found, args.out):
        print(line)
    print(f"wrote {args.out}", file=sys.stderr)


def attention(
    model: Any, vocabulary: Vocabulary, source: str, target: str, layer: Optional[int] = None
) -> Attention:
    """Attention of a fairseq model while it is made to write `target` for `source`.

    model: in evaluation mode, as `build_model` gives it. layer: of a Transformer, from 1; None:
    the last. Of an empty target there is the row of `</s>`. Raises UserError for an empty source,
    a text longer than the model can hold, a layer that is not there, and a model without attention.
    """
    import torch

    from fairseq_ext.translation.text.spm import EOS

    ids = {
        "source": vocabulary.encode(vocabulary.clean(source)),
        "target": [
            *vocabulary.target.encode(
                normalise(target, vocabulary.target_lang, vocabulary.convention).strip()
            ),
            EOS,
        ],
    }
    if len(ids["source"]) < 2:
        raise UserError("the source is empty: there is nothing to look at")
    for name, part in (("source", model.encoder), ("target", model.decoder)):
        if len(ids[name]) > part.max_positions():
            raise UserError(
                f"the {name} has {len(ids[name])} pieces, the model holds {part.max_positions()}: "
                "give a shorter sentence"
            )
    chosen, title = choose_layer(model, layer)
    tokens = torch.tensor([ids["source"]])
    # The decoder is shown the target shifted by one: fairseq starts it with </s>.
    shown = torch.tensor([[EOS, *ids["target"][:-1]]])
    with torch.inference_mode():
        encoded = model.encoder(tokens, src_lengths=torch.tensor([tokens.size(1)]))
        _, extra = model.decoder(shown, encoder_out=encoded, **chosen)
    # Transformers give a dict with a list, the LSTM the tensor itself.
    weights = extra.get("attn") if isinstance(extra, dict) else extra
    weights = weights[0] if isinstance(weights, list | tuple) and weights else weights
    if weights is None:
        raise UserError(f"{type(model).__name__} gives no attention to draw")
    return Attention(
        source=vocabulary.source.pieces(ids["source"]),
        target=vocabulary.target.pieces(ids["target"]),
        weights=weights[0].float().numpy(),
        title=title,
    )


def choose_layer(model: Any, layer: Optional[int]) -> tuple[dict[str, int], str]:
    """(keyword arguments of the decoder, title of the picture)."""
    layers = getattr(model.decoder, "layers", None)
    if "alignment_layer" not in inspect.signature(model.decoder.forward).parameters:
        if layer not in (None, 1):
            raise UserError(f"{type(model).__name__} has one attention: leave --layer out")
        return {}, "attention"
    layer = len(layers) if layer is None else layer
    if layer > len(layers):
        raise UserError(f"the decoder has {len(layers)} layers: there is no --layer {layer}")
    return {"alignment_layer": layer - 1}, f"attention, decoder layer {layer} of {len(layers)}"


def draw(found: Attention, out: str) -> list[str]:
    """Write the picture; returns what must be said about its labels."""
    import matplotlib
    from matplotlib.figure import Figure

    kind = Path(out).suffix[1:].lower()
    families, missing = fonts_for("".join([*found.source, *found.target]))
    if kind == "svg":
        # The viewer draws the text itself, with fonts of its own.
        families, missing = [*families, "sans-serif"], frozenset()
    columns, rows, legend = labels(found, missing)
    style = {
        "font.family": families,
        "font.size": 10,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fairseq_ext",
    }
    with matplotlib.rc_context(style):
        size = (_CELL * len(columns) + 2.2, _CELL * len(rows) + 2.0)
        figure = Figure(
            figsize=[min(max(side, 3.2), _LARGEST) for side in size], layout="constrained"
        )
        axis = figure.subplots()
        image = axis.imshow(found.weights, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        axis.set_xticks(
            range(len(columns)), columns, rotation=60, ha="left", rotation_mode="anchor"
        )
        axis.set_yticks(range(len(rows)), rows)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.set_ylabel("target")
        axis.set_xlabel("source")
        axis.xaxis.set_label_position("top")
        figure.suptitle(found.title, fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.6, aspect=25, pad=0.02)
        if legend:
            figure.supxlabel("numbers: pieces that no installed font can draw", fontsize=8)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        with warnings.catch_warnings():
            # Only of an svg, whose text is not drawn here.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    with atomic_write(out, "wb") as file:
        file.write(buffer.getvalue())
    if not legend:
        return []
    return [
        f"no installed font has {len(missing)} of the characters (fonts-noto-cjk has them; or name "
        f"the picture {Path(out).with_suffix('.svg').name}): their pieces are numbered",
        *legend,
    ]


def labels(found: Attention, missing: frozenset[str]) -> tuple[list[str], list[str], list[str]]:
    """Labels of columns and rows, pieces with `missing` characters by number; and which is which."""
    legend = []

    def side(pieces: list[str], prefix: str) -> list[str]:
        shown = []
        for number, piece in enumerate(pieces, 1):
            if missing.isdisjoint(piece):
                shown.append(piece)
            else:
                shown.append(f"{prefix}{number}")
                legend.append(f"  {prefix}{number:<4} {piece}")
        return shown

    columns, rows = side(found.source, "s"), side(found.target, "t")
    return columns, rows, legend


if __name__ == "__main__":
    run(main)
