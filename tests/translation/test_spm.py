"""SentencePiece codecs: ids are fairseq's, text survives, symbols cannot be typed."""

import pickle
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_common.cli import UserError
from fairseq_ext.translation.text import spm
from fairseq_ext.translation.text.spm import Codec, train_model

WORDS = "the cat sat on a mat and saw 3 of 47 dogs 我 爱 你 们 中国 猫 在 垫子 上".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "text"
    lines = (" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(500))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=spm.KINDS)
def codec(request, text):
    return Codec(train_model([text], kind=request.param, size=340), ("<BT>",))


def test_ids_are_those_of_fairseq(codec):
    from fairseq.data import Dictionary

    theirs = Dictionary()
    for piece in codec.pieces(range(4, codec.size)):
        theirs.add_symbol(piece)
    assert len(theirs) == codec.size
    for i in range(codec.size):
        assert theirs.index(codec.pieces([i])[0]) == i
    assert (theirs.bos(), theirs.pad(), theirs.eos(), theirs.unk()) == (0, 1, 2, 3)


def test_kind_is_read_from_the_model(codec, text):
    other = {"unigram": "bpe", "bpe": "unigram"}[codec.kind]
    assert Codec(train_model([text], kind=other, size=340)).kind == other


# What text.normalise leaves: no control characters, single spaces inside.
normalised = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Zs"], exclude_characters="▁")
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(normalised, st.sampled_from(["<BT>", "<", "BT>", "😀", "𠮷"]))))
def test_text_survives_without_unknown_pieces(codec, parts):
    for glue in ("", " "):
        text = glue.join(part for part in parts if part)
        ids = codec.encode(text)
        assert codec.decode(ids) == text
        assert spm.UNK not in ids
        assert codec.symbol_id("<BT>") not in ids


@pytest.mark.parametrize("line", ["<BT>", "a <BT> b", "<\u2060BT>", "<\u2060\u2060BT>", "<<BT>>"])
def test_what_looks_like_a_symbol_is_text(codec, line):
    assert codec.decode(codec.encode(line)) == line
    assert codec.symbol_id("<BT>") not in codec.encode(line)


def test_symbols_and_specials_are_not_text(codec):
    ids = codec.encode("the cat")
    tagged = [spm.BOS, codec.symbol_id("<BT>"), *ids, spm.EOS, spm.PAD]
    assert codec.decode(tagged) == "the cat"
    assert codec.decode([]) == ""


def test_half_a_character_becomes_a_replacement_character(codec):
    start = codec.encode("𠮷")
    assert codec.decode(start[:-1]).endswith("\ufffd")


def test_travels_through_pickle(codec):
    again = pickle.loads(pickle.dumps(codec))
    assert again.encode("the cat 我爱你") == codec.encode("the cat 我爱你")
    assert again.sha256 == codec.sha256


def test_many_at_once(codec):
    lines = ["the cat", "", "我爱 <BT>"]
    assert codec.encode_many(lines, threads=2) == [codec.encode(line) for line in lines]


@pytest.mark.parametrize("kind", spm.KINDS)
@pytest.mark.parametrize("lines", [5, 60, 500])
def test_little_text_gives_a_model_as_large_as_it_can(kind, lines, text, tmp_path):
    few = tmp_path / "few"
    few.write_text("\n".join(text.read_text(encoding="utf-8").split("\n")[:lines]) + "\n")
    codec = Codec(train_model([few], kind=kind, pairs=lines), ("<BT>",))
    assert 260 < codec.size <= spm.default_size(lines, 100)
    assert codec.decode(codec.encode("the 鑫 cat")) == "the 鑫 cat"


def test_digits_and_punctuation_are_pieces_whatever_the_text(tmp_path):
    path = tmp_path / "letters"
    path.write_text("a bc def ghijk lmnop\n" * 50, encoding="utf-8")
    for kind in spm.KINDS:
        codec = Codec(train_model([path], size=400, kind=kind), ["<BT>"])
        text = string.digits + string.punctuation
        bare = [codec.encode(f"a{one}")[-1] for one in text]
        assert "".join(codec.pieces(bare)) == text, kind


def test_rare_characters_are_pieces_where_that_is_asked_for(tmp_path):
    path = tmp_path / "letters"
    path.write_text("abcd\n" * 2000 + "龘\n", encoding="utf-8")
    found = {
        coverage: len(Codec(train_model([path], size=400, coverage=coverage)).encode("龘"))
        for coverage in (0.9995, 1.0)
    }
    assert found[0.9995] > 3 and found[1.0] <= 2


def test_the_same_text_gives_the_same_model(text):
    assert train_model([text], size=340) == train_model([text], size=340)


def test_sizes_follow_the_corpus(text, tmp_path):
    # characters + 256 + max(500, 22,000 · (pairs / 10⁶)^0.8), at most 32,000
    found = [spm.default_size(n, c) for n, c in [(0, 0), (500, 80), (29_155, 2400), (10**6, 90)]]
    assert found == [800, 800, 4000, 22300]
    assert spm.default_size(10**9, 90) == 32_000
    path = tmp_path / "letters"
    path.write_text("a" * 5000 + "\n" + "b" * 4994 + "cde\n", encoding="utf-8")
    assert spm._characters([path]) == 2


def test_errors_are_sentences(text, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(UserError, match="no model"):
        train_model([empty], size=400)
    with pytest.raises(UserError, match="too small"):
        train_model([text], size=200)
    with pytest.raises(UserError, match="unknown kind"):
        train_model([text], kind="wordpiece")
    for symbol in ("x", "a b", "<s>"):
        with pytest.raises(UserError, match="extra symbol"):
            train_model([text], extra_symbols=[symbol])
    with pytest.raises(UserError, match="damaged"):
        Codec(b"not a model")
    with pytest.raises(UserError, match="cannot be read"):
        Codec.from_file(tmp_path / "absent.model")
    model = train_model([text], size=340, extra_symbols=())
    with pytest.raises(UserError, match="<BT>"):
        Codec(model, ("<BT>",))
    with pytest.raises(UserError, match="--extra-symbols '<BT>'"):
        Codec(model).symbol_id("<BT>")


def test_a_model_with_other_ids_is_refused(text, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=40, minloglevel=2
    )
    with pytest.raises(UserError, match="not at 0 to 3"):
        Codec.from_file(tmp_path / "m.model")
