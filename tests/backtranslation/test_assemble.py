"""`assemble`, from a prepared bitext and synthetic folders to a folder that fairseq trains on."""

import gzip
import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from fairseq.data import indexed_dataset

from ext_common.cli import UsageError, UserError
from ext_common.folders import partial_folder
from fairseq_ext.backtranslation.assemble import build as assemble_build
from fairseq_ext.backtranslation.assemble import clean as assemble_clean
from fairseq_ext.backtranslation.assemble.__main__ import AssembleOptions, assemble, main
from fairseq_ext.backtranslation.modes import FILLER
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.prepare.__main__ import PrepareOptions, prepare
from fairseq_ext.translation.prepare.filter_chain import FILTERS
from fairseq_ext.translation.text.normalise import normalise
from fairseq_ext.translation.text.spm import EOS, UNK
from tests import processes

from .test_guards import change_manifest, toy_pairs, write_lines, write_synth

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """300 toy pairs, prepared from English to Chinese; every fourth has a literal tag or filler."""
    folder = tmp_path_factory.mktemp("bitext")
    pairs = toy_pairs(300)
    for n in range(0, 300, 4):
        word = "<BT>" if n % 8 else FILLER
        pairs[n] = f"{word} {pairs[n][0]}", f"{word}{pairs[n][1]}"
    return make_data(folder, pairs, ("en", "zh"))


@pytest.fixture(scope="module")
def reversed_data(tmp_path_factory) -> Path:
    """The same languages, prepared from Chinese to English."""
    pairs = [(zh, en) for en, zh in toy_pairs(300)]
    return make_data(tmp_path_factory.mktemp("reversed"), pairs, ("zh", "en"))


def make_data(folder, pairs, languages, **options) -> Path:
    lines = [f"{source}\t{target}" for source, target in pairs]
    settings = PrepareOptions(
        *languages, workers=1, valid_fraction=0.1, test_fraction=0.1, **options
    )
    prepare([write_lines(folder / "corpus.tsv", lines)], folder / "data", settings)
    return folder / "data"


def fresh(count, seed=7, end=" again"):
    """Pairs that no bitext of these tests holds."""
    return toy_pairs(count, seed, end)


def synth(folder, pairs=None, **more) -> Path:
    return write_synth(folder, fresh(40) if pairs is None else pairs, **more)


def run(data, synths, dest, **options):
    synths = synths if isinstance(synths, list) else [synths]
    return assemble(data, synths, dest, AssembleOptions(**{"workers": 1, **options}))


