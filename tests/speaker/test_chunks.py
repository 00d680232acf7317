"""A long recording in windows: every frame once, and what the whole would have given."""

import numpy as np
import pytest
import torch

from fairseq_ext.speaker import inference
from fairseq_ext.speaker.inference.chunks import forward_long, frame_weights, windows
from fairseq_ext.speaker.network import NamedNetwork, NetworkOptions, SpeakerNetwork
from fairseq_ext.speaker.pooling import POOLINGS, MeanPooling

MELS = 8


def network_of(**changes):
    torch.manual_seed(3)
    options = dict(d_model=16, nhead=2, d_ffn=32, layers=1, kernel_size=7, embedding_dim=6)
    found = SpeakerNetwork(NetworkOptions(**(options | changes)), MELS, 5).eval()
    found.feature_mean.normal_(), found.feature_std.uniform_(0.5, 2)
    return found


def features(frames, seed=0):
    return torch.randn(frames, MELS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("chunk", [12, 60, 400])
def test_windows_count_every_frame_once_and_are_bounded(chunk, step):
    for frames in [*range(1, 3 * chunk + 2), 10 * chunk + 7]:
        found = windows(frames, chunk, step)
        counted = [t for w in found for t in range(w.first, w.last)]
        assert counted == list(range(frames))
        for w in found:
            assert 0 <= w.start <= w.first < w.last <= w.end <= frames
            assert w.end - w.start <= chunk and w.start % step == 0 and w.first % step == 0
            # what counts is not at the edge of what is seen, but at the ends of the recording
            for inner, edge, end in ((w.first, w.start, 0), (w.last, w.end, frames)):
                assert inner == end or abs(inner - edge) >= min(100, chunk // 4) - 2 * step
    assert len(windows(chunk - chunk % step + 1, chunk, step)) == 2


@pytest.mark.parametrize("name", POOLINGS.names())
def test_statistics_of_parts_merge_to_those_of_the_whole(name):
    torch.manual_seed(0)
    pooling = POOLINGS.build(name, 8).double().eval()
    x = 3 * torch.randn(2, 50, 8, dtype=torch.float64)
    torch.testing.assert_close(pooling.pooled(pooling.statistics(x)), pooling(x))
    if name == "self_attention":
        return  # what is attended to ends with the part
    merged = pooling.statistics(x[:, :7])
    for part in (x[:, 7:8], x[:, 8:]):
        merged = merged.merge(pooling.statistics(part))
    torch.testing.assert_close(pooling.pooled(merged), pooling(x))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"front_end": "linear", "frame_stack": 3, "feature_norm": "utterance"},
        {"feature_norm": "none", "pooled_layers": "last", "layers": 2},
    ],
)
@pytest.mark.parametrize("frames", [40, 41, 47, 333])
def test_where_frames_are_independent_windows_change_nothing(changes, frames, monkeypatch):
    """Without attention and convolution over time what is pooled is what the whole would have."""
    network = network_of(**changes)
    for block in network.encoder.blocks:
        monkeypatch.setattr(block.attention, "forward", lambda x, mask=None: torch.zeros_like(x))
        monkeypatch.setattr(block.convolution, "forward", lambda x, mask=None: torch.zeros_like(x))
    x = features(frames)
    with torch.inference_mode():
        whole = network(x[None])
        for model in (network, NamedNetwork(network)):
            found = forward_long(model, x, chunk=40)
            for key in ("embedding", "logits"):
                torch.testing.assert_close(found[key], whole[key], rtol=1e-4, atol=1e-4)


def test_what_fits_is_whole_and_a_frame_more_is_hardly_different():
    network = network_of(layers=2)
    with torch.inference_mode():
        x = features(401)
        assert torch.equal(
            forward_long(network, x[:400], 400)["embedding"], network(x[None, :400])["embedding"]
        )
        near = torch.cosine_similarity(
            forward_long(network, x, 400)["embedding"], network(x[None])["embedding"]
        )
    assert near > 0.999


@pytest.mark.parametrize("front", [{}, {"front_end": "linear", "frame_stack": 3}])
@pytest.mark.parametrize("frames", [40, 41, 333])
def test_weights_of_frames_are_those_they_are_pooled_with(front, frames, monkeypatch):
    """With one learned query what is pooled is Σ weight · frame, also over windows."""
    network = network_of(pooling="self_attentive", **front)
    for block in network.encoder.blocks:
        monkeypatch.setattr(block.attention, "forward", lambda x, mask=None: torch.zeros_like(x))
        monkeypatch.setattr(block.convolution, "forward", lambda x, mask=None: torch.zeros_like(x))
    with torch.inference_mode():
        x = features(frames)
        normal = (x - network.feature_mean) / network.feature_std
        inner, _ = network.frames(normal[None])
        weights = frame_weights(NamedNetwork(network), x, chunk=40)
        owner = torch.arange(frames) // network.step
        pooled = (weights[:, None] * inner[0, owner]).sum(0)
        torch.testing.assert_close(pooled, network.pooling(inner)[0], rtol=1e-4, atol=1e-5)
    assert weights.std() > 1e-3 / frames


def test_a_pooling_without_attention_has_no_weights_of_frames():
    for changes in ({"pooling": "mean"}, {"pooling": "statistics"}):
        assert frame_weights(network_of(**changes), features(9)) is None
    assert frame_weights(torch.nn.Linear(MELS, 2), features(9)) is None


class Median(MeanPooling):
    """A pooling that does not say how it is put together."""

    statistics = None

    def forward(self, x, padding_mask=None):
        return x.median(1).values


def test_other_poolings_and_networks_are_averaged_by_length():
    network = network_of(front_end="linear", pooling="mean")
    network.pooling = Median(network.pooling.output_dim)
    x = features(100)
    with torch.inference_mode():
        found = forward_long(network, x, 60)["embedding"]
        parts = []
        for w in windows(100, 60):
            seen, _ = network.frames(
                (x[None, w.start : w.end] - network.feature_mean) / network.feature_std
            )
            kept = seen[:, w.first - w.start : w.last - w.start]
            parts.append((w.last - w.first) / 100 * network.embed(network.pooling(kept)))
        torch.testing.assert_close(found, sum(parts))

    class Foreign(torch.nn.Module):
        def forward(self, x, mask):
            return {"embedding": x.mean(1), "logits": 2 * x.mean(1)}

    got = forward_long(Foreign(), x, 30)
    torch.testing.assert_close(got["embedding"], x.mean(0, keepdim=True))
    torch.testing.assert_close(got["logits"], 2 * x.mean(0, keepdim=True))


def test_a_model_never_sees_more_than_a_window(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(inference, "CHUNK_FRAMES", 50)
    monkeypatch.setattr(forward_long, "__defaults__", (50, "cpu"))
    model = inference.SpeakerModel.from_checkpoint(tiny_checkpoint)
    seen = []
    inner = model.network.network
    frames = inner.frames
    monkeypatch.setattr(inner, "frames", lambda x, m=None: seen.append(x.shape[1]) or frames(x, m))
    rng = np.random.default_rng(0)
    long = [rng.normal(-6, 2, (n, 40)).astype(np.float32) for n in (500, 20, 50, 51)]
    found = model.embed(long, max_frames=1000)
    assert max(seen) <= 50 and len(seen) > 12
    for row, x in zip(found, long, strict=True):
        np.testing.assert_allclose(row, model.embed([x])[0], rtol=1e-4, atol=1e-5)
