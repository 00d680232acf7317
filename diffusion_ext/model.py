"""The U-Net as a fairseq model: `--arch ddpm_unet`."""

import logging
from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import nn

from diffusion_ext.network import ARCH, AveragedUNet, NetworkOptions, check_options, options_of  # noqa: F401
from diffusion_ext.unet import padded
from ext_common.muon import mark_hidden

logger = logging.getLogger(__name__)


@dataclass
class DdpmUNetConfig(NetworkOptions, FairseqDataclass):
    pass


@register_model(ARCH, dataclass=DdpmUNetConfig)
class DdpmUNet(AveragedUNet, BaseFairseqModel):
    """An `AveragedUNet` with fairseq's interface."""

    @classmethod
    def build_model(cls, cfg, task):
        options = options_of(NetworkOptions, cfg)
        height = padded(task.spec["height"], options)
        heights = [height >> level for level in range(len(options.channel_mults))]
        attends = set(options.attention_resolutions) - {0}
        if attends and attends.isdisjoint(heights):
            logger.warning(
                f"--attention-resolutions {options.attention_resolutions} is none of the heights {heights} of"
                " this network: only its middle attends"
            )
        model = cls(options, task.spec)
        mark_hidden(model, leave=("conv_in", "condition", "conv_out"))
        return model

    def max_positions(self):
        return None


def unwrapped(model) -> nn.Module:
    """The model inside what fairseq wraps around it for several processes, which may be two layers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model
