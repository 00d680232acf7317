"""`--arch transformer_compact`: fairseq's Transformer made to learn fast where there are minutes."""

from dataclasses import fields
from typing import Any

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModel,
    base_architecture,
)
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import nn

from ext_common.cli import UserError
from ext_common.muon import mark_hidden, quickest
from fairseq_ext.translation.compact import CompactAttention, CompactOptions, squared_relu

# Of what the embeddings are compared with before anything is learned.
FIRST_SCALE = 0.25


@register_model("transformer_compact")
class CompactTransformer(TransformerModel):
    """fairseq's Transformer with the parts of `CompactOptions`; with none of them it is fairseq's."""

    def __init__(self, args: Any, encoder: Any, decoder: Any):
        super().__init__(args, encoder, decoder)
        mark_hidden(encoder.layers)
        mark_hidden(decoder.layers)
        on_cpu = quickest(torch.device("cpu")) is torch.bfloat16
        self.bf16_matrices = on_cpu and not options_of(self.cfg).no_bf16_matrices

    @classmethod
    def add_args(cls, parser: Any) -> None:
        super().add_args(parser)
        gen_parser_from_dataclass(parser, CompactOptions(), delete_default=True)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        options = options_of(args)
        cfg = TransformerConfig.from_namespace(args)
        if cfg.quant_noise.pq or cfg.cross_self_attention:
            raise UserError(
                "--arch transformer_compact knows neither --quant-noise-pq nor --cross-self-attention: leave"
                " them out, or give --arch transformer"
            )
        for name, value in vars(options).items():
            setattr(cfg, name, value)
        cfg.no_token_positional_embeddings |= not options.no_rotary
        return super().build_model(cfg, task)

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: Any) -> "CompactEncoder":
        return CompactEncoder(args, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args: Any, tgt_dict: Any, embed_tokens: Any) -> "CompactDecoder":
        return CompactDecoder(args, tgt_dict, embed_tokens)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quick = self.training and self.bf16_matrices
        with torch.autocast("cpu", torch.bfloat16, enabled=quick):
            return super().forward(*args, **kwargs)


class CompactEncoder(TransformerEncoderBase):
    def build_encoder_layer(self, cfg: Any) -> "CompactEncoderLayer":
        return CompactEncoderLayer(cfg)


class CompactDecoder(TransformerDecoderBase):
    # keys and values of the source are computed once, so that its rows need no new order
    keeps_source = True

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any):
        super().__init__(cfg, *args, **kwargs)
        if self.layer_norm is not None and not options_of(cfg).no_zero_outputs:
            # nothing is added to the embeddings yet, and tied ones would say the last piece again
            nn.init.constant_(self.layer_norm.weight, FIRST_SCALE)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> "CompactDecoderLayer":
        return CompactDecoderLayer(cfg, no_encoder_attn)


class CompactEncoderLayer(TransformerEncoderLayerBase):
    def __init__(self, cfg: Any):
        super().__init__(cfg)
        change(self, options_of(cfg))

    def build_self_attention(self, embed_dim: int, cfg: Any) -> CompactAttention:
        heads = cfg.encoder.attention_heads
        return attention(cfg, embed_dim, heads, causal=False, self_attention=True)


class CompactDecoderLayer(TransformerDecoderLayerBase):
    def __init__(self, cfg: Any, no_encoder_attn: bool = False):
        super().__init__(cfg, no_encoder_attn)
        change(self, options_of(cfg))

    def build_self_attention(
        self, embed_dim: int, cfg: Any, *_: Any, **__: Any
    ) -> CompactAttention:
        heads = cfg.decoder.attention_heads
        return attention(cfg, embed_dim, heads, causal=True, self_attention=True)

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> CompactAttention:
        heads, source = cfg.decoder.attention_heads, cfg.encoder.embed_dim
        return attention(
            cfg,
            embed_dim,
            heads,
            causal=False,
            kdim=source,
            vdim=source,
            encoder_decoder_attention=True,
        )


def attention(cfg: Any, width: int, heads: int, causal: bool, **kind: Any) -> CompactAttention:
    return CompactAttention(
        options_of(cfg), causal, width, heads, dropout=cfg.attention_dropout, **kind
    )


def change(layer: nn.Module, options: CompactOptions) -> None:
    """The parts of a layer that are not its attention."""
    if not options.no_squared_relu:
        layer.activation_fn = squared_relu
    if not options.no_zero_outputs:
        attentions = [m for m in layer.children() if isinstance(m, CompactAttention)]
        for last in [*(m.out_proj for m in attentions), layer.fc2]:
            nn.init.zeros_(last.weight)


def options_of(cfg: Any) -> CompactOptions:
    """Those in a model's options; its defaults where one is not said."""
    said = {f.name: getattr(cfg, f.name, f.default) for f in fields(CompactOptions)}
    return CompactOptions(**said)


@register_model_architecture("transformer_compact", "transformer_compact")
def compact_architecture(args: Any) -> None:
    """2 + 2 layers of width 192, normalised before."""
    for f in fields(CompactOptions):
        setattr(args, f.name, getattr(args, f.name, f.default))
    for side in ("encoder", "decoder"):
        for name, value in SIZES.items():
            key = f"{side}_{name}"
            setattr(args, key, getattr(args, key, value))
    base_architecture(args)


SIZES = {
    "layers": 2,
    "embed_dim": 192,
    "ffn_embed_dim": 384,
    "attention_heads": 4,
    "normalize_before": True,
}
