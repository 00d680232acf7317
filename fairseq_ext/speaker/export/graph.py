"""From a speaker network to an ONNX graph: of the network, of the features before it, and of both."""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ext_common.cli import UserError
from fairseq_ext.speaker.export.exported import INPUTS, KEY, Description
from fairseq_ext.speaker.export.frontend import mel_bands, windowed_dft
from fairseq_ext.speaker.features import FeatureSpec

# onnxruntime reads it since 1.14, of 2023
OPSET = 18
EXTRA = "speaker.export needs onnx and onnxscript: pip install 'fairseq-ext[onnx]'"


class Scorer(nn.Module):
    """Features (B, T, F) and lengths int64 (B,) → embedding (B, D) and scores (B, C)."""

    def __init__(self, network: nn.Module, log_probability: bool):
        super().__init__()
        self.network, self.log_probability = network, log_probability

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.arange(features.shape[1])[None] >= lengths[:, None]
        found = self.network(features, mask)
        scores = found["logits"]
        return found["embedding"], scores.log_softmax(1) if self.log_probability else scores


class FrontEnd(nn.Module):
    """Samples (B, N) and their numbers int64 (B,) → log-mel features (B, T, F) and frames int64 (B,).

    `features.log_mel` of each row, the Fourier transform as a convolution (onnxruntime's own is some
    hundred times slower than torch's). Silence and loudness are not dealt with; what a row holds behind its
    samples does not matter.
    """

    def __init__(self, spec: FeatureSpec):
        super().__init__()
        self.hop, self.n_fft, self.floor = spec.hop_length, spec.n_fft, spec.floor
        self.bins = spec.n_fft // 2 + 1
        self.filters: Tensor
        self.bands: Tensor
        self.register_buffer("filters", torch.from_numpy(windowed_dft(spec)).float()[:, None])
        self.register_buffer("bands", torch.from_numpy(mel_bands(spec)).float())

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        half = self.n_fft // 2
        behind = torch.arange(waveform.shape[1])[None] >= lengths[:, None]
        x = F.pad(waveform.masked_fill(behind, 0), (0, half + 1))
        # each row is reflected at its own ends, whose places depend on its length
        last = lengths.clamp(min=half + 1)[:, None] - 1
        total = waveform.shape[1] // self.hop * self.hop + self.n_fft
        places = (torch.arange(total) - half).abs()[None]
        places = (last - (last - places).abs()).clamp(min=0)
        framed = F.conv1d(x.gather(1, places)[:, None], self.filters, stride=self.hop)
        power = framed[:, : self.bins].square() + framed[:, self.bins :].square()
        energies = power.transpose(1, 2) @ self.bands
        return energies.clamp(min=self.floor).log(), 1 + lengths // self.hop


def scorer_graph(scorer: Scorer, n_mels: int) -> Any:
    """The ONNX model of a `Scorer`, batch and time dynamic."""
    example = torch.randn(2, 37, n_mels), torch.tensor([37, 20])
    names = [INPUTS["outside"], "lengths"], ["embedding", "scores"]
    return exported(scorer.eval(), example, *names)


def front_graph(spec: FeatureSpec) -> Any:
    """The ONNX model of a `FrontEnd`."""
    example = torch.randn(2, 37 * spec.hop_length), torch.tensor([37, 20]) * spec.hop_length
    names = [INPUTS["inside"], "lengths"], ["features", "frames"]
    return exported(FrontEnd(spec).eval(), example, *names)


def exported(
    module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]
) -> Any:
    """torch's exporter, with the first two dimensions of the first input and the first of others dynamic."""
    import_onnx()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    shapes = [{0: batch, 1: time}, *({0: batch} for _ in example[1:])]
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0]
        raise UserError(
            f"torch's exporter cannot make a graph of this network ({type(cause).__name__}: {reason}): a part"
            " of a plugin that looks at values or sizes asks torch.compiler.is_exporting()"
        ) from error
    assert program is not None
    return program.model_proto


def joined(front: Any, scorer: Any) -> Any:
    """One ONNX model of samples: the features that `front` makes go into `scorer`."""
    from onnx import compose

    front = compose.add_prefix(front, "front_", rename_inputs=False, rename_outputs=True)
    ends = [("front_features", "features"), ("front_frames", "lengths")]
    scorer = compose.add_prefix(scorer, "", rename_nodes=False, rename_inputs=True)
    return compose.merge_models(front, scorer, io_map=ends)


def in_integers(model: Any) -> Any:
    """The model with the constant matrices of its products in int8, scaled as they are run (dynamic).

    Convolutions stay in float32: onnxruntime's integer ones are slower.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        before, after = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, before)
        quantize_dynamic(
            before, after, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8
        )
        return onnx.load(after)


def to_bytes(model: Any, description: Description) -> bytes:
    """The file, checked by onnx, with the description as metadata."""
    import onnx

    # torch notes for each node where in which file of this machine it comes from
    for one in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.value_info,
    ):
        del one.metadata_props[:]
        one.doc_string = ""
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, description.to_json()
    model.producer_name = "fairseq_ext.speaker.export"
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporter and quantiser log of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as nothing:
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(nothing):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def import_onnx() -> None:
    """UserError with the remedy where what the exporter needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError(EXTRA) from None
