"""transformer_compact: fairseq's Transformer where every part is off, and what each part must not change."""

import copy
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import build_model
from fairseq.sequence_generator import SequenceGenerator

import fairseq_ext  # noqa: F401
from ext_common.cli import UserError
from fairseq_ext.translation.compact import CompactAttention, CompactOptions, rotated
from fairseq_ext.translation.decode.decoder import FairseqBackend
from fairseq_ext.translation.decode.options import DecodeOptions

PAD, EOS = 1, 2
OFF = {name: True for name in vars(CompactOptions()) if name.startswith("no_")}
PARTS = ["no_rotary", "no_qk_norm", "no_neighbours"]


def words():
    dictionary = Dictionary()
    for number in range(24):
        dictionary.add_symbol(f"w{number}")
    return dictionary


def model(arch="transformer_compact", seed=1, **options):
    """A tiny model in which nothing is at the value it starts with."""
    torch.manual_seed(seed)
    sizes = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 24, "attention_heads": 2}
    sizes = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in sizes.items()}
    before = {"encoder_normalize_before": True, "decoder_normalize_before": True}
    args = Namespace(arch=arch, share_all_embeddings=True, dropout=0.0, **sizes, **before)
    vars(args).update(options)
    dictionary = words()
    made = build_model(
        args, SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    )
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def batch():
    """Three sources, padded left, and targets, padded right; the last of each is whole."""
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(4, 28, (3, 7), generator=generator)
    target = torch.randint(4, 28, (3, 5), generator=generator)
    source[0, :3], source[1, :1], target[:, 0], target[0, 4:] = PAD, PAD, EOS, PAD
    return source, source.ne(PAD).sum(1), target


@pytest.fixture(scope="module", params=[{}, *({part: True} for part in PARTS)], ids=str)
def one(request):
    return model(**request.param)


def test_with_all_parts_off_it_is_fairseqs(batch):
    ours, stock = model(**OFF), model("transformer_iwslt_de_en", seed=3)
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(*batch)[0], stock(*batch)[0], rtol=0, atol=1e-5)
    for m in (ours, stock):
        m.train()
    ours(*batch)[0].square().sum().backward()
    stock(*batch)[0].square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_later_targets_change_nothing_before_them(one, batch):
    """The gradient by what stands at and behind position 3 of what comes out before it is exactly 0."""
    source, lengths, target = batch
    written = one.decoder.embed_tokens(target).detach().requires_grad_()

    def embedded(_tokens):
        return written

    encoded = one.encoder(source, lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.decoder.embed_tokens, "forward", embedded)
        out = one.decoder(target, encoder_out=encoded)[0]
    (gradient,) = torch.autograd.grad(out[:, :3].square().sum(), written)
    assert not gradient[:, 3:].any()
    assert gradient[:, :3].abs().amin(dim=(0, 2)).gt(0).all()


def test_piece_by_piece_is_all_at_once(one, batch):
    source, lengths, target = batch
    whole, encoded, state = one(*batch)[0], one.encoder(source, lengths), {}
    pieces = [
        one.decoder(target[:, : n + 1], encoder_out=encoded, incremental_state=state)[0]
        for n in range(target.shape[1])
    ]
    kept = target.ne(PAD)
    torch.testing.assert_close(torch.cat(pieces, 1)[kept], whole[kept], rtol=0, atol=1e-5)


def test_a_sentence_alone_is_the_same_as_beside_longer_ones(one, batch):
    source, lengths, target = batch
    together = one(*batch)[0]
    alone = one(source[:1, 3:], lengths[:1], target[:1, :4])[0]
    torch.testing.assert_close(together[:1, :4], alone, rtol=0, atol=1e-5)


def test_both_decoders_and_a_search_without_a_cache_agree(one, batch):
    """fairseq's generator, ours with shared sources, and greedily one step after another."""
    source, lengths, _ = batch
    for beam in (1, 3):
        generator = SequenceGenerator(
            [one], words(), beam_size=beam, max_len_b=8, unk_penalty=float("inf")
        )
        theirs = generator.generate(
            [one], {"net_input": {"src_tokens": source, "src_lengths": lengths}}
        )
        backend = FairseqBackend([copy.deepcopy(one)])
        ids = [row[row.ne(PAD)].tolist() for row in source]
        ours = backend.decode(ids, DecodeOptions(beam=beam), 8)
        for a, b in zip(theirs, ours, strict=True):
            assert [t for t in a[0]["tokens"].tolist() if t != EOS] == b[0].ids
            assert float(a[0]["score"]) == pytest.approx(b[0].score, abs=1e-4)
        assert backend.models[0].decoder.layers[0].encoder_attn.beam_size == beam
    written = torch.full((1, 1), EOS)
    while written.shape[1] < 9 and (written.shape[1] == 1 or written[0, -1] != EOS):
        scores = one(source[:1], lengths[:1], written)[0][0, -1]
        scores[[0, PAD, 3]] = float("-inf")
        written = torch.cat([written, scores.argmax().view(1, 1)], 1)
    backend = FairseqBackend([copy.deepcopy(one)])
    greedy = backend.decode([source[0, 3:].tolist()], DecodeOptions(beam=1), 8)
    assert greedy[0][0].ids == [t for t in written[0, 1:].tolist() if t != EOS]


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="neither --quant-noise-pq nor"):
        model(cross_self_attention=True)


def test_rotation_keeps_lengths_and_sees_distances_alone():
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 10, dtype=torch.float64)
    q, k = q.expand(9, 10), k.expand(9, 10)
    torch.testing.assert_close(rotated(q).norm(dim=-1), q.norm(dim=-1))
    products = rotated(q) @ rotated(k).T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    # by hand: at position 1 the first pair of a width of 4 turns by 1, the second by 0.01
    turned = rotated(torch.tensor([[0.0] * 4, [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64))[1]
    angles = torch.tensor([1.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(turned, torch.cat([angles.cos(), angles.sin()]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_neighbours_are_a_depthwise_convolution(causal):
    attention = CompactAttention(CompactOptions(), causal, 4, 2, self_attention=True)
    torch.nn.init.normal_(attention.taps)
    x = torch.randn(6, 2, 12)
    made = attention._with_neighbours(x, None, {})
    weight = attention.taps.T.unsqueeze(1)
    padded = torch.nn.functional.pad(x.permute(1, 2, 0), (2, 0) if causal else (1, 1))
    expected = torch.nn.functional.conv1d(padded, weight, groups=12).permute(2, 0, 1)
    torch.testing.assert_close(made, expected)


def test_it_starts_as_the_embedding_and_in_bfloat16_it_is_about_the_same(batch):
    """Zero outputs add nothing; matrices in bfloat16 round, no more, and in training alone."""
    torch.manual_seed(1)
    one = model()
    for layer in (*one.encoder.layers, *one.decoder.layers):
        for last in (layer.self_attn.out_proj, layer.fc2):
            torch.nn.init.zeros_(last.weight), torch.nn.init.zeros_(last.bias)
    source, lengths, target = batch
    x = one.encoder.embed_tokens(source[2:]) * 4
    encoded = one.encoder(source[2:], lengths[2:])["encoder_out"][0].transpose(0, 1)
    torch.testing.assert_close(encoded, one.encoder.layer_norm(x))
    quick = model()
    exact = quick(*batch)[0]
    quick.bf16_matrices = True
    assert torch.equal(quick(*batch)[0], exact)
    rounded = quick.train()(*batch)[0]
    assert rounded.dtype is torch.bfloat16
    kept = target.ne(PAD)
    torch.testing.assert_close(rounded.float()[kept], exact[kept], rtol=0.1, atol=0.3)