def lines(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\n")[:-1]


def ids(folder: Path, lang: str, split="train") -> list[list[int]]:
    stem = Corpus.open(folder).binarised(split, lang)
    dataset = indexed_dataset.MMapIndexedDataset(str(stem))
    return [dataset[i].tolist() for i in range(len(dataset))]


def names(folder: Path) -> list[str]:
    return lines(folder / "text" / "train.ids")


def rejects(folder: Path) -> dict[str, str]:
    """Pair → why it was left out."""
    with gzip.open(folder / "rejects.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.removesuffix("\n").split("\t") for line in file]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1] for row in rows}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_folder(folder, data, synths, upsample=1, tag="<BT>", fillers=()):
    """What must hold for every assembled folder of en ← zh; fillers: folders with mode noised-beam."""
    corpus, old = Corpus.open(folder), Corpus.open(data)
    assert corpus.languages == ("en", "zh") and set(old.languages) == {"en", "zh"}
    assert corpus.split_sha256 == old.split_sha256 and corpus.convention == old.convention
    codecs = {lang: corpus.codec(lang) for lang in corpus.languages}
    labels, bitext = names(folder), names(data) * upsample
    assert labels[: len(bitext)] == bitext
    kept = labels[len(bitext) :]
    everything = {
        f"bt{n}:{line}" + (f":{rank}" if rank > 1 else "")
        for n, (_, pairs) in enumerate(synths, 1)
        for line, (texts, _) in enumerate(pairs, 1)
        for rank in range(1, 1 if isinstance(texts, str) else len(texts) + 1)
    } | {
        f"bt{n}:{line}"
        for n, (_, pairs) in enumerate(synths, 1)
        for line in range(1, len(pairs) + 1)
    }
    assert len(set(kept)) == len(kept) and set(kept) | set(rejects(folder)) == everything
    assert not set(kept) & set(rejects(folder))
    for lang in corpus.languages:
        for name in (f"spm.{lang}.model", f"dict.{lang}.txt"):
            assert (folder / name).read_bytes() == (data / name).read_bytes()
        sentences = ids(folder, lang)
        assert len(sentences) == corpus.splits["train"] == len(labels)
        assert sentences[: len(bitext)] == ids(data, lang) * upsample
        texts = lines(corpus.text("train", lang))
        assert texts[: len(bitext)] == lines(old.text("train", lang)) * upsample
        for name in ("valid", "test"):
            for end in (".bin", ".idx"):
                theirs = Path(f"{old.binarised(name, lang)}{end}").read_bytes()
                assert Path(f"{corpus.binarised(name, lang)}{end}").read_bytes() == theirs
            assert corpus.text(name, lang).read_bytes() == old.text(name, lang).read_bytes()
            assert corpus.ids(name).read_bytes() == old.ids(name).read_bytes()
    tags = [] if tag is None else [codecs["en"].symbol_id(tag)]
    sources, targets = ids(folder, "en")[len(bitext) :], ids(folder, "zh")[len(bitext) :]
    shown = lines(corpus.text("train", "en"))[len(bitext) :]
    for label, source, target, text in zip(kept, sources, targets, shown, strict=True):
        where, line, *rank = label.split(":")
        number = int(where.removeprefix("bt"))
        path, pairs = synths[number - 1]
        texts, real = pairs[int(line) - 1]
        raw = texts if isinstance(texts, str) else texts[int(rank[0]) - 1 if rank else 0]
        assert target == [*codecs["zh"].encode(normalise(real, "zh")), EOS]
        if number in fillers:
            assert source[: len(tags)] == tags
            assert source.count(UNK) == raw.split().count(FILLER)
            words = [word for word in raw.split() if word != FILLER]
            assert codecs["en"].decode(source[len(tags) : -1]).split() == words
        else:
            assert source == [*tags, *codecs["en"].encode(normalise(raw, "en")), EOS]
            assert UNK not in source
        assert text == " ".join(([tag] if tag else []) + [normalise(raw, "en")])
        assert UNK not in target
    # nothing that is no synthetic source starts with the tag's id
    symbol = codecs["en"].symbol_id("<BT>")
    others = ids(folder, "en")[: len(bitext)] + ids(folder, "zh")
    for name in ("valid", "test"):
        others += ids(folder, "en", name) + ids(folder, "zh", name)
    assert not any(symbol in sentence for sentence in others)
    assert [sentence.count(symbol) for sentence in sources] == [len(tags)] * len(sources)


# --- the whole way ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_command(data, tmp_path):
    pairs = fresh(40)
    pairs[3], pairs[8] = ("", pairs[3][1]), ("<BT> " + pairs[8][0], pairs[8][1])
    pairs[9] = (pairs[9][0] + " <unk>", pairs[9][1])
    folder = synth(tmp_path / "s", pairs, reasons={4: "it has 812 pieces, more than 512"})
    command = [sys.executable, "-m", "fairseq_ext.backtranslation.assemble", data, folder]
    command += [tmp_path / "bt", "--tag", "<BT>", "--upsample", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = processes.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    check_folder(tmp_path / "bt", data, [(folder, pairs)], 2)
    bitext = Corpus.open(data).splits["train"]
    for said in (
        "synthetic pairs in           40",
        "leftovers                  -2  5.00 %",
        "1 it has … pieces, more than …",
        "pairs kept                   37",
        f"bitext {bitext} pairs × 2 = {2 * bitext}, synthetic 37 ({37 / (2 * bitext + 37):.1%} of train)",
        "--task translation_spm -s en -t zh",
    ):
        assert said in done.stdout
    assert rejects(tmp_path / "bt") == {
        "bt1:4": "unusable: it has 812 pieces, more than 512",
        "bt1:9": "leftovers: <BT> was left in the source",
        "bt1:10": "leftovers: <unk> was left in the source",
    }
    manifest = json.loads((tmp_path / "bt" / "manifest.json").read_text())
    assert manifest["counts"] == {"in": 40, "out": 37, "removed": {"leftovers": 2, "unusable": 1}}
    assert manifest["kind"] == "assembled"
    assert manifest["split_sha256"] == Corpus.open(data).split_sha256
    real = folder / "real.zh"
    assert manifest["inputs"][str(real)] == hashlib.sha256(real.read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bt", "s"]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_tokens_are_counted_as_they_are_written(data, tmp_path):
    folder = synth(tmp_path / "s")
    report = run(data, folder, tmp_path / "bt", upsample=3)
    bitext = Corpus.open(data).splits["train"]
    effective = report["effective"]
    assert (effective["bitext"], effective["copies"], effective["synthetic"]) == (bitext, 3, 40)
    assert effective["share"] == 40 / (3 * bitext + 40)
    for lang, tokens in effective["tokens"].items():
        sizes = [len(sentence) for sentence in ids(tmp_path / "bt", lang)]
        assert tokens["bitext"] == sum(sizes[:bitext])
        assert tokens["synthetic"] == sum(sizes[-40:]) and tokens["fillers"] == 0


def test_bitext_prepared_the_other_way_round(reversed_data, tmp_path):
    folder = synth(tmp_path / "s")
    run(reversed_data, folder, tmp_path / "bt")
    check_folder(tmp_path / "bt", reversed_data, [(folder, fresh(40))])


def test_two_models_and_another_convention(tmp_path):
    data = make_data(tmp_path, toy_pairs(300), ("en", "zh"), joint=False)
    folder = synth(tmp_path / "s")
    run(data, folder, tmp_path / "bt")
    check_folder(tmp_path / "bt", data, [(folder, fresh(40))])


def test_untagged_is_the_plain_text(data, tmp_path):
    folder = synth(tmp_path / "s")
    main([str(p) for p in (data, folder, tmp_path / "bt")] + ["--tag", "none", "--workers", "1"])
    check_folder(tmp_path / "bt", data, [(folder, fresh(40))], tag=None)


def test_both_sides_are_normalised_as_the_bitext_was(data, tmp_path):
    pairs = [("I  like ﬁsh\u200b .", "我 喜欢,鱼!"), *fresh(9)]
    folder = synth(tmp_path / "s", pairs)
    run(data, folder, tmp_path / "bt")
    check_folder(tmp_path / "bt", data, [(folder, pairs)])
    assert lines(tmp_path / "bt" / "text" / "train.en")[-10] == "<BT> I like fish ."
    assert lines(tmp_path / "bt" / "text" / "train.zh")[-10] == normalise(pairs[0][1], "zh")


def test_no_filters_keep_all_that_is_usable(data, tmp_path):
    pairs = [*fresh(9), ("<BT> <unk> ▁", "好"), ("x " * 700, "好"), ("", "好"), ("\u200b", "好")]
    pairs += [("I like it.", "\u200b"), ("</s>", "好"), ("I like it.", ""), fresh(1)[0]]
    folder = synth(tmp_path / "s", pairs)
    report = run(data, folder, tmp_path / "bt", filters="none")
    assert report["counts"] == {"in": 17, "out": 13, "removed": {"unusable": 4}}
    assert report["unusable"] == {
        "nothing is left of the real line": 2,
        "nothing is left of the synthetic line": 1,
        "the synthetic line is empty": 1,
    }
    # a literal tag is text behind the one that is put in front
    check_folder(tmp_path / "bt", data, [(folder, pairs)])


NASTY = [
    "",
    " ",
    "\t",
    "\ufeff",
    "\u200b",
    "a\u2028b\x85c\x0bd\x1ce",
    "a\tb",
    "\0",
    "👨‍👩‍👧 😀",
    "𠮷野家",
    "\U0010fffd",
    "<BT> I like",
    "▁ ▁▁",
    "<unk> <pad> </s>",
    "<0xE2><0x96>",
    "x" * 10_000,
    "。" * 700,
    "\u202e\u05e9\u05dc",
    "e\u0301" * 50,
    FILLER,
    "\ufffc",
    "trailing\r",
    "2021 3.14 1,000",
]


@pytest.mark.parametrize("filters", ["none", AssembleOptions().filters])
def test_nasty_lines_are_all_accounted_for(data, tmp_path, filters):
    """Each with each, on both sides, between good ones."""
    pairs = [(a, b) for a in NASTY for b in NASTY]
    for place, pair in enumerate(fresh(600)):
        pairs.insert(2 * place, pair)
    folder = synth(tmp_path / "s", pairs)
    report = run(data, folder, tmp_path / "bt", filters=filters, tag="<BT>")
    check_folder(tmp_path / "bt", data, [(folder, pairs)])
    counts = report["counts"]
    assert counts["in"] == len(pairs) == counts["out"] + sum(counts["removed"].values())
    empty = sum(not normalise(text, "en") for text in NASTY)
    unusable = len(NASTY) ** 2 - (len(NASTY) - empty) ** 2
    assert counts["removed"]["unusable"] == unusable > 0


# --- fillers ------------------------------------------------------------------------------------


def test_fillers_are_unknown_pieces_in_noised_text_only(data, tmp_path):
    pairs = [
        (f"I {FILLER} red {FILLER} .", "我喜欢红的苹果。"),
        (f"{FILLER} like a{FILLER}", "我喜欢鱼。"),
    ]
    pairs += fresh(9)
    both = [synth(tmp_path / "n", pairs, mode="noised-beam"), synth(tmp_path / "b", pairs)]
    filters = "empty; script; length_ratio"
    report = run(data, both, tmp_path / "bt", filters=filters)
    check_folder(tmp_path / "bt", data, [(path, pairs) for path in both], fillers=(1,))
    assert report["effective"]["tokens"]["en"]["fillers"] == 3
    assert [one["fillers"] for one in report["folders"]] == [True, False]
    assert sum(sentence.count(UNK) for sentence in ids(tmp_path / "bt", "en")) == 3


def test_noised_sources_alone_do_not_fail_the_script_of_chinese(reversed_data, tmp_path):
    """The synthetic side is Chinese, and its fillers have more Latin letters than it has characters."""
    pairs = [(zh[0] + f" {FILLER} " * 2 + zh[3:], en) for en, zh in fresh(20)]
    folder = synth(tmp_path / "n", pairs, real_lang="en", synthetic_lang="zh", mode="noised-beam")
    report = run(reversed_data, folder, tmp_path / "bt", filters="script; length_ratio")
    assert report["counts"]["out"] == 20 and report["languages"] == ["zh", "en"]
    corpus = Corpus.open(tmp_path / "bt")
    assert corpus.languages == ("zh", "en")
    assert [s.count(UNK) for s in ids(tmp_path / "bt", "zh")[-20:]] == [2] * 20


# --- filters ------------------------------------------------------------------------------------


def test_every_filter_says_what_it_removed(data, tmp_path):
    pairs = [
        *fresh(30),
        ("...", "我喜欢鱼。"),
        ("I like >>zh<< fish.", "我喜欢鱼。"),
        ("I ▁like fish.", "我喜欢鱼。"),
        ("我喜欢鱼。", "我喜欢鱼。"),
        ("fish " * 30, "我喜欢鱼和苹果还有房子。"),
        ("I like it.", "我们喜欢红的苹果他喜欢大的房子你喜欢新的书我喜欢冷的鱼我们看见大的苹果"),
        fresh(1)[0],
    ]
    folder = synth(tmp_path / "s", pairs)
    run(data, folder, tmp_path / "bt")
    check_folder(tmp_path / "bt", data, [(folder, pairs)])
    found = {name: reason.split(":")[0] for name, reason in rejects(tmp_path / "bt").items()}
    assert found == {
        "bt1:31": "empty",
        "bt1:32": "leftovers",
        "bt1:33": "leftovers",
        "bt1:34": "script",
        "bt1:35": "repetition",
        "bt1:36": "length_ratio",
        "bt1:37": "duplicate",
    }


def test_lengths_are_judged_by_the_bitext_not_by_the_synthetic_text(data, tmp_path, monkeypatch):
    """Synthetic pairs that are all too long for their sources say nothing about what is usual."""
    seen = []
    filters = FILTERS.get("ratio_quantile")
    monkeypatch.setattr(filters, "fit", lambda self, pairs: seen.extend(pairs))
    folder = synth(tmp_path / "s")
    run(data, folder, tmp_path / "bt")
    bitext = set(zip(*(lines(data / "text" / f"train.{x}") for x in ("en", "zh")), strict=True))
    assert seen and set(seen) <= bitext


def test_worst_scores_go_in_each_folder_by_itself(data, tmp_path):
    first, second = fresh(20, 7), fresh(20, 8, " so")
    scores = [[-n / 10 for n in range(20)], [-9 - n / 10 for n in range(20)]]
    scores[1][5] = None
    folders = [
        synth(tmp_path / name, pairs, scores=s, mode=mode)
        for name, pairs, s, mode in zip(
            "ab", (first, second), scores, ("beam", "sampling"), strict=True
        )
    ]
    run(data, folders, tmp_path / "bt", filters="score_quantile:q=0.2")
    worst = [f"bt1:{n}" for n in (17, 18, 19, 20)] + [f"bt2:{n}" for n in (18, 19, 20)]
    assert set(rejects(tmp_path / "bt")) == set(worst)


def test_filter_of_a_plugin_with_every_hook(data, tmp_path, monkeypatch):
    plugin = tmp_path / "my_synthetic_filters"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(
        '''
from fairseq_ext.translation.prepare.filter_chain import FILTERS

@FILTERS.register("hooks")
class Hooks:
    """Tests."""
    wants_score = stateful = True
    def __init__(self, languages):
        assert languages == ("en", "zh")
    def setup(self, context):
        self.symbols = context.symbols
    def fit_scores(self, scores):
        self.best = max(scores)
    def __call__(self, source, target, score):
        return f"best of {self.symbols[0]}" if score == self.best else None
'''
    )
    pairs = fresh(9)
    folder = synth(tmp_path / "s", pairs, scores=[-1.0] * 8 + [-0.5])
    run(data, folder, tmp_path / "bt", filters="hooks", user_dir=str(plugin))
    assert rejects(tmp_path / "bt") == {"bt1:9": "hooks: best of <BT>"}


def test_round_trip_goes_through_what_the_others_leave(data, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from fairseq_ext.translation.decode.translator import Translator

    pairs = fresh(12)
    answers = dict(pairs)
    answers[pairs[4][0]] = "下雨了"
    asked = []

    class Forward:
        vocabulary = SimpleNamespace(source_lang="en", target_lang="zh")

        def __call__(self, sources, beam):
            asked.extend(sources)
            return [answers[source] for source in sources]

    monkeypatch.setattr(Translator, "from_checkpoint", lambda *_, **__: Forward())
    monkeypatch.setattr(assemble_clean, "BATCH", 5)
    folder = synth(tmp_path / "s", [*pairs, pairs[0], ("<unk>", "好")])
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    filters = "leftovers; duplicate; round_trip:min=50"
    options = {"filters": filters, "forward": str(tmp_path / "ckpt.pt")}
    run(data, folder, tmp_path / "bt", **options)
    assert asked == [source for source, _ in pairs]
    found = {name: reason.split(":")[0] for name, reason in rejects(tmp_path / "bt").items()}
    assert found == {"bt1:5": "round_trip", "bt1:13": "duplicate", "bt1:14": "leftovers"}
    # another forward model is another plan
    (tmp_path / "ckpt.pt").write_bytes(b"y")
    with pytest.raises(UserError, match="--overwrite"):
        run(data, folder, tmp_path / "bt", **options)


def test_forward_model_and_its_filter_belong_together(data, tmp_path):
    folder = synth(tmp_path / "s")
    with pytest.raises(UsageError, match="--forward is for the filter round_trip"):
        run(data, folder, tmp_path / "bt", forward="x.pt")
    with pytest.raises(UsageError, match="needs a forward model"):
        run(data, folder, tmp_path / "bt", filters="round_trip")
    with pytest.raises(UserError, match=r"x\.pt does not exist"):
        run(data, folder, tmp_path / "bt", filters="round_trip", forward="x.pt")
    assert not (tmp_path / "bt").exists()


# --- leaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("side", [0, 1])
def test_held_out_lines_are_kept_out(data, tmp_path, split, side):
    held = lines(data / "text" / f"{split}.{('en', 'zh')[side]}")[2]
    pairs = fresh(20)
    pairs[6] = (held.upper() + "!!", pairs[6][1]) if side == 0 else (pairs[6][0], f" {held} ")
    folder = synth(tmp_path / "s", pairs)
    report = run(data, folder, tmp_path / "bt", filters="none")
    assert report["counts"]["removed"] == {"leak": 1}
    assert rejects(tmp_path / "bt") == {
        "bt1:7": f"leak: {('en', 'zh')[side]}: it is a line of valid or test"
    }
    check_folder(tmp_path / "bt", data, [(folder, pairs)])
    with pytest.raises(UserError, match=r"1 synthetic pairs hold .*bt1:7.*--on-leak remove"):
        run(data, folder, tmp_path / "refused", filters="none", on_leak="refuse")
    assert not (tmp_path / "refused").exists() and not partial_folder(tmp_path / "refused").exists()


def test_held_out_line_is_found_behind_fillers(data, tmp_path):
    held = lines(data / "text" / "test.en")[2]
    pairs = [(f"{FILLER} {held} {FILLER}", fresh(1)[0][1]), *fresh(9, 8)]
    folder = synth(tmp_path / "s", pairs, mode="noised-beam")
    assert run(data, folder, tmp_path / "bt")["counts"]["removed"]["leak"] == 1


# --- several folders, several outputs -----------------------------------------------------------


def test_rounds_and_n_best(data, tmp_path):
    first = [([en, en.replace("again", "anew")], zh) for en, zh in fresh(12)]
    second = fresh(9, 9, " so")
    synths = [
        (synth(tmp_path / "a", first), first),
        (synth(tmp_path / "b", second, mode="topk", round=2), second),
    ]
    report = run(data, [path for path, _ in synths], tmp_path / "bt", upsample=2)
    check_folder(tmp_path / "bt", data, synths, 2)
    assert report["counts"]["in"] == 33 and report["counts"]["out"] == 33
    labels = names(tmp_path / "bt")[-33:]
    assert labels[:4] == ["bt1:1", "bt1:1:2", "bt1:2", "bt1:2:2"] and labels[-1] == "bt2:9"
    assert [one["round"] for one in report["folders"]] == [1, 2]


def test_folder_of_the_other_direction_among_several_is_refused(data, tmp_path):
    one = synth(tmp_path / "a")
    other = synth(
        tmp_path / "b", [(zh, en) for en, zh in fresh(9)], real_lang="en", synthetic_lang="zh"
    )
    with pytest.raises(UserError, match="one folder for each direction"):
        run(data, [one, other], tmp_path / "bt")


def test_swapped_set_is_refused_and_leaves_nothing(data, tmp_path):
    folder = synth(tmp_path / "s", [(zh, en) for en, zh in fresh(20)])
    with pytest.raises(UserError, match="the two sides are exchanged"):
        run(data, folder, tmp_path / "bt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_draw_is_random_and_grows(data, tmp_path):
    pairs = [fresh(30), fresh(30, 9, " so")]
    folders = [synth(tmp_path / name, p) for name, p in zip("ab", pairs, strict=True)]
    drawn = {}
    for most in (10, 25, 60, 99):
        report = run(data, folders, tmp_path / f"bt{most}", max_synthetic=most)
        check_folder(tmp_path / f"bt{most}", data, list(zip(folders, pairs, strict=True)))
        drawn[most] = {name for name in names(tmp_path / f"bt{most}") if ":" in name}
        assert report["counts"]["out"] == len(drawn[most]) == min(most, 60)
        assert report["counts"]["removed"].get("max_synthetic", 0) == 60 - min(most, 60)
    assert drawn[10] < drawn[25] < drawn[60] == drawn[99]
    run(data, folders, tmp_path / "other", max_synthetic=10, seed=2)
    assert {name for name in names(tmp_path / "other") if ":" in name} != drawn[10]
    # not the first ones, nor one folder
    numbers = sorted(int(name.split(":")[1]) for name in drawn[25])
    assert numbers[-1] > 20 and Counter(name[:3] for name in drawn[25]).keys() == {"bt1", "bt2"}


# --- runs ---------------------------------------------------------------------------------------


def test_any_number_of_workers_writes_the_same_bytes(data, tmp_path, monkeypatch):
    from fairseq_ext.translation.prepare import binarise

    pairs = [([en, en], zh) for en, zh in fresh(150)] + [(["", "x"], "好")] * 7
    folders = [
        synth(tmp_path / "a", pairs),
        synth(tmp_path / "b", fresh(90, 9), mode="noised-beam"),
    ]
    options = {"upsample": 2, "max_synthetic": 200, "filters": "empty; score_quantile; duplicate"}
    run(data, folders, tmp_path / "one", **options)
    monkeypatch.setattr(assemble_clean, "BATCH", 13)
    monkeypatch.setattr(binarise, "PART_BYTES", 700)
    monkeypatch.setattr(assemble_build, "cpus", lambda: pytest.fail("workers are given"))
    monkeypatch.setattr(binarise.binarise, "__defaults__", (1, 700))
    run(data, folders, tmp_path / "two", workers=2, **options)
    run(data, folders, tmp_path / "three", workers=3, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")


def test_finished_folder_is_left_alone_and_another_plan_refused(data, tmp_path, capsys):
    folder = synth(tmp_path / "s")
    first = run(data, folder, tmp_path / "bt")
    before = tree(tmp_path / "bt")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "bt").rglob("*")}
    # elsewhere, with the same content
    moved = folder.rename(tmp_path / "moved")
    assert run(data, moved, tmp_path / "bt", workers=2) == json.loads(json.dumps(first))
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bt").rglob("*")} == stamps
    with pytest.raises(UserError, match="was prepared with --upsample 1, not 2: use --overwrite"):
        run(data, moved, tmp_path / "bt", upsample=2)
    with pytest.raises(UserError, match="was prepared with --tag <BT>, not none"):
        run(data, moved, tmp_path / "bt", tag=None)
    other = synth(tmp_path / "other", fresh(20, 9))
    with pytest.raises(UserError, match="other files or other content"):
        run(data, other, tmp_path / "bt")
    assert tree(tmp_path / "bt") == before
    run(data, other, tmp_path / "bt", overwrite=True)
    check_folder(tmp_path / "bt", data, [(other, fresh(20, 9))])


def test_mode_of_the_manifest_is_part_of_the_plan(data, tmp_path):
    folder = synth(tmp_path / "s", [(f"I {FILLER} fish.", "我喜欢鱼。"), *fresh(9)])
    run(data, folder, tmp_path / "bt", filters="none")
    change_manifest(folder, mode={"name": "noised-beam"})
    with pytest.raises(UserError, match="--overwrite"):
        run(data, folder, tmp_path / "bt", filters="none")


def test_failure_leaves_nothing(data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(assemble_build, "write_text", fail)
    folder = synth(tmp_path / "s")
    with pytest.raises(RuntimeError):
        run(data, folder, tmp_path / "bt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


# --- mistakes -----------------------------------------------------------------------------------


def test_paths_that_are_no_input_or_output(data, tmp_path):
    folder = synth(tmp_path / "s")
    for dest in (data, folder):
        before = tree(dest)
        with pytest.raises(UsageError, match="to be read and to be written"):
            run(data, folder, dest, overwrite=True)
        assert tree(dest) == before
    with pytest.raises(UsageError, match="given twice"):
        run(data, [folder, folder], tmp_path / "bt")
    with pytest.raises(UsageError, match="no synthetic folder"):
        run(data, [], tmp_path / "bt")
    with pytest.raises(UserError, match="nowhere does not exist"):
        run(data, tmp_path / "nowhere", tmp_path / "bt")
    with pytest.raises(UserError, match="is no prepared bitext"):
        run(folder, synth(tmp_path / "t"), tmp_path / "bt")
    with pytest.raises(UserError, match="holds no synthetic text"):
        run(data, make_copy(data, tmp_path / "copy"), tmp_path / "bt")


def make_copy(data, folder):
    import shutil

    return Path(shutil.copytree(data, folder))


def test_assembled_folder_is_no_bitext(data, tmp_path):
    run(data, synth(tmp_path / "s"), tmp_path / "bt")
    with pytest.raises(UserError, match="holds synthetic pairs already: give the prepared bitext"):
        run(tmp_path / "bt", synth(tmp_path / "t"), tmp_path / "again")


def test_unknown_tag_is_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"no symbol <XX> \(known: <BT>\)"):
        run(data, synth(tmp_path / "s"), tmp_path / "bt", tag="<XX>")
    assert not (tmp_path / "bt").exists()


def test_damaged_dictionary_is_refused(data, tmp_path):
    copy = make_copy(data, tmp_path / "copy")
    path = copy / "dict.zh.txt"
    content = lines(path)
    content[300], content[301] = content[301], content[300]
    write_lines(path, content)
    with pytest.raises(UserError, match=r"dict\.zh\.txt does not give the ids"):
        run(copy, synth(tmp_path / "s"), tmp_path / "bt")


def test_nothing_left_is_an_error(data, tmp_path):
    pairs = [("", zh) for _, zh in fresh(6)] + [("<unk>", "好")] * 2
    with pytest.raises(UserError, match=r"none of 8 synthetic pairs .*unusable 6, leftovers 2"):
        run(data, synth(tmp_path / "s", pairs), tmp_path / "bt", filters="leftovers")


@pytest.mark.parametrize(
    "options", [{"upsample": 0}, {"max_synthetic": 0}, {"workers": 0}, {"seed": -1}]
)
def test_options_that_cannot_be(options):
    with pytest.raises(ValueError):
        AssembleOptions(**options)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("direction", [["-s", "en", "-t", "zh"], []])
def test_fairseq_trains_on_it(data, tmp_path, direction):
    pairs = fresh(60)
    pairs[5] = (f"I {FILLER} fish again.", pairs[5][1])
    folder = synth(tmp_path / "s", pairs, mode="noised-beam")
    run(data, folder, tmp_path / "bt", upsample=2)
    total = Corpus.open(tmp_path / "bt").splits["train"]
    flags = f"""{tmp_path}/bt --user-dir {ROOT}/fairseq_ext --task translation_spm --arch transformer
        --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32
        --encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2
        --decoder-attention-heads 2 --share-all-embeddings --optimizer adam --lr-scheduler noam
        --warmup-updates 10 --criterion label_smoothed_cross_entropy --label-smoothing 0.1
        --max-tokens 1000 --max-update 5 --num-workers 0 --cpu --no-progress-bar --log-format json
        --save-dir {tmp_path}/ckpt"""
    call = [Path(sys.executable).with_name("fairseq-train"), *flags.split(), *direction]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = processes.run(list(map(str, call)), capture_output=True, text=True, env=env)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "en → zh" in said
    examples = re.findall(r"bt (\w+) en-zh (\d+) examples", said)
    assert ("train", str(total)) in examples
    # what was trained can judge the next round
    forward = {"forward": f"{tmp_path}/ckpt/checkpoint_last.pt", "filters": "round_trip:min=0"}
    assert run(data, folder, tmp_path / "next", **forward)["counts"]["out"] == 60
    forward["filters"] = "round_trip:min=100"
    with pytest.raises(UserError, match="removed: round_trip 60"):
        run(data, folder, tmp_path / "none", **forward)
    forward["filters"] = "round_trip"
    other = synth(
        tmp_path / "r", [(zh, en) for en, zh in fresh(9)], real_lang="en", synthetic_lang="zh"
    )
    with pytest.raises(UserError, match="translates en to zh, the round trip needs zh to en"):
        run(data, other, tmp_path / "none", **forward)
