"""Scores against sacreBLEU, its tests and closed forms; what is refused; the command."""

import json
import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from ext_common.cli import UsageError, UserError
from fairseq_ext.translation.score import __main__ as command
from fairseq_ext.translation.score import significance
from fairseq_ext.translation.score.__main__ import ScoringOptions, score
from fairseq_ext.translation.score.scoring import Metric, choose_tokenizer
from fairseq_ext.translation.text.normalise import normalise
from tests import processes

FAST = ScoringOptions(bootstrap=50, randomisations=50)
ZH = ["我爱北京天安门。", "今天天气很好，我们去公园吧！", "他有3本书。", "你会说中文吗？"]
ZH_OUT = ["我爱天安门。", "今天天气好，我们去公园！", "他有3本书。", "你说中文吗？"]
EN = ["The cat sat on the mat.", "I do not know what to say.", "He's 42 years old.", "Good!"]
EN_OUT = ["A cat sat on the mat.", "I don't know what I say.", "He is 42 years old.", "Good!"]


def corpus(count=120, seed=3):
    """(references, a good system, a worse one) of made-up English."""
    rng = random.Random(seed)
    words = "the a cat dog tree house runs sees likes old red of in to and was".split()

    def spoil(line, rate):
        return " ".join(rng.choice(words) if rng.random() < rate else w for w in line.split())

    refs = [" ".join(rng.choices(words, k=rng.randint(4, 15))) for _ in range(count)]
    return refs, [spoil(r, 0.25) for r in refs], [spoil(r, 0.3) for r in refs]


# --- values -------------------------------------------------------------------------------------


def test_golden_values():
    # From `sacrebleu ref -i hyp -m bleu chrf ter` 2.6.0, run once by hand.
    zh = score(ZH_OUT, ZH, "zh", options=FAST)
    assert (zh.bleu, zh.chrf, zh.ter) == pytest.approx(GOLDEN["zh"], abs=0.0005)
    en = score(EN_OUT, EN, "en", options=FAST)
    assert (en.bleu, en.chrf, en.ter) == pytest.approx(GOLDEN["en"], abs=0.0005)


GOLDEN = {"zh": (66.288, 54.681, 14.286), "en": (52.085, 71.828, 33.333)}


def test_wrong_tokenizer_gives_another_number_and_says_so():
    right, wrong = (
        score(ZH_OUT, ZH, "zh"),
        score(ZH_OUT, ZH, "zh", options=ScoringOptions(tokenizer="13a", bootstrap=50)),
    )
    assert right.bleu - wrong.bleu > 10
    assert "tok:13a" in wrong.metrics["bleu"].signature and not right.warnings
    assert any("13a is not the tokenizer of zh" in w for w in wrong.warnings)


@pytest.mark.parametrize("lang, hyp, ref", [("zh", ZH_OUT, ZH), ("en", EN_OUT, EN)])
def test_equals_sacrebleu_with_signature(lang, hyp, ref):
    found = score(hyp, ref, lang, options=FAST)
    asian = {"normalized": True, "asian_support": True} if lang == "zh" else {}
    tokenizer = {"zh": "zh", "en": "13a"}[lang]
    for key, metric in [
        ("bleu", BLEU(tokenize=tokenizer)),
        ("chrf", CHRF()),
        ("ter", TER(**asian)),
    ]:
        assert found.metrics[key].value == pytest.approx(metric.corpus_score(hyp, [ref]).score)
        assert found.metrics[key].signature == str(metric.get_signature())
        low, high = found.metrics[key].interval
        assert low <= found.metrics[key].value <= high
    assert ("asian:yes" in found.metrics["ter"].signature) == (lang == "zh")


def test_several_references_as_sacrebleu_also_where_one_is_missing():
    second = ["The cat was sitting on a mat.", "", "He is 42.", "Good!"]
    found = score(EN_OUT, [EN, second], "en", options=FAST)
    missing = [line or None for line in second]
    for key, metric in [("bleu", BLEU()), ("chrf", CHRF()), ("ter", TER())]:
        assert found.metrics[key].value == pytest.approx(
            metric.corpus_score(EN_OUT, [EN, missing]).score
        )
    assert found.references == 2 and "nrefs:var" in found.metrics["bleu"].signature
    assert found.bleu >= score(EN_OUT, EN, "en", options=FAST).bleu


def test_identical_is_100_with_a_warning():
    found = score(ZH, ZH, "zh", options=FAST)
    assert (found.bleu, found.chrf, found.ter) == pytest.approx((100, 100, 0))
    assert found.metrics["bleu"].interval == pytest.approx((100, 100))
    assert any("equal line by line" in warning for warning in found.warnings)


