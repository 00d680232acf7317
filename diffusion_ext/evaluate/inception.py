"""Inception features through torch-fidelity: the one extractor whose Fréchet distance is called FID."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from ext_common.cli import UserError
from ext_common.manifest import sha256_file

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
# As torch.hub does, the author has put the first digits of the file's SHA-256 into its name.
DIGEST = "6726825d"


@dataclass
class InceptionOptions:
    """Options of inception."""

    weights: Optional[str] = field(
        default=None,
        metadata={"help": f"file of the weights, {WEIGHTS}; none: the one in torch.hub's cache"},
    )


class Inception(NamedTuple):
    """A loaded network; digest: hex SHA-256 of its file; genuine: whether it holds the original weights."""

    module: torch.nn.Module
    path: Path
    digest: str
    genuine: bool


def load_inception(weights: str | None) -> Inception:
    """The network with the weights in a file, or in torch.hub's cache; UserError where it cannot be had."""
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS)
    if not path.is_file():
        place = "is not there" if weights else "is not in torch.hub's cache"
        raise UserError(
            f"{path} {place}, and without Inception's weights no number here is called FID: download "
            f"{SOURCE} and give --extractor inception:weights=FILE, or use --extractor pca"
        )
    digest = sha256_file(path)
    return Inception(load_network(path), path, digest, digest.startswith(DIGEST))


def load_network(path: Path) -> torch.nn.Module:
    """torch-fidelity's network, giving the features "2048"; UserError where package or file fail."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            "--extractor inception needs torch-fidelity, which is not installed: pip install "
            "torch-fidelity"
        ) from None
    try:
        # torch-fidelity unpickles whatever the file says; only what loads as weights goes there.
        torch.load(path, map_location="cpu", weights_only=True)
        network: torch.nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
        return network
    # Unpickling a damaged or foreign file fails in many ways.
    except Exception as error:
        raise UserError(
            f"{path} holds no weights of torch-fidelity's Inception network: download {SOURCE} again"
        ) from error
