"""Ids to text and back through fairseq's interfaces: emoji, rare Han, pieces and text."""

import pickle

import fairseq  # noqa: F401
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_ext.translation.decode.checkpoint import codecs_of
from fairseq_ext.translation.text.normalise import normalise
from fairseq_ext.translation.text.spm import Codec
from fairseq_ext.translation.text.vocabulary import (
    Pieces,
    SpmBpe,
    SpmDictionary,
    Text,
    to_state,
)

NASTY = [
    "我爱😀龘。",
    "A 😀 B",
    "e = mc²",
    "x < y & <unk> <s> </s> <pad>",
    "@@ ▁ ##",
    "<BT> is a tag",
]


@pytest.fixture(scope="module")
def dictionary(toy_codec):
    return SpmDictionary(toy_codec, "zh")


@pytest.fixture(scope="module")
def bpe(toy_codec, dictionary):
    return SpmBpe(SpmDictionary(toy_codec, "en"), dictionary, "standard")


def test_ids_are_those_of_the_model_and_of_the_dictionary_file(toy_data, toy_codec, dictionary):
    from fairseq.data import Dictionary

    plain = Dictionary.load(str(toy_data / "dict.zh.txt"))
    assert dictionary.symbols == plain.symbols
    assert dictionary == plain, "the same to --share-all-embeddings"
    assert len(dictionary) == toy_codec.size
    assert [dictionary.index(p) for p in toy_codec.pieces(range(toy_codec.size))] == list(
        range(toy_codec.size)
    )


@pytest.mark.parametrize("post_process", [None, "none", "sentencepiece", "subword_nmt", "@@ "])
@given(text=st.text(max_size=30) | st.sampled_from(NASTY))
def test_decoding_gives_text_whatever_the_post_processing(dictionary, bpe, post_process, text):
    """What fairseq-generate does for its D line, for any text and any --remove-bpe."""
    text = normalise(text, "zh")
    ids = torch.IntTensor([*dictionary.codec.encode(text), dictionary.eos()])
    shown = dictionary.string(ids, post_process, escape_unk=True)
    assert bpe.decode(shown) == text
    if post_process in (None, "none"):
        assert isinstance(shown, Pieces)
        assert dictionary.encode_line(shown).tolist() == ids.tolist()
    else:
        assert shown == text


@given(text=st.text(max_size=30) | st.sampled_from(NASTY))
def test_interactive_input_is_normalised_and_encoded_by_the_model(bpe, text):
    pieces = bpe.encode(text)
    ids = bpe.source.encode_line(pieces, append_eos=False).tolist()
    assert bpe.source.unk() not in ids
    assert ids == bpe.encode_ids(text)
    assert bpe.source.codec.decode(ids) == normalise(text, "en")


def test_plain_pieces_are_decoded_as_pieces_and_text_is_left_alone(toy_codec, bpe):
    ids = toy_codec.encode("我😀")
    assert bpe.decode(" ".join(toy_codec.pieces(ids))) == "我😀"
    assert bpe.decode(Text("我 <0xF0> ▁")) == "我 <0xF0> ▁"


def test_output_is_detokenised_and_a_reference_is_not(dictionary, toy_codec):
    ids = toy_codec.encode("我 们")
    assert dictionary.string(ids, "sentencepiece") == "我们"
    assert dictionary.string(ids).text == "我们"
    assert dictionary.string(ids, "sentencepiece", escape_unk=True) == "我 们"
    assert SpmDictionary(toy_codec, "en").string(ids, "sentencepiece") == "我 们"


def test_special_and_extra_symbols_and_padding_are_no_text(dictionary, toy_codec):
    tag = toy_codec.symbol_id("<BT>")
    ids = torch.tensor([0, tag, *toy_codec.encode("书"), 3, 2, 1, 1])
    assert dictionary.string(ids, "sentencepiece") == "书"
    assert "<BT>" in dictionary.string(ids) and dictionary.string(ids).text == "书"


def test_a_hypothesis_is_one_line_whatever_its_bytes(dictionary):
    text = "a\nb\rc\td\u2028e\x00f\n"
    spelled = [dictionary.index(f"<0x{byte:02X}>") for byte in text.encode()]
    assert dictionary.string(spelled, "sentencepiece") == "a b c d ef"
    broken = [dictionary.index("<0xF0>"), dictionary.index("<0x9F>")]
    assert dictionary.string(broken, "sentencepiece") == ""
    assert dictionary.string([*spelled[:1], *broken, *spelled[2:3]], "sentencepiece") == "ab"


def test_a_matrix_is_a_string_for_each_row(dictionary, toy_codec):
    ids = toy_codec.encode("书")
    assert dictionary.string(torch.tensor([ids, ids]), "sentencepiece") == "书\n书"


def test_nothing_is_added_to_a_dictionary(dictionary):
    size = len(dictionary)
    assert dictionary.encode_line("nothere", add_if_not_exist=True).tolist() == [3, 2]
    assert len(dictionary) == size


def test_survives_pickling(dictionary, toy_codec):
    again = pickle.loads(pickle.dumps(dictionary))
    assert again == dictionary
    assert again.string(toy_codec.encode("我😀"), "x") == "我😀"


def test_state_round_trip_is_plain_and_small(toy_codec, tmp_path):
    joint = {"en": toy_codec, "zh": toy_codec}
    state = to_state(joint, extra_symbols=["<BT>"], source_lang="en")
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    found = codecs_of(again)
    assert {lang: codec.sha256 for lang, codec in found.items()} == dict.fromkeys(
        ("en", "zh"), toy_codec.sha256
    )
    assert found["zh"].extra_symbols == ("<BT>",) and again["source_lang"] == "en"
    assert again["dict"]["en"] == toy_codec.pieces(range(4, toy_codec.size))
    assert again["spm"]["en"].data_ptr() == again["spm"]["zh"].data_ptr(), "one model, stored once"


def test_two_models_stay_two(toy_codec, toy_data):
    from fairseq_ext.translation.text.spm import train_model

    other = Codec(train_model([toy_data / "text" / "train.zh"], size=400), ["<BT>"])
    found = codecs_of(to_state({"en": toy_codec, "zh": other}, extra_symbols=["<BT>"]))
    assert found["en"].sha256 == toy_codec.sha256 and found["zh"].sha256 == other.sha256