def test_ter_of_chinese_is_by_character_and_of_thai_too():
    assert score(["我爱你们"], ["我爱他们"], "zh", options=FAST).ter == pytest.approx(25)
    thai = score(["กขคง"], ["กขจง"], "th", options=FAST)
    assert thai.ter == pytest.approx(25)
    assert thai.metrics["ter"].signature.endswith("|unit:char") and thai.tokenizer == "char"


def test_normalise_is_off_unless_asked_for():
    hyp, ref = ["他有3本书.", "你好!"], ["他有３本书。", "你好！"]
    plain = score(hyp, ref, "zh", options=FAST)
    same = score(hyp, ref, "zh", options=ScoringOptions(normalise=True, bootstrap=50))
    assert plain.bleu < 100 and same.bleu == pytest.approx(100)
    assert same.normalised and not plain.normalised
    assert [normalise(line, "zh") for line in hyp] == [normalise(line, "zh") for line in ref]


@pytest.mark.parametrize(
    "lang, tokenizer", [("zh", "zh"), ("zh-Hant-TW", "zh"), ("de", "13a"), ("en", "13a")]
)
def test_tokenizer_follows_the_language(lang, tokenizer):
    name, reason = choose_tokenizer(lang)
    assert name == tokenizer and lang in reason


def test_japanese_without_mecab_is_scored_by_character(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name, reason = choose_tokenizer("ja")
    assert name == "char" and "MeCab" in reason


def test_tokenizers_that_are_none_or_cannot_run_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="no tokenizer 'moses': sacreBLEU has .*13a"):
        choose_tokenizer("en", "moses")
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(UserError, match="tokenizer ja-mecab cannot be used here"):
        choose_tokenizer("ja", "ja-mecab")


# --- the formulas on sums -----------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(0, 6)] * 4, *[st.integers(0, 9)] * 4),
        min_size=1,
        max_size=8,
    )
)
def test_bleu_of_sums_is_sacrebleus(rows):
    rows = np.array(rows, dtype=float)
    rows[:, 2:6] = np.minimum(rows[:, 2:6], rows[:, 6:])
    oracle = BLEU()
    expected = [oracle._compute_score_from_stats(list(row)).score for row in rows]
    np.testing.assert_allclose(significance.bleu(rows), expected, rtol=1e-12, atol=1e-12)


