"""What is compared: our network, torchaudio's Conformer in it, SpeechBrain's ECAPA-TDNN."""

from dataclasses import asdict

import torch
import torchaudio
from torch import nn

from fairseq_ext.speaker.margins import am_softmax
from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork

N_MELS, SPEAKERS = 40, 251
# what torchaudio's Conformer has: dropout on attention weights too, and BatchNorm
SAME_SIZE = NetworkOptions(
    d_model=80,
    nhead=2,
    d_ffn=256,
    layers=2,
    kernel_size=31,
    dropout=0.1,
    attention_dropout=0.1,
    conv_norm="batch",
    front_end="linear",
    pooled_layers="last",
    embedding_dim=128,
)


class TorchaudioEncoder(nn.Module):
    """`torchaudio.models.Conformer` with the call of our encoders."""

    def __init__(self, o: NetworkOptions):
        super().__init__()
        self.conformer = torchaudio.models.Conformer(
            o.d_model, o.nhead, o.d_ffn, o.layers, o.kernel_size, o.dropout
        )

    def forward(self, x, padding_mask=None):
        if padding_mask is None:
            lengths = torch.full((len(x),), x.shape[1])
        else:
            lengths = (~padding_mask).sum(1)
        return [self.conformer(x, lengths)[0]]


def our_network(options: NetworkOptions = SAME_SIZE) -> SpeakerNetwork:
    torch.manual_seed(1)
    return SpeakerNetwork(options, N_MELS, SPEAKERS)


def torchaudio_network(options: NetworkOptions = SAME_SIZE) -> SpeakerNetwork:
    """The same input layer, pooling and head around torchaudio's encoder."""
    torch.manual_seed(1)
    network = SpeakerNetwork(options, N_MELS, SPEAKERS)
    network.encoder = TorchaudioEncoder(options)
    return network


def ecapa_network(parameters: int):
    """SpeechBrain's ECAPA-TDNN in the width nearest to `parameters`; None where it is missing."""
    try:
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    except ImportError:
        return None

    def build(width):
        return ECAPA_TDNN(
            N_MELS,
            lin_neurons=128,
            channels=[width, width, width, width, 3 * width],
            attention_channels=64,
            se_channels=64,
        )

    width = min(range(32, 513, 8), key=lambda w: abs(count(build(w)) - parameters))
    torch.manual_seed(1)
    return build(width)


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def encoder_parameters(network: SpeakerNetwork) -> int:
    """Parameters of what makes an embedding: all but the class weights."""
    return count(network) - count(network.head)


def training_step(network: SpeakerNetwork, source, target):
    """A function that does one update of `network` on the batch and returns its utterances."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network.train()

    def step() -> int:
        loss = am_softmax(network(source)["logits"], target, s=30.0, m=0.2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return len(source)

    return step


def copy_weights(peer: SpeakerNetwork, ours: SpeakerNetwork) -> None:
    """Give ours the weights of the network around torchaudio's encoder: each has its place."""
    state = peer.state_dict()
    renamed = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    for key, value in state.items():
        if key.startswith("encoder.") and not key.endswith("num_batches_tracked"):
            key = key.removeprefix("encoder.conformer.conformer_layers.")
            number, _, name = key.partition(".")
            for theirs, our in NAMES.items():
                if name.startswith(theirs):
                    name = our + name.removeprefix(theirs)
                    break
            place = f"encoder.blocks.{number}.{name}"
            renamed[place] = value.reshape(ours.state_dict()[place].shape)
    ours.load_state_dict(renamed)


NAMES = {
    "ffn1.sequential.0": "ffn1.norm",
    "ffn1.sequential.1": "ffn1.linear1",
    "ffn1.sequential.4": "ffn1.linear2",
    "ffn2.sequential.0": "ffn2.norm",
    "ffn2.sequential.1": "ffn2.linear1",
    "ffn2.sequential.4": "ffn2.linear2",
    "self_attn_layer_norm": "attention.norm",
    "self_attn.in_proj_": "attention.attention.in_proj.",
    "self_attn.out_proj": "attention.attention.out_proj",
    "conv_module.layer_norm": "convolution.norm_in",
    "conv_module.sequential.0": "convolution.pointwise1",
    "conv_module.sequential.2": "convolution.depthwise",
    "conv_module.sequential.3": "convolution.norm",
    "conv_module.sequential.5": "convolution.pointwise2",
    "final_layer_norm": "norm",
}


def describe(options: NetworkOptions) -> dict:
    """The options as JSON."""
    return asdict(options)
