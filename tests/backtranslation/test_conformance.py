"""One tiny model on every backend: what is found, and with which score, must be the same.

Marian is fairseq's Transformer with other positions and names, so the weights of a fairseq checkpoint are put
into a MarianMTModel, together with fairseq's table of positions.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from fairseq_ext.translation.decode.options import DecodeOptions, SampleOptions, Source
from fairseq_ext.translation.decode.translator import Translator
from fairseq_ext.translation.text.spm import EOS, PAD, UNK

pytest.importorskip("transformers", reason="pip install -e '.[huggingface]'")
pytest.importorskip("ctranslate2", reason="pip install -e '.[ctranslate2]'")
# a model of its own is trained
pytestmark = pytest.mark.slow
_here = Path(__file__).parents[1] / "translation"
_confident = runpy.run_path(str(_here / "confident.py"))["confident"]
_toy = runpy.run_path(str(_here / "conftest.py"))


@pytest.fixture(scope="module")
def checkpoint(toy_data, tmp_path_factory):
    """Chinese to English, normalised behind the layers as Marian is."""
    folder = tmp_path_factory.mktemp("post_norm")
    flags = [str(flag) for flag in _toy["train_flags"](toy_data, folder, "-s", "zh", "-t", "en")]
    flags = [flag for flag in flags if not flag.endswith("-normalize-before")]
    _toy["fairseq"]("train", *flags, "--max-update", 60, "--no-epoch-checkpoints")
    swapped = [(target, source) for source, target in _toy["toy_pairs"](700)]
    return _confident(folder / "checkpoint_best.pt", swapped)


@pytest.fixture(scope="module")
def fairseq(checkpoint):
    return Translator.from_checkpoint(checkpoint, threads=1)


@pytest.fixture(scope="module")
def huggingface(fairseq):
    from fairseq_ext.backtranslation.models.huggingface_decoder import HuggingFaceBackend

    tokenizer = SimpleNamespace(
        eos_token_id=EOS, unk_token_id=UNK, pad_token_id=PAD, model_max_length=512
    )
    vocabulary = SimpleNamespace(tokenizer=tokenizer, code_ids=[])
    backend = HuggingFaceBackend(marian(fairseq.backend.models[0]), vocabulary)
    return Translator(backend, fairseq.vocabulary)


@pytest.fixture(scope="module")
def ctranslate2(checkpoint):
    return Translator.from_checkpoint(checkpoint, "ctranslate2", threads=1)


@pytest.fixture(params=["huggingface", "ctranslate2"])
def other(request):
    return request.getfixturevalue(request.param)


def marian(model):
    """A fairseq Transformer as a MarianMTModel."""
    import torch
    from fairseq.modules import SinusoidalPositionalEmbedding
    from transformers import MarianConfig, MarianMTModel

    cfg = model.cfg
    config = MarianConfig(
        vocab_size=model.decoder.output_projection.weight.shape[0],
        d_model=cfg.encoder.embed_dim,
        encoder_layers=cfg.encoder.layers,
        decoder_layers=cfg.decoder.layers,
        encoder_attention_heads=cfg.encoder.attention_heads,
        decoder_attention_heads=cfg.decoder.attention_heads,
        encoder_ffn_dim=cfg.encoder.ffn_embed_dim,
        decoder_ffn_dim=cfg.decoder.ffn_embed_dim,
        activation_function=cfg.activation_fn,
        scale_embedding=True,
        max_position_embeddings=512,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
    )
    new = MarianMTModel(config)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights["model.shared.weight"] = weights["model.encoder.embed_tokens.weight"]
    # fairseq counts from behind the id of padding
    table = SinusoidalPositionalEmbedding.get_embedding(512 + PAD + 1, config.d_model, PAD)
    for side in ("encoder", "decoder"):
        weights[f"model.{side}.embed_positions.weight"] = table[PAD + 1 :]
    weights["lm_head.weight"] = weights["model.shared.weight"]
    weights["final_logits_bias"] = torch.zeros(1, config.vocab_size)
    mine = new.state_dict()
    assert {name for name in mine if name not in weights} == set()
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(weights[name])
    return new


def found(translator, lines, **options):
    wanted = [[Source(tuple(translator.vocabulary.encode(line)))] for line in lines]
    return [one[0] for one in translator.decode_window(wanted, DecodeOptions(**options))]


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 1},
        {"beam": 4, "nbest": 2},
        {"beam": 3, "lenpen": 0.5},
        {"beam": 1, "max_len_a": 0.5, "max_len_b": 0},
    ],
    ids=str,
)
def test_searches_agree(fairseq, other, toy_mono, options):
    """Lines that differ would be told with both outputs; there are none.

    Of nbest only the best is compared: among hypotheses that end in one step beyond the last that is
    wanted, fairseq keeps the first and the others keep the best.
    """
    lines = toy_mono[:60]
    expected, got = (found(one, lines, **options) for one in (fairseq, other))
    differing = [
        (line, a[0], b[0])
        for line, a, b in zip(lines, expected, got, strict=True)
        if a[0].ids != b[0].ids
    ]
    assert not differing
    # CTranslate2 shares what <unk> and <pad> would have got among the others, at each piece
    most = 0.05 if other.backend.name == "ctranslate2" else 2e-4
    for (a, *_), (b, *_) in zip(expected, got, strict=True):
        assert a.cut == b.cut and (a.cut or a.score - 2e-4 <= b.score <= a.score + most)


@pytest.mark.parametrize("how", [{}, {"topk": 3}, {"topp": 0.8}, {"temperature": 2.0}], ids=str)
def test_a_seed_draws_the_same_on_fairseq_and_hugging_face(fairseq, huggingface, toy_mono, how):
    lines, seeds = toy_mono[:40], list(range(40))
    ids = [fairseq.vocabulary.encode(line) for line in lines]
    options = SampleOptions(**how)
    drawn = [t.backend.sample(ids, seeds, options, 40) for t in (fairseq, huggingface)]
    assert [c.ids for c in drawn[0]] == [c.ids for c in drawn[1]]
    assert [c.score for c in drawn[1]] == pytest.approx([c.score for c in drawn[0]], abs=2e-4)