@given(st.lists(st.lists(st.integers(0, 9), min_size=18, max_size=18), min_size=1, max_size=8))
def test_chrf_of_sums_is_sacrebleus(rows):
    rows = np.array(rows, dtype=float)
    rows[:, 2::3] = np.minimum(rows[:, 2::3], np.minimum(rows[:, 0::3], rows[:, 1::3]))
    expected = [CHRF()._compute_score_from_stats(list(row)).score for row in rows]
    np.testing.assert_allclose(significance.chrf(rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("edits, length", [(3, 4), (0, 0), (2, 0), (9, 4)])
def test_ter_of_sums_is_sacrebleus(edits, length):
    expected = TER()._compute_score_from_stats([edits, length]).score
    assert significance.ter([edits, length]) == pytest.approx(expected)


# --- significance -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bs", "ar"])
def test_paired_tests_are_sacrebleus(kind, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    refs, good, bad = corpus()
    oracle = PairedTest(
        [("baseline", bad), ("system", good)],
        {"BLEU": BLEU(references=[refs]), "chrF2": CHRF(references=[refs])},
        references=None,
        test_type=kind,
        n_samples=500,
    )
    _, results = oracle()
    options = ScoringOptions(bootstrap=500, randomisations=500)
    found = score(good, refs, "en", baseline=bad, options=options)
    for key, name in [("bleu", "BLEU"), ("chrf", "chrF2")]:
        theirs = results[name][1]
        assert found.metrics[key].value == pytest.approx(theirs.score)
        assert found.comparisons[key].baseline == pytest.approx(results[name][0].score)
        ours = found.comparisons[key]
        p = ours.sacrebleu_bootstrap_p if kind == "bs" else ours.randomisation_p
        # float32 sums there, float64 here; and a p that is neither the least nor the largest.
        assert p == pytest.approx(theirs.p_value, abs=0.003)
        assert 1 / 501 < p < 1
        if kind == "bs":
            low, high = found.metrics[key].interval
            assert (high - low) / 2 == pytest.approx(float(theirs.ci), rel=0.05)


def test_resamples_are_what_indexing_gives():
    rows = np.random.default_rng(0).integers(0, 9, (23, 3))
    (scores,) = significance.bootstrap(lambda s: s[..., 0], rows, trials=40, seed=7)
    drawn = np.random.default_rng(7).choice(23, size=(40, 23), replace=True)
    np.testing.assert_array_equal(scores, rows[drawn, 0].sum(axis=1))


def test_p_of_two_equal_systems_is_spread_evenly():
    random = np.random.default_rng(3)
    orders = np.arange(4)

    def system(length):
        totals = np.maximum(length[:, None] - orders, 0)
        matches = random.binomial(totals, 0.6 * 0.7**orders)
        return np.column_stack([length, length, matches, totals])

    found = []
    for trial in range(400):
        length = random.integers(4, 15, 80)
        pair = system(length), system(length)
        found.append(significance.paired_bootstrap(significance.bleu, *pair, 200, seed=trial))
    p = np.array([one.p for one in found])
    # uniform: of 400 trials 20 ± 4.4 below 0.05, a mean of 0.5 ± 0.014
    assert 0.025 < np.mean(p <= 0.05) < 0.085
    assert 0.45 < p.mean() < 0.55
    theirs = np.array([one.sacrebleu_p for one in found])
    assert np.mean(theirs <= 0.05) > 0.085 and theirs.mean() < 0.25


def test_nothing_depends_on_the_size_of_chunks(monkeypatch):
    refs, good, bad = corpus(60)
    whole = score(good, refs, "en", baseline=bad, options=ScoringOptions(randomisations=300))
    monkeypatch.setattr(significance, "_CELLS", 60 * 70)
    parts = score(good, refs, "en", baseline=bad, options=ScoringOptions(randomisations=300))
    assert whole == parts


def test_equal_systems_do_not_differ_and_seeds_repeat():
    refs, good, bad = corpus(40)
    same = score(good, refs, "en", baseline=good, options=FAST).comparisons["bleu"]
    assert (same.difference, same.wins, same.bootstrap_p, same.randomisation_p) == (0, 0, 1, 1)
    assert same.interval == (0, 0)
    first = score(good, refs, "en", baseline=bad, options=FAST)
    assert first == score(good, refs, "en", baseline=bad, options=FAST)
    other = ScoringOptions(bootstrap=50, randomisations=50, seed=2)
    assert first.comparisons != score(good, refs, "en", baseline=bad, options=other).comparisons


def test_clear_difference_has_the_least_p_and_changes_sign():
    refs, good, _ = corpus(60)
    bad = [line[: len(line) // 3] for line in good]
    won = score(good, refs, "en", baseline=bad, options=FAST).comparisons["chrf"]
    lost = score(bad, refs, "en", baseline=good, options=FAST).comparisons["chrf"]
    assert won.wins == 1 and lost.wins == 0
    assert won.randomisation_p == won.bootstrap_p == pytest.approx(1 / 51)
    assert won.difference == pytest.approx(-lost.difference) and won.difference > 0
    assert won.interval[0] > 0 > lost.interval[1]


def test_randomisation_of_one_sentence_is_the_closed_form():
    # Swapped or not, the difference has the same size: every trial counts.
    system, baseline = np.array([[3.0, 10]]), np.array([[5.0, 10]])
    assert significance.randomisation(significance.ter, system, baseline, trials=99) == 1
    # Two sentences: of the four swaps, two keep |difference|, two make it 0.
    system, baseline = np.array([[3.0, 10]] * 2), np.array([[5.0, 10]] * 2)
    p = significance.randomisation(significance.ter, system, baseline, trials=4000)
    assert p == pytest.approx(0.5, abs=0.03)


# --- refused and warned -------------------------------------------------------------------------


def test_what_means_nothing_is_refused():
    def refused(match, hyp=EN_OUT, refs=EN, error=UserError, **more):
        with pytest.raises(error, match=match) as caught:
            score(hyp, refs, "en", options=FAST, **more)
        assert "\n" not in str(caught.value)

    refused("the hypotheses has 3 lines, the references has 4", hyp=EN_OUT[:3])
    refused("the baseline has 2", baseline=EN[:2])
    refused("the source has 5", source=[*EN, ""])
    refused("is empty: there is nothing to score", hyp=[], refs=[])
    refused("the references, line 2: empty reference", refs=[EN[0], "  ", *EN[2:]])
    refused(r"line 2: empty reference \(2 such lines\)", refs=[EN[0], "", EN[2], ""])
    refused("reference 1 and reference 2, line 1: empty", refs=[["", *EN[1:]], ["", *EN[1:]]])
    refused("the hypotheses, line 1 is in SentencePiece pieces", hyp=["▁The ▁cat", *EN[1:]])
    refused("the hypotheses, line 3 is in BPE pieces", hyp=[*EN[:2], "ca@@ t", EN[3]])
    refused("line 4 is in BPE pieces", hyp=[*EN[:3], "un@@"])
    refused("line 1 is in byte pieces", hyp=["<0xE4><0xB8>", *EN[1:]])
    refused("the references, line 1 is in SentencePiece", refs=["▁The", *EN[1:]])
    refused("the baseline, line 1 is in", baseline=["▁The", *EN[1:]])
    refused("every line of the hypotheses is that of the source", source=EN_OUT)
    refused("every line of the baseline is that of the source", source=ZH, baseline=ZH)


def test_what_may_be_right_is_told():
    def warned(match, hyp, refs=EN, lang="en", **more):
        found = score(hyp, refs, lang, options=FAST, **more)
        assert any(match in warning for warning in found.warnings), found.warnings
        return found

    found = warned("2 lines of the hypotheses empty", ["", *EN_OUT[1:3], " "])
    assert found.empty == 2
    warned("only 0 % of the letters of the references are of the script of zh", EN, lang="zh")
    warned("1 line of the hypotheses with <unk>", ["a <unk>", *EN_OUT[1:]])
    warned("the hypotheses and the baseline are equal", EN_OUT, baseline=list(EN_OUT))
    warned("1 line of the hypotheses copied", EN_OUT, source=[EN_OUT[0], *ZH[1:]])
    assert not score(["@@ -1 +1 @@", "a@@b <3"], ["x", "y"], "en", options=FAST).warnings
    # The pieces of a source are nobody's mistake.
    assert score(EN_OUT, EN, "en", source=["▁x"] * 4, options=FAST).bleu > 0


def test_all_empty_is_zero():
    found = score(["", ""], ["a b", "c"], "en", options=FAST)
    assert (found.bleu, found.chrf, found.ter) == (0, 0, 100)


def test_statistics_have_the_documented_shapes():
    for key, columns in [("bleu", 10), ("chrf", 18), ("ter", 2)]:
        rows = Metric.of(key, "zh", "zh", [ZH]).statistics(ZH_OUT)
        assert rows.shape == (4, columns) and rows.dtype == np.float64


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    for name, lines in [("hyp", ZH_OUT), ("ref", ZH), ("base", ZH_OUT[::-1]), ("src", EN)]:
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_command_prints_choice_signatures_and_both_tests(files, capsys):
    out = files / "scores.json"
    command.main(
        f"{files}/hyp --ref {files}/ref --lang zh --baseline {files}/base --source {files}/src "
        f"--bootstrap 100 --randomisations 200 --json {out}".split()
    )
    said = capsys.readouterr().out
    assert "4 lines of" in said and "as they are (no --normalise)" in said
    assert "tokenizer of BLEU: zh (sacreBLEU's for zh)" in said
    for text in ("|tok:zh|", "nc:6", "asian:yes", "100 resamples, 200 randomisations, seed 12345"):
        assert text in said
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["metrics"]["bleu"]["value"] == pytest.approx(score(ZH_OUT, ZH, "zh").bleu)
    assert record["comparisons"].keys() == {"bleu", "chrf"}
    assert record["files"]["baseline"] == f"{files}/base" and record["seed"] == 12345


def test_command_as_a_process_with_standard_streams(files):
    program = [sys.executable, "-m", "fairseq_ext.translation.score", "-", "--lang", "zh"]
    program += ["--ref", f"{files}/ref", "--json", "-", "--bootstrap", "50"]
    done = processes.run(program, input=(files / "hyp").read_bytes(), capture_output=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["lines"] == 4 and b"tokenizer of BLEU" in done.stderr
    (files / "hyp").write_bytes(b"a\n")
    done = processes.run(program, input=b"\xff\n", capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith(b"error: -, line 1")


def test_command_counts_lines_by_newlines_only(files, capsys):
    odd = "他\u2028有\x853\r\x0b本书。"
    (files / "hyp").write_text(f"\ufeff{odd}\n" + "".join(f"{line}\n" for line in ZH_OUT[1:]))
    command.main(f"{files}/hyp --ref {files}/ref --lang zh --metrics chrf --bootstrap 9".split())
    said = capsys.readouterr().out
    assert "4 lines of" in said and "chrF2" in said and "TER" not in said


def test_bad_usage(files):
    base = [f"{files}/hyp", "--ref", f"{files}/ref", "--lang", "zh"]
    with pytest.raises(UsageError, match="only one of the files can be -"):
        command.main(["-", "--ref", "-", "--lang", "zh"])
    with pytest.raises(UsageError, match="would overwrite"):
        command.main([*base, "--json", f"{files}/ref"])
    with pytest.raises(UsageError, match="at least 1"):
        command.main([*base, "--bootstrap", "0"])
    with pytest.raises(UserError, match="nowhere"):
        command.main([*base, "--ref", "nowhere"])
    (files / "short").write_text("一\n")
    with pytest.raises(UserError, match="hyp has 4 lines, .*short has 1"):
        command.main([*base, "--ref", f"{files}/short"])
