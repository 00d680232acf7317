import pytest

from ext_common.cli import UserError
from fairseq_ext.translation.score.scoring import ScoringOptions, score
from fairseq_ext.translation.text import moses
from fairseq_ext.translation.text.moses import detokeniser, looks_tokenised
from tests.translation.conftest import toy_pairs

PLAIN = ["I don't like trains, you know.", "Rock & roll, he said.", "Was ist das?", "Yes."] * 30
CUT = ["I don &apos;t like high @-@ speed trains , you know ."] * 4
SPACED = ["I do not like trains , you know .", "Yes .", "No ! Yes ?", "a b"] * 10


def test_tokenised_text_is_told_from_plain_text():
    assert "&apos;" in looks_tokenised([*PLAIN, *CUT], "en")
    assert "100%" in looks_tokenised(SPACED, "en")
    assert "spaces between words" in looks_tokenised(["我 不 喜欢 火车 。"], "zh")
    french = ["Quoi ! Quand ? Il dit : « oui » ; non, monsieur."] * 9
    for lines, lang in (
        (PLAIN, "en"),
        (french, "fr"),
        (["我不喜欢 iPhone 火车。"], "zh"),
        ([], "en"),
    ):
        assert looks_tokenised(lines, lang) is None
    for side, lang in zip(zip(*toy_pairs(200), strict=True), ("en", "zh"), strict=True):
        assert looks_tokenised(side, lang) is None


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacremoses", None)
    moses._moses.cache_clear()
    with pytest.raises(UserError, match=r"needs the package sacremoses.*\[moses\]"):
        detokeniser("en")


def test_scores_of_tokenised_text_are_warned_of_and_those_of_plain_text():
    plain = ["I don't like high-speed trains, you know."] * 4
    found = score(CUT, plain, "en", options=ScoringOptions(metrics=["bleu"], bootstrap=2))
    assert any("the hypotheses looks as if it had been tokenised" in w for w in found.warnings)
    pytest.importorskip("sacremoses", reason="pip install -e '.[moses]'")
    options = ScoringOptions(metrics=["bleu"], bootstrap=2, detokenise=True)
    assert score(CUT, plain, "en", options=options).bleu == pytest.approx(100)
    assert (
        detokeniser("de")("Ein Mann , der &quot; hallo &quot; sagt .")
        == 'Ein Mann, der "hallo" sagt.'
    )
