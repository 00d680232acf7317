"""The picture of attention: whose weights they are, that no label is a box, what is refused."""

import numpy as np
import pytest
import torch
from matplotlib import font_manager

from ext_common.cli import UsageError, UserError
from fairseq_ext.translation import attention as command
from fairseq_ext.translation import fonts
from fairseq_ext.translation.attention import Attention, attention, draw, labels

HAN = "我爱苹果"


def made_font(path, characters):
    """A font file whose glyphs are filled squares with a hole, for `characters` only."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for x, y in [(100, 900), (500, 900), (500, 800), (100, 800)]:
        (pen.moveTo if (x, y) == (100, 900) else pen.lineTo)((x, y))
    pen.closePath()
    shape = pen.glyph()
    names = {ord(c): f"g{i}" for i, c in enumerate(characters)}
    order = [".notdef", *names.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(names)
    builder.setupGlyf({name: shape for name in order})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in order})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Made Han", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900)
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def only_default_fonts(monkeypatch):
    listed = [font for font in font_manager.fontManager.ttflist if "DejaVu" in font.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    return listed


@pytest.fixture
def with_han(only_default_fonts, tmp_path):
    made_font(tmp_path / "han.ttf", HAN)
    font_manager.fontManager.addfont(str(tmp_path / "han.ttf"))


def example():
    weights = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], dtype=np.float32)
    return Attention(["▁I", "▁eat", "</s>"], ["我", "</s>"], weights, "attention")


# --- fonts --------------------------------------------------------------------------------------


def test_fonts_that_have_the_characters_are_found(with_han):
    assert fonts.fonts_for("▁eat </s>") == ([fonts.DEFAULT], frozenset())
    families, missing = fonts.fonts_for(f"▁{HAN} 龘")
    assert families == [fonts.DEFAULT, "Made Han"] and missing == {"龘"}


def test_the_font_of_boxes_is_no_font(only_default_fonts):
    listed = [font for font in font_manager._load_fontmanager().ttflist if "Last" in font.name]
    only_default_fonts.extend(listed)
    assert fonts.fonts_for(HAN) == ([fonts.DEFAULT], frozenset(HAN))


def test_a_font_that_is_gone_is_passed_over(with_han, tmp_path):
    (tmp_path / "han.ttf").unlink()
    fonts._characters.cache_clear()
    assert fonts.fonts_for("我")[1] == {"我"}


# --- the picture --------------------------------------------------------------------------------


@pytest.fixture
def no_missing_glyph(recwarn):
    """Fails where matplotlib drew a box."""
    yield
    assert not [one for one in recwarn if "missing from font" in str(one.message)]


def test_pieces_without_a_font_are_numbered_and_listed(
    only_default_fonts, no_missing_glyph, tmp_path
):
    said = draw(example(), str(tmp_path / "a.png"))
    assert said[0].startswith("no installed font has 1 of the characters")
    assert said[1].split() == ["t1", "我"] and len(said) == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    columns, rows, _ = labels(example(), frozenset("我"))
    assert columns == ["▁I", "▁eat", "</s>"] and rows == ["t1", "</s>"]


def test_pieces_with_a_font_are_drawn(with_han, no_missing_glyph, tmp_path):
    assert draw(example(), str(tmp_path / "a.png")) == []
    assert draw(example(), str(tmp_path / "a.pdf")) == []


def test_an_svg_holds_the_text_and_is_the_same_twice(
    only_default_fonts, no_missing_glyph, tmp_path
):
    for name in "ab":
        assert draw(example(), str(tmp_path / f"{name}.svg")) == []
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ">我<" in text and "sans-serif" in text
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")


def test_math_signs_and_long_sentences_are_drawn(tmp_path, no_missing_glyph):
    pieces = [f"$a_{i}$" for i in range(150)]
    weights = np.full((150, 150), 1 / 150, dtype=np.float32)
    draw(Attention(pieces, pieces, weights, "x"), str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 1000


# --- the weights --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(toy_checkpoint):
    from fairseq_ext.translation.decode.checkpoint import build_model, read_state, vocabulary_of

    state = read_state(toy_checkpoint)
    return build_model(state, toy_checkpoint), vocabulary_of(state, toy_checkpoint)


def test_weights_are_of_the_step_that_writes_the_row(loaded):
    model, vocabulary = loaded
    found = attention(model, vocabulary, "I like red apples.", "我喜欢红的苹果。")
    assert "".join(found.target) == "▁我喜欢红的苹果。</s>"
    assert "".join(found.source) == "▁I▁like▁red▁apples.</s>"
    assert found.weights.shape == (len(found.target), len(found.source))
    assert found.weights.dtype == np.float32
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, atol=1e-5)
    # One step alone, as in decoding: the row of a piece knows nothing of the pieces from it on.
    source = torch.tensor([vocabulary.encode("I like red apples.")])
    ids = vocabulary.target.encode("我喜欢红的苹果。")
    with torch.inference_mode():
        encoded = model.encoder(source, src_lengths=torch.tensor([source.size(1)]))
        for row in (0, 2):
            _, extra = model.decoder(torch.tensor([[2, *ids[:row]]]), encoder_out=encoded)
            np.testing.assert_allclose(extra["attn"][0][0, -1], found.weights[row], atol=1e-6)


def test_what_cannot_be_shown_is_refused(loaded):
    model, vocabulary = loaded
    with pytest.raises(UserError, match="the source is empty"):
        attention(model, vocabulary, " \u200b", "我")
    # A model may translate into nothing: that it ends at once is to be seen as well.
    assert attention(model, vocabulary, "I", "").target == ["</s>"]
    with pytest.raises(UserError, match="the target has .* pieces, the model holds 1024"):
        attention(model, vocabulary, "I", "苹果。" * 1000)
    with pytest.raises(UserError, match="the decoder has 1 layers: there is no --layer 2"):
        attention(model, vocabulary, "I", "我", layer=2)


def test_models_of_another_kind():
    class Part(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = weights

        def max_positions(self):
            return 9

        def forward(self, tokens, encoder_out=None, src_lengths=None):
            return tokens, self.weights

    class Codec:
        def encode(self, text):
            return [4] * len(text)

        def pieces(self, ids):
            return [str(i) for i in ids]

    class Words:
        source = target = Codec()
        target_lang, convention = "en", "none"

        def clean(self, text):
            return text

        def encode(self, text):
            return [4] * len(text) + [2]

    class Model(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.encoder, self.decoder = Part(None), Part(weights)

    # fairseq's LSTM gives the weights themselves, not a dict.
    found = attention(Model(torch.full((1, 2, 3), 1 / 3)), Words(), "ab", "c")
    assert found.weights.shape == (2, 3) and found.title == "attention"
    with pytest.raises(UserError, match="Model gives no attention"):
        attention(Model(None), Words(), "ab", "c")
    with pytest.raises(UserError, match="Model has one attention: leave --layer out"):
        attention(Model(torch.zeros(1, 2, 3)), Words(), "ab", "c", layer=2)


# --- the command --------------------------------------------------------------------------------


def test_command_translates_and_draws(toy_checkpoint, tmp_path, capsys):
    base = [str(tmp_path / "a.svg"), "--path", str(toy_checkpoint), "--source", "we see big fish."]
    command.main(base)
    said = capsys.readouterr()
    assert said.out.startswith("translation: ") and "wrote" in said.err
    command.main([*base, "--target", "我们看见大的鱼。"])
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "鱼" in text and "fish" in text
    with pytest.raises(UsageError, match="counts from 1"):
        command.main([*base, "--layer", "0"])
    with pytest.raises(UsageError, match=r"a.txt must end in .png, .svg, .pdf"):
        command.main([str(tmp_path / "a.txt"), *base[1:]])
    with pytest.raises(UserError, match="none.pt does not exist"):
        command.main([base[0], "--path", "none.pt", "--source", "x"])
