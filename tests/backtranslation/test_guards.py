"""Sets that are the wrong way round, unfinished or damaged are refused; right ones pass."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from ext_common.cli import UserError
from fairseq_ext.backtranslation.assemble.checks import (
    check_direction,
    check_one_direction,
    check_scripts,
    hash_files,
    typical_share,
)
from fairseq_ext.backtranslation.assemble.synthetic import Pair, Synthetic

from .conftest import WORDS


def toy_pairs(count: int, seed: int = 1, end: str = "") -> list[tuple[str, str]]:
    """Different (English, Chinese) pairs; `end` keeps those of one call from those of another."""
    rng = random.Random(seed)
    who, does, how, what = (list(WORDS)[i : i + 4] for i in range(0, 16, 4))
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        words = [rng.choice(who), rng.choice(does), rng.choice(how), rng.choice(what)]
        words += [rng.choice(how + what) for _ in range(rng.randrange(5))]
        target = "".join(WORDS[word] for word in words)
        pairs[" ".join(words) + end + "."] = target + end + "。"
    return list(pairs.items())


def write_lines(path: Path, lines) -> Path:
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def write_synth(
    folder: Path,
    pairs,
    real_lang="zh",
    synthetic_lang="en",
    mode="beam",
    scores=None,
    reasons=None,
    round=1,
    **manifest,
) -> Path:
    """A folder as `generate` leaves it. pairs: (synthetic line or list of n best, real line)."""
    folder.mkdir(parents=True)
    outputs = [[text] if isinstance(text, str) else list(text) for text, _ in pairs]
    nbest = max(map(len, outputs), default=1)
    real = write_lines(folder / f"real.{real_lang}", [text for _, text in pairs])
    for rank in range(1, nbest + 1):
        name = f"synthetic.{synthetic_lang}" if rank == 1 else f"synthetic.{rank}.{synthetic_lang}"
        write_lines(folder / name, [texts[rank - 1] for texts in outputs])
    scores = scores or [-0.5 if nbest == 1 else [-0.5] * nbest for _ in pairs]
    records = [
        {"line": n, "model": "0" * 16, "mode": mode, "round": round, "score": score}
        for n, score in enumerate(scores, 1)
    ]
    write_lines(folder / "provenance.jsonl", map(json.dumps, records))
    rejects = [
        {
            "line": n,
            **(
                {"rank": reason[0], "reason": reason[1]}
                if isinstance(reason, tuple)
                else {"reason": reason}
            ),
        }
        for n, reason in sorted((reasons or {}).items())
    ]
    write_lines(folder / "rejects.jsonl", map(json.dumps, rejects))
    meta = {
        "kind": "synthetic",
        "real_lang": real_lang,
        "synthetic_lang": synthetic_lang,
        "lines": len(pairs),
        "real_sha256": hashlib.sha256(real.read_bytes()).hexdigest(),
        "model": {"source_lang": real_lang, "target_lang": synthetic_lang},
        "mode": {"name": mode},
        "round": round,
        "nbest": nbest,
    }
    (folder / "manifest.json").write_text(json.dumps({**meta, **manifest}))
    return folder


def change_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def guard(folder: Path, languages=("en", "zh"), bitext=None):
    """All checks that assemble makes of a folder."""
    synthetic = Synthetic.open(folder)
    direction = check_direction(synthetic, languages)
    hash_files(synthetic)
    pairs = [(pair.synthetic, pair.real) for pair in synthetic.pairs() if not pair.reason]
    check_scripts(synthetic, direction, pairs, toy_pairs(50) if bitext is None else bitext)
    return direction


# --- direction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("languages", [("en", "zh"), ("zh", "en")])
def test_right_set_passes_whichever_way_the_bitext_was_prepared(tmp_path, languages):
    assert guard(write_synth(tmp_path / "s", toy_pairs(30)), languages) == ("en", "zh")


def test_exchanged_files_are_refused(tmp_path):
    swapped = [(zh, en) for en, zh in toy_pairs(30)]
    folder = write_synth(tmp_path / "s", swapped)
    with pytest.raises(
        UserError, match=r"s: the two sides are exchanged \(synthetic\.en is 100% zh"
    ):
        guard(folder)


def test_exchanged_files_are_refused_by_their_hash_too(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(30))
    (folder / "real.zh").rename(folder / "x")
    (folder / "synthetic.en").rename(folder / "real.zh")
    (folder / "x").rename(folder / "synthetic.en")
    with pytest.raises(UserError, match=r"real\.zh is not the text that was translated"):
        guard(folder)


def test_exchanged_languages_of_the_manifest_are_refused(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(30))
    change_manifest(folder, real_lang="en", synthetic_lang="zh")
    with pytest.raises(UserError, match=r"real\.en is missing, though .*manifest\.json names"):
        guard(folder)
    # the files renamed to fit, the model still contradicts
    (folder / "real.zh").rename(folder / "real.en")
    (folder / "synthetic.en").rename(folder / "synthetic.zh")
    with pytest.raises(UserError, match="the real text is en, but the reverse model reads zh"):
        guard(folder)
    # and all metadata exchanged, the text does
    change_manifest(folder, model={"source_lang": "en", "target_lang": "zh"})
    with pytest.raises(UserError, match="the two sides are exchanged"):
        guard(folder)


@pytest.mark.parametrize("model", [{}, {"source_lang": "zh", "target_lang": "de"}])
def test_model_of_other_languages_is_refused(tmp_path, model):
    folder = write_synth(tmp_path / "s", toy_pairs(5), model=model)
    with pytest.raises(UserError, match="but the reverse model"):
        guard(folder)


def test_languages_of_another_bitext_are_refused(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(5))
    with pytest.raises(UserError, match="of zh and en, the bitext of en and de"):
        guard(folder, ("en", "de"))


def test_other_codes_of_the_same_language_are_understood(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(5), real_lang="cmn", synthetic_lang="eng")
    assert guard(folder) == ("en", "zh")
    # but not where two of the bitext could be meant
    with pytest.raises(UserError, match="languages of the bitext"):
        guard(folder, ("zh_Hans", "zh_Hant"))


def test_folders_of_two_directions_are_refused():
    same = {"a": ("en", "zh"), "b": ("en", "zh")}
    assert check_one_direction(same) == ("en", "zh")
    with pytest.raises(UserError, match="synthetic side of a is en, of c zh"):
        check_one_direction({**same, "c": ("zh", "en")})


# --- script -------------------------------------------------------------------------------------


def test_text_of_a_third_language_is_refused(tmp_path):
    russian = [("я люблю книги.", zh) for _, zh in toy_pairs(20)]
    with pytest.raises(UserError, match=r"synthetic\.en: 0% of the letters .* of en"):
        guard(write_synth(tmp_path / "s", russian))


def test_japanese_and_chinese_exchanged_are_refused_though_han_is_both(tmp_path):
    japanese, chinese = "私はりんごを食べました。", "我昨天吃了苹果。"
    right = write_synth(tmp_path / "a", [(japanese, chinese)] * 9, "zh", "ja")
    bitext = [(japanese, chinese)] * 9
    assert guard(right, ("ja", "zh"), bitext) == ("ja", "zh")
    wrong = write_synth(tmp_path / "b", [(chinese, japanese)] * 9, "zh", "ja")
    with pytest.raises(UserError, match="exchanged"):
        guard(wrong, ("ja", "zh"), bitext)


def test_a_few_foreign_lines_do_not_condemn_a_set(tmp_path):
    pairs = (
        toy_pairs(20) + [("红的苹果", "https://example.org/" + "a" * 5000)] * 8 + [("!", "？")] * 9
    )
    assert guard(write_synth(tmp_path / "s", pairs)) == ("en", "zh")


def test_lines_without_letters_say_nothing(tmp_path):
    # a share of 1.0 for each of them would hide the swap
    swapped = [(zh, en) for en, zh in toy_pairs(20)] + [("123", "…")] * 100
    with pytest.raises(UserError, match="exchanged"):
        guard(write_synth(tmp_path / "s", swapped))


def test_what_the_bitext_looks_like_counts(tmp_path):
    """Tatar in Latin letters has a share of 0, and so has its bitext."""
    pairs = [("I read a book.", "Min kitap uqıym.")] * 9
    assert typical_share(["Min kitap uqıym."], "tt") == 0
    folder = write_synth(tmp_path / "s", pairs, "tt", "en")
    assert guard(folder, ("en", "tt"), pairs) == ("en", "tt")
    cyrillic = [("I read a book.", "Мин китап укыйм.")] * 9
    with pytest.raises(UserError):
        guard(folder, ("en", "tt"), cyrillic)


def test_latin_words_in_chinese_count_as_one_letter():
    assert typical_share(["我喜欢iPhone"], "zh") == 0.75
    assert typical_share(["!", "…", "123"], "zh") == 1.0


def test_one_script_is_checked_by_metadata_alone(tmp_path):
    swapped = [("Ich lese.", "I read.")] * 9
    folder = write_synth(tmp_path / "s", swapped, "de", "en")
    assert guard(folder, ("en", "de"), [("I read.", "Ich lese.")]) == ("en", "de")
    change_manifest(folder, model={"source_lang": "en", "target_lang": "de"})
    with pytest.raises(UserError, match="reverse model reads en"):
        guard(folder, ("en", "de"))


# --- the folder ---------------------------------------------------------------------------------


def test_pairs_in_order_with_scores_and_reasons(tmp_path):
    pairs = [(["a", "b"], "甲"), (["", ""], "乙"), (["c", ""], "丙")]
    scores = [[-0.25, -1], None, [-2.0, None]]
    reasons = {2: "too long", 3: (2, "cut")}
    synthetic = Synthetic.open(write_synth(tmp_path / "s", pairs, scores=scores, reasons=reasons))
    assert list(synthetic.pairs()) == [
        Pair(1, 1, "甲", "a", -0.25, None),
        Pair(1, 2, "甲", "b", -1.0, None),
        Pair(2, 1, "乙", "", None, "too long"),
        Pair(2, 2, "乙", "", None, "too long"),
        Pair(3, 1, "丙", "c", -2.0, None),
        Pair(3, 2, "丙", "", None, "cut"),
    ]


def test_only_a_newline_ends_a_line(tmp_path):
    odd = [("a\u2028b\x85c\x0bd", "甲\u2028乙"), ("e", "丙\r")]
    found = list(Synthetic.open(write_synth(tmp_path / "s", odd)).pairs())
    assert [pair.real for pair in found] == ["甲\u2028乙", "丙"]
    assert found[0].synthetic == "a\u2028b\x85c\x0bd"


def test_last_line_may_lack_its_newline(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(3))
    real = folder / "real.zh"
    real.write_bytes(real.read_bytes()[:-1])
    change_manifest(folder, real_sha256=hashlib.sha256(real.read_bytes()).hexdigest())
    assert guard(folder) == ("en", "zh")


def test_changed_real_text_is_refused(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(5))
    with open(folder / "real.zh", "ab") as file:
        file.write(b"\r")
    with pytest.raises(UserError, match=r"real\.zh is not the text that was translated"):
        guard(folder)


@pytest.mark.parametrize("name", ["real.zh", "synthetic.en", "synthetic.2.en", "provenance.jsonl"])
@pytest.mark.parametrize("change", [-1, 1])
def test_uneven_files_are_refused(tmp_path, name, change):
    folder = write_synth(tmp_path / "s", [([en, en], zh) for en, zh in toy_pairs(6)])
    kept = (folder / name).read_text("utf-8").split("\n")[:-1]
    write_lines(folder / name, kept[:-1] if change < 0 else [*kept, kept[-1]])
    more = "only 5" if change < 0 else "more than 6"
    with pytest.raises(UserError, match=rf"{name} has {more} lines, .*manifest\.json says 6"):
        list(Synthetic.open(folder).pairs())


@pytest.mark.parametrize("says, found", [(5, "more than 5"), (7, "only 6")])
def test_another_number_of_lines_than_the_manifest_says(tmp_path, says, found):
    folder = write_synth(tmp_path / "s", toy_pairs(6), lines=says)
    with pytest.raises(UserError, match=f"real.zh has {found} lines, .*says {says}"):
        list(Synthetic.open(folder).pairs())


def test_unfinished_folders_are_refused(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(3))
    (folder / ".work").mkdir()
    with pytest.raises(UserError, match="not finished .*generate again"):
        Synthetic.open(folder)
    (folder / ".work").rmdir()
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished .*generate again"):
        Synthetic.open(folder)
    with pytest.raises(UserError, match="does not exist"):
        Synthetic.open(tmp_path / "none")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"kind": "speaker"}, "holds no synthetic text"),
        ({"real_lang": 3}, "no usable real_lang"),
        ({"mode": {}}, "no usable mode"),
        ({"nbest": 0}, "no usable nbest"),
        ({"nbest": 2}, r"synthetic\.2\.en is missing"),
    ],
)
def test_other_manifests_are_refused(tmp_path, changes, said):
    folder = write_synth(tmp_path / "s", toy_pairs(3), **changes)
    with pytest.raises(UserError, match=said):
        Synthetic.open(folder)


def test_damaged_records_are_refused(tmp_path):
    folder = write_synth(tmp_path / "s", toy_pairs(3), reasons={1: "x", 2: "y"})
    rejects = folder / "rejects.jsonl"
    write_lines(rejects, rejects.read_text().split("\n")[1::-1])
    with pytest.raises(UserError, match=r"rejects\.jsonl is not in the order of the lines"):
        list(Synthetic.open(folder).pairs())
    write_lines(rejects, [])
    records = (folder / "provenance.jsonl").read_text().split("\n")[:-1]
    write_lines(folder / "provenance.jsonl", [records[1], records[0], records[2]])
    with pytest.raises(UserError, match="provenance.jsonl, line 1 is about line 2"):
        list(Synthetic.open(folder).pairs())
    write_lines(folder / "provenance.jsonl", ["{", "{}", "{}"])
    with pytest.raises(UserError, match="provenance.jsonl, line 1 is no JSON object"):
        list(Synthetic.open(folder).pairs())
