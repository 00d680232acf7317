"""A speaker network in a file that `speaker.export` wrote, run by onnxruntime; torch is not imported.

The metadata of the file has under `KEY`, as JSON, what `Description` has.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ext_common.cli import UserError
from ext_common.packed import Pack, is_pack
from fairseq_ext.speaker.export.frontend import PlainSpec, WaveformSpec
from fairseq_ext.speaker.features import FeatureSpec

ENDING = ".onnx"
# what it is called in a pack
PACKED = "model.onnx"
KEY = "fairseq_ext.speaker"
VERSION = 1
INPUTS = {"inside": "waveform", "outside": "features"}
_REMEDY = "give a file that fairseq_ext.speaker.export wrote, or a checkpoint"


@dataclass(frozen=True)
class Description:
    """What the file says of its network.

    features: "inside" where it takes samples, "outside" where it takes features made by `spec`.
    score_kind: as of `SpeakerModel`. weights: how they are stored, "float32" or "int8".
    sha256: of the checkpoint's model, see `SpeakerModel.sha256`. backend: the bytes of a backend of
    `speaker.verify`, in base 64, or "". scale: as of `SpeakerModel.probabilities`.
    """

    speakers: tuple[str, ...]
    spec: dict[str, Any]
    features: str
    score_kind: str
    weights: str
    sha256: str
    backend: str = ""
    scale: float | None = None
    version: int = VERSION

    @property
    def model_sha256(self) -> str:
        """`SpeakerModel.sha256` of the file: in float32 its embeddings are the checkpoint's."""
        if self.weights == "float32":
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.weights}".encode()).hexdigest()

    def to_json(self) -> str:
        """The reverse of from_json."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """ValueError, KeyError or TypeError where it is none."""
        values = json.loads(text)
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}, this program reads {VERSION}")
        return cls(**{**values, "speakers": tuple(values["speakers"])})


class ExportedNetwork:
    """Utterances → embeddings and scores. Utterances are what `spec.features` makes of samples."""

    def __init__(self, model: bytes | str | os.PathLike[str], name: str | None = None):
        """model: the file or its bytes; name: how errors call the latter. UserError where it is none."""
        runtime = import_runtime()
        name = os.fspath(model) if name is None and not isinstance(model, bytes) else str(name)
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise UserError(f"{name} does not exist: {_REMEDY}")
        source = model if isinstance(model, bytes) else os.fspath(model)
        try:
            self._session = runtime.InferenceSession(
                source, session_options(runtime), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no common base
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{name} cannot be read by onnxruntime ({reason}): {_REMEDY}") from None
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise UserError(f"{name} does not say what it is (no metadata {KEY}): {_REMEDY}")
        try:
            self.description = Description.from_json(text)
            made = WaveformSpec if self.inside else PlainSpec
            self.spec: FeatureSpec = made.from_dict(self.description.spec)
        except (ValueError, KeyError, TypeError, UserError) as error:
            raise UserError(f"{name} has unreadable metadata ({error}): {_REMEDY}") from None
        self.name, self._source = name, source

    def __reduce__(self) -> tuple[Any, ...]:
        # a session cannot be pickled, what it was made of can
        return type(self), (self._source, self.name)

    @property
    def inside(self) -> bool:
        """Whether it makes the features itself."""
        return self.description.features == "inside"

    @property
    def backend(self) -> io.BytesIO | None:
        """The backend of `speaker.verify` that was exported along, as a file."""
        text = self.description.backend
        return io.BytesIO(base64.b64decode(text)) if text else None

    def samples(self, utterance: np.ndarray) -> np.ndarray:
        """The utterance of a network that makes the features itself; UserError for features."""
        if utterance.ndim != 1 or not len(utterance):
            raise UserError(
                f"{self.name} takes recordings and no prepared features: export it with --features outside"
            )
        return utterance

    def frames(self, utterance: np.ndarray) -> int:
        """Frames of an utterance."""
        return 1 + len(utterance) // self.spec.hop_length if self.inside else len(utterance)

    def __call__(self, utterances: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Utterances float32 (T, n_mels) or (n,), side by side → embedding (B, D), scores (B, C) float32."""
        lengths = np.array([len(one) for one in utterances], dtype=np.int64)
        source = np.zeros((len(lengths), lengths.max(), *utterances[0].shape[1:]), dtype=np.float32)
        for row, one in zip(source, utterances, strict=True):
            row[: len(one)] = one
        given = {INPUTS[self.description.features]: source, "lengths": lengths}
        embedding, scores = self._session.run(["embedding", "scores"], given)
        return {"embedding": embedding, "scores": scores}


def exported_in(path: str | os.PathLike[str]) -> ExportedNetwork | None:
    """The network of such a file, or of the one in a pack where torch is not installed; else None."""
    if os.fspath(path).endswith(ENDING):
        return ExportedNetwork(path)
    if find_spec("torch") is None and is_pack(path):
        return ExportedNetwork(Pack(path).read(PACKED), os.fspath(path))
    return None


def session_options(runtime: Any) -> Any:
    """As many threads as OpenMP would have, which do not spin while they wait."""
    options = runtime.SessionOptions()
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    options.intra_op_num_threads = int(given) if given.isdigit() else 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def import_runtime() -> Any:
    """onnxruntime, or a sentence on how to get it."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "an .onnx file needs the package onnxruntime: pip install 'fairseq-ext[onnx]'"
        ) from None
    return onnxruntime
