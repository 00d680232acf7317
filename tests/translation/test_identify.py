import itertools

import pytest

from ext_common.cli import UserError
from fairseq_ext.translation.prepare.filters import Language
from fairseq_ext.translation.text.identify import TwoLanguages, check_language
from tests.translation.conftest import toy_pairs

WORDS = [
    [("The old man", "Der alte Mann"), ("My sister", "Meine Schwester"), ("A child", "Ein Kind")],
    [("never reads", "liest niemals"), ("often buys", "kauft häufig"), ("has lost", "verlor")],
    [("the newspaper", "die Zeitung"), ("green apples", "grüne Äpfel"), ("a coat", "einen Mantel")],
    [("in the kitchen", "in der Küche"), ("on Sundays", "am Sonntag"), ("there", "dort")],
    [("with Tom.", "mit Tom."), ("without us.", "ohne uns."), ("every year.", "jedes Jahr.")],
]
PAIRS = [tuple(map(" ".join, zip(*parts, strict=True))) for parts in itertools.product(*WORDS)]


def fitted(pairs, languages=("en", "de")):
    found = Language(languages)
    found.fit(pairs)
    return found


def test_sides_in_each_others_language_are_removed_and_true_pairs_are_not():
    """A tenth of the sample is untranslated, as in a real crawl."""
    language = fitted([(a, a if i % 10 == 0 else b) for i, (a, b) in enumerate(PAIRS)])
    assert [pair for pair in PAIRS if language(*pair)] == []
    for source, target in PAIRS:
        assert language(target, source) == "the source is in de"
    other = PAIRS[1:] + PAIRS[:1]
    copied = [language(source, more) for (source, _), (more, _) in zip(PAIRS, other, strict=True)]
    assert copied.count("the target is in en") > 0.9 * len(copied)


def test_short_texts_and_names_are_no_evidence():
    language = fitted(PAIRS)
    for pair in (
        ("Tom Smith", "Tom Smith"),
        ("OK", "OK"),
        ("", ""),
        ("1984", "1984"),
        ("qx", "qx"),
    ):
        assert language(*pair) is None


def test_nothing_is_judged_from_few_pairs_or_where_the_script_tells():
    assert fitted(PAIRS[:99]).model is None
    assert fitted(toy_pairs(300), ("en", "zh")).model is None


def test_odds_are_those_of_the_counts():
    """Each side has one n-gram, 1.5 and 0.5 of 2 when smoothed by a half."""
    import math

    model = TwoLanguages(["a"], ["b"])
    assert model.lean("a") == (pytest.approx(math.log(1.5 / 0.5)), 1)
    assert model.lean("b") == (pytest.approx(-math.log(1.5 / 0.5)), 1)
    assert model.lean("c") == (0, 0)


def test_a_text_of_another_language_is_refused():
    pytest.importorskip("py3langid", reason="pip install -e '.[langid]'")
    english, german = zip(*PAIRS, strict=True)
    check_language(english, "en", "x")
    check_language(german, "de_AT", "x")
    with pytest.raises(UserError, match=r"the source is not en but de, by 12 of 12 .*exchanged\?"):
        check_language(german, "en", "the source", "de")
    # too little, a language that is not known, and one that nobody tells from its neighbour
    check_language(german[:199], "en", "x")
    check_language(german, "qaa", "x")
