"""From a fairseq Transformer to CTranslate2: what is supported, the weights, and the proof."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.converters import fairseq as weights
from ctranslate2.specs import common_spec, transformer_spec

from ext_common.cli import UserError
from ext_common.manifest import atomic_json, versions
from fairseq_ext.translation.decode.checkpoint import (
    Vocabulary,
    build_model,
    read_state,
    vocabulary_of,
    with_ema,
)
from fairseq_ext.translation.decode.ctranslate_backend import (
    DESCRIPTION,
    VERSION,
    CTranslate2Backend,
    tokens,
)
from fairseq_ext.translation.decode.options import Candidate, DecodeOptions
from fairseq_ext.translation.text.spm import BYTE_PIECES, EOS, PAD, SPECIALS

ACTIVATIONS = {
    "relu": common_spec.Activation.RELU,
    "gelu": common_spec.Activation.GELU,
    "gelu_accurate": common_spec.Activation.GELUTanh,
    "gelu_fast": common_spec.Activation.GELUTanh,
    "swish": common_spec.Activation.SWISH,
}
SAMPLES = 100
# Share of sample lines whose greedy output must be fairseq's; lower types are only reported.
LEAST_AGREEMENT = 0.99
# A bias that leaves a piece no chance, and still is a number in float16.
_NEVER = -1e4


def convert(
    checkpoint: Path,
    folder: Path,
    compute_type: str,
    digest: str,
    user_dir: str | None = None,
    ema: bool = False,
) -> str:
    """Write a checkpoint as a CTranslate2 model; returns a sentence about how well it agrees.

    UserError with all of the reasons where the model is not supported, and with figures where float32
    does not give fairseq's output.
    """
    import ctranslate2

    state = with_ema(read_state(checkpoint), checkpoint) if ema else read_state(checkpoint)
    vocabulary = vocabulary_of(state, checkpoint)
    model = build_model(state, checkpoint, user_dir)
    del state
    reasons = unsupported(model)
    if reasons:
        raise UserError(
            f"{checkpoint} cannot be converted for CTranslate2: {'; '.join(reasons)}:"
            " use --backend fairseq"
        )
    from fairseq_ext.translation.decode.decoder import FairseqBackend

    reference = FairseqBackend([model])
    positions = (reference.max_source, reference.max_target)
    sources = sample_sources(vocabulary, SAMPLES)
    expected = decode_greedily(reference, sources)
    # from here on the model is of no use: its weights are quantised in place
    spec = make_spec(model)
    spec.register_source_vocabulary(tokens(vocabulary.source.size))
    spec.register_target_vocabulary(tokens(vocabulary.target.size))
    spec.validate()
    spec.optimize(quantization=None if compute_type == "float32" else compute_type)
    spec.save(str(folder))
    for side, codec in (("source", vocabulary.source), ("target", vocabulary.target)):
        (folder / f"spm.{side}.model").write_bytes(codec.model)

    # checked on the CPU, which every machine has, in the nearest type it knows
    near = "int8" if compute_type.startswith("int8") else "float32"
    converted = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=near, intra_threads=1
    )
    backend = CTranslate2Backend(converted, positions, vocabulary.target.size)
    check = compare(expected, decode_greedily(backend, sources))
    if compute_type == "float32" and check.agreement < LEAST_AGREEMENT:
        raise UserError(
            f"{checkpoint} was converted for CTranslate2, but {check}: it is not used;"
            " use --backend fairseq"
        )
    write_description(folder, vocabulary, positions, digest, check)
    return f"converted: {check}"


def unsupported(model: Any) -> list[str]:
    """All of the reasons why CTranslate2 cannot run a fairseq model; none for one it can."""
    from fairseq.models import transformer as t

    parts = (getattr(model, "encoder", None), getattr(model, "decoder", None))
    known = (
        (t.TransformerEncoder, t.TransformerEncoderBase),
        (t.TransformerDecoder, t.TransformerDecoderBase),
    )
    kinds = [type(part) for part in parts]
    if any(kind not in allowed for kind, allowed in zip(kinds, known, strict=True)):
        names = " and ".join(kind.__name__ for kind in kinds)
        return [f"it is no Transformer of fairseq ({type(model).__name__} with {names})"]
    encoder, decoder = parts
    layers = [*encoder.layers, *decoder.layers]
    if not len(encoder.layers) or not len(decoder.layers):
        return ["it has an encoder or decoder without layers"]
    cfg = decoder.cfg
    heads = sorted({m.num_heads for m in model.modules() if hasattr(m, "num_heads")})
    dims = sorted({part.embed_tokens.embedding_dim for part in parts})
    pre_norm = {layer.normalize_before for layer in layers}
    checks = {
        f"its activation function is {cfg.activation_fn!r} (known: {', '.join(ACTIVATIONS)})": (
            cfg.activation_fn not in ACTIVATIONS
        ),
        f"its attention has different numbers of heads ({', '.join(map(str, heads))})": (
            len(heads) > 1
        ),
        f"encoder and decoder have different dimensions ({', '.join(map(str, dims))})": (
            len(dims) > 1
        ),
        "encoder and decoder normalise at different places (--encoder-normalize-before and"
        " --decoder-normalize-before differ)": len(pre_norm) > 1,
        "it has no positional embeddings": any(part.embed_positions is None for part in parts),
        "it has an adaptive softmax": decoder.adaptive_softmax is not None,
        "its decoder does not attend to the source, or attends to it with its own layers": (
            decoder.cross_self_attention
            or any(layer.encoder_attn is None for layer in decoder.layers)
        ),
        "its decoder has input or output projections": (
            decoder.project_in_dim is not None or decoder.project_out_dim is not None
        ),
        "its decoder has no final normalisation": (
            True in pre_norm and (decoder.layer_norm is None or encoder.layer_norm is None)
        ),
        "it has scaled attention or residuals (NormFormer)": any(
            getattr(layer, name, None) is not None
            for layer in layers
            for name in ("attn_ln", "ffn_layernorm", "c_attn", "w_resid")
        ),
        "its output has a base layer": any("BaseLayer" in type(layer).__name__ for layer in layers),
    }
    return [reason for reason, found in checks.items() if found]


def make_spec(model: Any) -> transformer_spec.TransformerSpec:
    """The specification of a supported model with its weights (the model must need no gradients)."""
    encoder, decoder = model.encoder, model.decoder
    layer = decoder.layers[0]
    spec = transformer_spec.TransformerSpec.from_config(
        (len(encoder.layers), len(decoder.layers)),
        layer.self_attn.num_heads,
        pre_norm=layer.normalize_before,
        activation=ACTIVATIONS[decoder.cfg.activation_fn],
        layernorm_embedding=decoder.layernorm_embedding is not None,
    )
    weights.set_transformer_encoder(spec.encoder, encoder)
    weights.set_transformer_decoder(spec.decoder, decoder)
    size = decoder.output_projection.weight.shape[0]
    # fairseq never chooses <pad>, whatever the model thinks of it
    spec.decoder.projection.bias = np.zeros(size, dtype=np.float32)
    spec.decoder.projection.bias[PAD] = _NEVER
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    return spec


@dataclass
class Check:
    """How far two backends agree on sample lines, decoded greedily."""

    lines: int
    same: int
    score_difference: float

    @property
    def agreement(self) -> float:
        return self.same / self.lines

    def __str__(self) -> str:
        return (
            f"greedy output is that of fairseq on {self.same} of {self.lines} sample lines, and there"
            f" scores differ by at most {self.score_difference:.2g}"
        )


def decode_greedily(backend: Any, sources: Sequence[tuple[int, ...]]) -> list[Candidate]:
    """The best target of each source."""
    options = DecodeOptions(beam=1, max_len_a=1, max_len_b=10)
    limit = options.limit(max(map(len, sources)), backend.max_target)
    return [best[0] for best in backend.decode(sources, options, limit)]


def compare(expected: Sequence[Candidate], found: Sequence[Candidate]) -> Check:
    """What a backend found beside what it should have."""
    same = [(a, b) for a, b in zip(expected, found, strict=True) if a.ids == b.ids]
    # where the end is forced, fairseq counts </s> and CTranslate2 the piece in its place
    differences = [abs(a.score - b.score) for a, b in same if not a.cut]
    return Check(len(expected), len(same), max(differences, default=0.0))


def sample_sources(vocabulary: Vocabulary, number: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Sources of 2 to 12 ordinary pieces, as likely as their rank says; ids with `</s>`."""
    draw = random.Random(seed)
    codec = vocabulary.source
    first = SPECIALS + BYTE_PIECES + len(codec.extra_symbols)
    pieces = range(first, codec.size) if codec.size > first else range(SPECIALS, codec.size)
    odds = [1 / (rank + 1) for rank in range(len(pieces))]
    return [(*draw.choices(pieces, odds, k=2 + n % 11), EOS) for n in range(number)]


def write_description(
    folder: Path, vocabulary: Vocabulary, positions: tuple[int, int], digest: str, check: Check
) -> None:
    """What the folder needs besides the weights; written last, it makes the folder whole."""
    description = {
        "version": VERSION,
        "checkpoint_sha256": digest,
        "positions": positions,
        "vocabulary": {
            "source_lang": vocabulary.source_lang,
            "target_lang": vocabulary.target_lang,
            "convention": vocabulary.convention,
            "lines": vocabulary.lines._asdict() if vocabulary.lines else None,
            "extra_symbols": vocabulary.source.extra_symbols,
        },
        "check": asdict(check),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "versions": versions(),
    }
    atomic_json(folder / DESCRIPTION, description)
