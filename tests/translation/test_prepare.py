"""`translation.prepare`, from files to a folder that fairseq trains on."""

import errno
import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from fairseq.data import Dictionary, indexed_dataset

from ext_common import folders
from ext_common.cli import UsageError, UserError
from ext_common.folders import partial_folder
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.prepare import build as prepare_build
from fairseq_ext.translation.prepare.__main__ import PrepareOptions, main, prepare
from fairseq_ext.translation.prepare.binarise import sentence_lengths
from fairseq_ext.translation.prepare.hashes import key_hash
from fairseq_ext.translation.prepare.splits import split_sha256
from fairseq_ext.translation.text.normalise import match_key, normalise, opencc, read_pairs
from tests import processes

from .conftest import ROOT, fairseq

WHO = {"Tom": "汤姆", "Mary": "玛丽", "my sister": "我妹妹", "the old man": "那位老人", "she": "她"}
DOES = {"likes": "喜欢", "sells": "卖", "draws": "画", "looks for": "在找", "forgot": "忘了"}
HOW = {"red": "红色的", "small": "小的", "expensive": "昂贵的", "two": "两个", "my": "我的"}
WHAT = {
    "apples": "苹果",
    "books": "书",
    "houses": "房子",
    "cats 😀": "猫😀",
    "dragons": "龘龙",
    "maps": "地图",
}


def bitext(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Pairs from templates; some share their Chinese, as in Tatoeba."""
    combinations = list(product(WHO, DOES, HOW, WHAT))
    random.Random(seed).shuffle(combinations)
    pairs = []
    for who, does, how, what in combinations[:count]:
        target = f"{WHO[who]}{DOES[does]}{HOW[how]}{WHAT[what]}。"
        pairs.append((f"{who.capitalize()} {does} {how} {what}.", target))
        if len(pairs) % 12 == 0:
            pairs.append((f"It is {how} {what} that {who} {does}.", target))
    return pairs[:count]


def tsv(path: Path, pairs) -> Path:
    path.write_bytes("".join(f"{source}\t{target}\n" for source, target in pairs).encode())
    return path


def parallel(folder: Path, pairs, name="x") -> list[Path]:
    paths = [folder / f"{name}.en", folder / f"{name}.zh"]
    for path, lines in zip(paths, zip(*pairs, strict=True), strict=True):
        path.write_bytes("".join(line + "\n" for line in lines).encode())
    return paths


def run(inputs, dest, **options):
    """prepare() from English to Chinese in one process unless said otherwise."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    options = {"source_lang": "en", "target_lang": "zh", "workers": 1, **options}
    return prepare(inputs, dest, PrepareOptions(**options))


def lines(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\n")[:-1]


def splits(data: Path) -> dict[str, list[tuple[int, str, str]]]:
    """split → (input line, source, target) of each pair."""
    corpus = Corpus.open(data)
    return {
        name: list(
            zip(
                map(int, lines(corpus.ids(name))),
                *(lines(corpus.text(name, lang)) for lang in corpus.languages),
                strict=True,
            )
        )
        for name in corpus.splits
    }


def rejects(data: Path) -> list[list[str]]:
    with gzip.open(data / "rejects.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        return [line.removesuffix("\n").split("\t") for line in file]


def ids(data: Path, split: str, lang: str) -> list[list[int]]:
    dataset = indexed_dataset.MMapIndexedDataset(str(Corpus.open(data).binarised(split, lang)))
    return [dataset[i].tolist() for i in range(len(dataset))]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_folder(data: Path, inputs, columns=(1, 2), strict_split=True):
    """What must hold for every prepared folder."""
    corpus = Corpus.open(data)
    found = splits(data)
    raw = {number: pair for number, *pair in read_pairs(inputs, columns)}
    seen = [number for rows in found.values() for number, *_ in rows]
    seen += [int(row[0]) for row in rejects(data)]
    assert sorted(seen) == sorted(raw)
    for name, rows in found.items():
        assert len(rows) == corpus.splits[name]
        assert [number for number, *_ in rows] == sorted(number for number, *_ in rows)
        for number, *pair in rows:
            for lang, given, text in zip(corpus.languages, raw[number], pair, strict=True):
                assert text == normalise(given, lang, corpus.normalise)
    for lang in corpus.languages:
        codec = corpus.codec(lang)
        dictionary = Dictionary.load(str(corpus.dictionary_path(lang)))
        assert dictionary.symbols == codec.pieces(range(codec.size))
        for name in found:
            sentences = ids(data, name, lang)
            assert [codec.decode(sentence) for sentence in sentences] == lines(
                corpus.text(name, lang)
            )
            flat = np.concatenate(sentences)
            assert (flat == 2).sum() == len(sentences) and {
                sentence[-1] for sentence in sentences
            } == {2}
            assert not np.isin(flat, [0, 1, 3]).any()
            for symbol in corpus.extra_symbols:
                assert codec.symbol_id(symbol) not in flat
    if strict_split:
        for side in (1, 2):
            keys = {name: {match_key(row[side]) for row in rows} for name, rows in found.items()}
            for name in keys:
                for other in keys:
                    assert name == other or not keys[name] & keys[other]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(input, prepared folder) of 600 pairs."""
    folder = tmp_path_factory.mktemp("small")
    source = tsv(folder / "corpus.tsv", bitext(600))
    run(source, folder / "data")
    return source, folder / "data"


# --- the whole way ------------------------------------------------------------------------------


def test_the_real_command(tmp_path):
    pairs = bitext(600) + [("Tom is here.", ""), ("好的", "好的"), ("", "空")] + bitext(5)
    source = tsv(tmp_path / "corpus.tsv", pairs)
    command = [sys.executable, "-m", "fairseq_ext.translation.prepare", source, tmp_path / "data"]
    command += ["--source-lang", "en", "--target-lang", "zh"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = processes.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    check_folder(tmp_path / "data", [source])
    report = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert report["counts"] == {
        "in": 608,
        "out": 600,
        "removed": {"duplicate": 5, "empty": 2, "script": 1},
    }
    assert [row[:2] for row in rejects(tmp_path / "data")][:3] == [
        ["601", "empty: the target is empty"],
        ["602", "script: 0% of 2 letters of the source are of en: the sides may be swapped"],
        ["603", "empty: the source is empty"],
    ]
    for said in (
        "pairs in                    608",
        "duplicate",
        "0.0000 %",
        report["split_sha256"],
    ):
        assert said in done.stdout
    assert "fairseq-train" in done.stdout and "--task translation_spm" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.tsv", "data"]


def test_real_sentences(shared_data, tmp_path):
    with open(shared_data / "cmn-eng" / "cmn.txt", "rb") as file:
        rows = [line for number, line in enumerate(file) if number % 20 == 0]
    source = tmp_path / "cmn.txt"
    source.write_bytes(b"".join(rows))
    report = run(source, tmp_path / "data", workers=2)
    check_folder(tmp_path / "data", [source])
    assert report["counts"]["in"] == len(rows) == 1458
    assert report["counts"]["out"] > 1440
    assert report["splits"]["valid"]["pairs"] >= 100 and report["splits"]["test"]["pairs"] >= 100
    assert sum(split["pairs"] for split in report["splits"].values()) == report["counts"]["out"]


def test_split_hash_is_that_of_the_texts(small):
    codes, keys = [], ([], [])
    for code, name in enumerate(("train", "valid", "test")):
        for _, *pair in splits(small[1])[name]:
            codes.append(code)
            for column, text in zip(keys, pair, strict=True):
                column.append(key_hash(text))
    arrays = [np.array(column, dtype=np.uint64) for column in keys]
    expected = split_sha256(np.array(codes), *arrays)
    assert Corpus.open(small[1]).split_sha256 == expected
    assert json.loads((small[1] / "manifest.json").read_text())["split_sha256"] == expected


def test_tokens_in_the_report_are_those_in_the_files(small):
    report = json.loads((small[1] / "manifest.json").read_text())["report"]
    for name, split in report["splits"].items():
        for lang in ("en", "zh"):
            sentences = ids(small[1], name, lang)
            assert split["tokens"][lang] == sum(map(len, sentences))
            lengths = sentence_lengths(Corpus.open(small[1]).binarised(name, lang))
            assert split["tokens"][lang] == lengths.sum()
            assert split["pairs"] == len(sentences)
            assert split["unknown"][lang] == 0


@pytest.mark.parametrize("source, target", [("en", "zh"), ("zh", "en"), (None, None)])
def test_fairseqs_own_task_reads_both_directions(small, source, target):
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    languages = {"source_lang": source, "target_lang": target}
    cfg = TranslationConfig(data=str(small[1]), dataset_impl=None, **languages)
    task = TranslationTask.setup_task(cfg)
    corpus = Corpus.open(small[1])
    for split in ("train", "valid", "test"):
        task.load_dataset(split)
        dataset = task.dataset(split)
        assert len(dataset) == corpus.splits[split]
        first = {"source": source or "en", "target": target or "zh"}
        for side, lang in first.items():
            assert corpus.codec(lang).decode(dataset[1][side]) == lines(corpus.text(split, lang))[1]


@pytest.mark.slow
def test_fairseq_trains_the_other_direction(small, tmp_path):
    flags = """-s zh -t en --task translation --arch transformer --encoder-layers 1 --decoder-layers 1
        --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 16
        --decoder-ffn-embed-dim 16 --encoder-attention-heads 2 --decoder-attention-heads 2
        --share-all-embeddings --optimizer adam --lr 1e-3 --criterion cross_entropy --max-tokens 1000
        --max-update 2 --cpu --num-workers 0 --no-epoch-checkpoints --save-dir"""
    done = fairseq("train", small[1], *flags.split(), tmp_path / "model")
    sizes = Corpus.open(small[1]).splits
    for split in ("train", "valid"):
        assert f"{split} zh-en {sizes[split]} examples" in done.stdout + done.stderr


# --- the same again ----------------------------------------------------------------------------


def test_any_number_of_workers_writes_the_same_bytes(small, tmp_path, monkeypatch):
    from fairseq_ext.translation.prepare import binarise
    from fairseq_ext.translation.prepare import steps as prepare_steps

    monkeypatch.setattr(prepare_steps, "BATCH", 50)
    monkeypatch.setattr(binarise.binarise, "__defaults__", (1, 3000))
    run(small[0], tmp_path / "two", workers=2)
    run(small[0], tmp_path / "three", workers=3)
    assert tree(tmp_path / "two") == tree(small[1]) == tree(tmp_path / "three")


def test_another_seed_is_another_split(small, tmp_path):
    run(small[0], tmp_path / "data", seed=2)
    assert Corpus.open(tmp_path / "data").split_sha256 != Corpus.open(small[1]).split_sha256
    check_folder(tmp_path / "data", [small[0]])


def test_done_already_is_left_alone(small, capsys):
    before = {path: path.stat().st_mtime_ns for path in small[1].rglob("*")}
    report = run(small[0], small[1], workers=2)
    assert "nothing to do" in capsys.readouterr().out
    assert report["counts"]["in"] == 600
    assert before == {path: path.stat().st_mtime_ns for path in small[1].rglob("*")}


def test_other_options_or_files_need_overwrite(tmp_path):
    source = tsv(tmp_path / "a.tsv", bitext(60))
    run(source, tmp_path / "data", spm_size=430)
    with pytest.raises(UserError, match=r"prepared with --spm-size 430, not 440: use --overwrite"):
        run(source, tmp_path / "data", spm_size=440)
    other = tsv(tmp_path / "b.tsv", bitext(70))
    with pytest.raises(UserError, match="other content of files"):
        run(other, tmp_path / "data", spm_size=430)
    assert Corpus.open(tmp_path / "data").codec("en").size <= 430
    run(other, tmp_path / "data", spm_size=430, overwrite=True)
    check_folder(tmp_path / "data", [other])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "b.tsv", "data"]


# --- killed --------------------------------------------------------------------------------------


def killed(stage, *arguments, **options):
    """Run prepare() in a process that dies at once when it gets to a stage."""

    def child():
        os.setsid()
        module, name = stage
        monkey = pytest.MonkeyPatch()
        monkey.setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        run(*arguments, **options)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return process.pid


def alive(session: int) -> bool:
    """Whether a process of a session is left."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


@pytest.mark.parametrize(
    "stage",
    [
        (prepare_build, "clean"),
        (prepare_build, "train_model"),
        (prepare_build, "write_ids"),
        (folders, "_put"),
    ],
    ids=lambda stage: stage[1],
)
def test_killed_and_started_again(small, tmp_path, stage):
    killed(stage, small[0], tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match="interrupted: run the same command again"):
        Corpus.open(tmp_path / "data")
    (partial_folder(tmp_path / "data") / "rubbish").mkdir()
    run(small[0], tmp_path / "data")
    assert tree(tmp_path / "data") == tree(small[1])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_process_outlives_a_killed_run(small, tmp_path, monkeypatch):
    from fairseq_ext.translation.prepare import steps as prepare_steps

    monkeypatch.setattr(prepare_steps, "BATCH", 20)
    session = killed((prepare_steps, "judge"), small[0], tmp_path / "data", workers=2)
    deadline = time.monotonic() + 20
    while alive(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(session)


def without_exchange(*_):
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("renames", [1, 4])
def test_killed_while_it_replaces(small, tmp_path, renames, monkeypatch, capsys):
    """Whatever the moment, the next run finds the earlier folder whole, and need not make it."""
    run(small[0], tmp_path / "data")
    count = iter(range(9))
    rename = os.rename
    # as on a file system that cannot exchange two names: the 4th rename finds none of this name
    monkeypatch.setattr(folders, "_exchange", without_exchange)

    def dying(*paths):
        if next(count) == renames - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    process = multiprocessing.get_context("fork").Process(
        target=lambda: (
            monkeypatch.setattr(os, "rename", dying),
            run(small[0], tmp_path / "data", seed=2, overwrite=True),
        )
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    capsys.readouterr()
    run(small[0], tmp_path / "data")
    assert "nothing to do" in capsys.readouterr().out
    assert tree(tmp_path / "data") == tree(small[1])


def test_failure_leaves_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_build, "write_ids", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(small[0], tmp_path / "new" / "data")
    assert list((tmp_path / "new").iterdir()) == []


def test_two_at_once_are_refused(small, tmp_path):
    with folders.making(tmp_path / "data"):
        with pytest.raises(UserError, match="being written by another process"):
            run(small[0], tmp_path / "data")
        assert partial_folder(tmp_path / "data").is_dir()
    assert (tmp_path / "data").is_dir()


# --- what comes in -------------------------------------------------------------------------------


def test_packed_and_marked_files_are_the_same_corpus(small, tmp_path):
    import zstandard

    pairs = bitext(600)
    source, target = parallel(tmp_path, pairs)
    (tmp_path / "x.en.gz").write_bytes(gzip.compress(source.read_bytes()))
    (tmp_path / "x.zh.zst").write_bytes(zstandard.compress(target.read_bytes()))
    marked = tmp_path / "marked.tsv"
    rows = "".join(f"7\t{source}\tx\t{target}\r\n" for source, target in pairs)
    marked.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    run([source, target], tmp_path / "plain")
    run([tmp_path / "x.en.gz", tmp_path / "x.zh.zst"], tmp_path / "packed")
    run(marked, tmp_path / "marked", columns=[2, 4])
    expected = {k: v for k, v in tree(small[1]).items() if k != "manifest.json"}
    for name in ("plain", "packed", "marked"):
        assert {k: v for k, v in tree(tmp_path / name).items() if k != "manifest.json"} == expected


def test_odd_line_ends_shift_nothing(tmp_path):
    odd = [
        ("Line\u2028separator here.", "这里有\u2028分隔符。"),
        ("Next\u0085line.", "下\u0085一行。"),
        ("Form\x0cfeed and\x1cmore.", "换\x0c页。"),
        ("A tab\there.", "这里有\t制表符。"),
        ("Carriage\rreturn.", "回\r车。"),
    ]
    pairs = bitext(100)
    for place, pair in enumerate(odd):
        pairs.insert(10 + 17 * place, pair)
    inputs = parallel(tmp_path, pairs)
    report = run(inputs, tmp_path / "data", spm_size=380)
    assert report["counts"] == {"in": 105, "out": 105, "removed": {}}
    check_folder(tmp_path / "data", inputs)


def test_literal_symbols_stay_text(tmp_path):
    pairs = bitext(80) + [
        ("Write <BT> here.", "这里写 <BT>。"),
        ("The end is </s> or <unk> or <pad>.", "结尾是 </s> 或 <unk> 或 <pad>。"),
        ("A byte <0x41> and @@ and ▁.", "字节 <0x41> 和 @@ 和 ▁。"),
    ]
    source = tsv(tmp_path / "x.tsv", pairs)
    run(source, tmp_path / "data", spm_size=400, extra_symbols=["<BT>", "<zh>"])
    check_folder(tmp_path / "data", [source])
    assert "Write <BT> here." in [
        row[1] for rows in splits(tmp_path / "data").values() for row in rows
    ]
    assert Corpus.open(tmp_path / "data").codec("zh").symbol_id("<zh>") >= 4


NASTY = """. ... ？！ 😀 🇨🇳 龘 𠮷野家 ｆｕｌｌ <BT> <unk> </s> <s> <pad> <0x41> @@ a@@ ▁ ▁▁ab é ﬁ ½ 10² I'm
    don’t “x” 1,000.5 Ⅳ 한국어 ไทย हिन्दी ñ http://x.y/z?a=b&c C++ #fairseq:overwrite %s \\n""".split()
# white space, control, invisible and right-to-left characters, private and last code points
NASTY += [" ", "\u3000", "\xa0", "\u2028", "\u2029", "\x85", "\r", "\x0b", "\x07", "\x1b[0m", "\0"]
NASTY += ["\u200b", "a\u200db", "\ufeff", "\u202eabc", "\u2060", "<\u2060BT>", "<\u2060\u2060BT>"]
NASTY += [
    "e\u0301",
    "👨\u200d👩\u200d👧",
    "\u05e9\u05dc",
    "\u0645\u0631",
    "\ue000",
    "\U0010ffff",
    "\ufffd",
]
WORDS = ["word", "Tom", "汤姆", "苹果", "is", "。"]


def nasty_line(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.04:
        return ""
    if kind < 0.06:
        return draw.choice(" \t\u3000\u200b") * draw.randrange(1, 4)
    if kind < 0.062:
        return "".join(draw.choice(NASTY) for _ in range(3000))[:10_000]
    if kind < 0.1:
        ranges = (32, 0xD800), (0xE000, 0x110000)
        return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(9))
    parts = [draw.choice(NASTY + WORDS) for _ in range(draw.randrange(1, 9))]
    return draw.choice(["", " ", "\t"]).join(parts).replace("\n", "")


@pytest.mark.parametrize("convention", ["none", "standard"])
def test_thousands_of_nasty_lines(tmp_path, convention):
    draw = random.Random(convention)
    pairs = [(nasty_line(draw), nasty_line(draw)) for _ in range(4000)]
    pairs += bitext(300)
    draw.shuffle(pairs)
    inputs = parallel(tmp_path, pairs)
    report = run(inputs, tmp_path / "data", normalise=convention, filters="none", spm_size=1200)
    assert report["counts"] == {"in": 4300, "out": 4300, "removed": {}}
    check_folder(tmp_path / "data", inputs)
    if convention == "none":
        # what a reader of lines would stumble over, and SentencePiece's own space
        allowed = str.maketrans({"\r": " ", "\0": None, "▁": "_"})
        for rows in splits(tmp_path / "data").values():
            for number, source, target in rows:
                for raw, text in zip(pairs[number - 1], (source, target), strict=True):
                    assert text == raw.removesuffix("\r").translate(allowed)
    report = run(inputs, tmp_path / "filtered", normalise=convention, spm_size=1200, workers=2)
    assert (
        report["counts"]["in"]
        == 4300
        == report["counts"]["out"] + len(rejects(tmp_path / "filtered"))
    )
    assert sum(report["counts"]["removed"].values()) == len(rejects(tmp_path / "filtered"))
    check_folder(tmp_path / "filtered", inputs)


# --- other vocabularies ----------------------------------------------------------------------------


def test_separate_models(tmp_path):
    source = tsv(tmp_path / "x.tsv", bitext(300))
    report = run(source, tmp_path / "data", joint=False, spm_kind="bpe", spm_size=360)
    check_folder(tmp_path / "data", [source])
    corpus = Corpus.open(tmp_path / "data")
    assert not corpus.joint
    assert corpus.codec("en").sha256 != corpus.codec("zh").sha256
    assert corpus.codec("en").kind == "bpe"
    assert report["vocabulary"] == {"en": 360, "zh": 360}


def test_models_learn_from_train_only(small, tmp_path):
    """A character of valid and test that train has not is spelt in bytes."""
    from fairseq_ext.translation.text.spm import train_model

    corpus = Corpus.open(small[1])
    texts = [corpus.text("train", lang) for lang in corpus.languages]
    again = train_model(texts, pairs=corpus.splits["train"])
    assert (
        again
        == (small[1] / "spm.en.model").read_bytes()
        == (small[1] / "spm.zh.model").read_bytes()
    )


def test_more_data_with_the_same_models(small, tmp_path):
    base = Corpus.open(small[1])
    new = [(f"Yesterday {source}", f"昨天{target}") for source, target in bitext(90, seed=5)]
    old = splits(small[1])
    leaks = [old["valid"][0][1:], old["test"][0][1:]]
    leaks.append((leaks[0][0].upper(), "别的句子在这里"))
    leaks.append(("Some other sentence is here", leaks[1][1].removesuffix("。")))
    new[10:10] = leaks
    source = tsv(tmp_path / "new.tsv", new)
    with pytest.raises(
        UserError, match=r"pairs of INPUT 4 have a side that .*line 11: .*--on-leak remove.*keep"
    ):
        run(source, tmp_path / "data", vocab_from=str(small[1]))
    assert [path.name for path in tmp_path.iterdir()] == ["new.tsv"]
    report = run(source, tmp_path / "data", vocab_from=str(small[1]), on_leak="remove")
    assert report["counts"]["removed"] == {"leak": 4}
    report = run(source, tmp_path / "kept", vocab_from=str(small[1]), on_leak="keep")
    assert report["counts"]["leaks_kept"] == 4 and report["counts"]["removed"] == {}
    assert [int(row[0]) for row in rejects(tmp_path / "data")] == [11, 12, 13, 14]
    corpus = Corpus.open(tmp_path / "data")
    assert corpus.splits == {"train": 90}
    assert corpus.spm == base.spm
    for name in ("dict.en.txt", "dict.zh.txt", "spm.en.model"):
        assert (tmp_path / "data" / name).read_bytes() == (small[1] / name).read_bytes()
    check_folder(tmp_path / "data", [source])


def test_vocabulary_of_another_kind_is_refused(small, tmp_path):
    source = tsv(tmp_path / "x.tsv", bitext(10))
    (tmp_path / "speaker").mkdir()
    (tmp_path / "speaker" / "corpus.json").write_text('{"format": 1, "speakers": []}')
    with pytest.raises(UserError, match="another kind of data"):
        run(source, tmp_path / "data", vocab_from=str(tmp_path / "speaker"))
    with pytest.raises(UserError, match="does not exist"):
        run(source, tmp_path / "data", vocab_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is of en and zh, not of en and de"):
        run(source, tmp_path / "data", vocab_from=str(small[1]), target_lang="de")
    for option in ({"normalise": "none"}, {"spm_size": 500}, {"joint": False}, {"spm_kind": "bpe"}):
        with pytest.raises(UsageError, match="belongs to the folder that gives the vocabulary"):
            run(source, tmp_path / "data", vocab_from=str(small[1]), **option)


def test_changed_dictionary_is_refused(small, tmp_path):
    import shutil

    base = shutil.copytree(small[1], tmp_path / "base")
    content = lines(base / "dict.zh.txt")
    content[300], content[301] = content[301], content[300]
    (base / "dict.zh.txt").write_text("".join(f"{line}\n" for line in content), "utf-8")
    source = tsv(tmp_path / "x.tsv", [(f"Now {a}", f"现在{b}") for a, b in bitext(40, seed=9)])
    with pytest.raises(UserError, match="does not give the ids of the SentencePiece model"):
        run(source, tmp_path / "data", vocab_from=str(base))


# --- splits --------------------------------------------------------------------------------------


def test_given_valid_and_test_are_used_as_they_are(tmp_path):
    pairs = bitext(400)
    held = [("Ａ valid line .", "一句话 ."), *pairs[:20], ("Ａ valid line .", "一句话 .")]
    valid = tsv(tmp_path / "valid.tsv", held)
    test = parallel(tmp_path, [(f"Perhaps {a}", f"也许{b}") for a, b in pairs[20:50]], "test")
    source = tsv(tmp_path / "x.tsv", pairs)
    given = {"valid": [str(valid)], "test": list(map(str, test))}
    with pytest.raises(UserError, match=r"INPUT \d+ have a side .* --valid or --test \(line 1: "):
        run(source, tmp_path / "data", **given)
    report = run(source, tmp_path / "data", on_leak="remove", **given)
    found = splits(tmp_path / "data")
    assert [row[1:] for row in found["valid"]] == [
        tuple(normalise(text, lang) for text, lang in zip(pair, ("en", "zh"), strict=True))
        for pair in held
    ]
    assert [row[0] for row in found["test"]] == list(range(1, 31))
    assert report["splits"]["valid"]["pairs"] == 22
    assert (
        report["counts"]["out"] == len(found["train"]) == 400 - report["counts"]["removed"]["leak"]
    )
    for name, side in product(("valid", "test"), (1, 2)):
        keys = {match_key(row[side]) for row in found[name]}
        assert not keys & {match_key(row[side]) for row in found["train"]}


def test_given_valid_with_a_test_by_fraction(tmp_path):
    source = tsv(tmp_path / "x.tsv", bitext(300))
    valid = tsv(tmp_path / "v.tsv", [("A line of its own", "自己的一句话")])
    run(source, tmp_path / "data", valid=[str(valid)], test_fraction=0.1)
    assert Corpus.open(tmp_path / "data").splits == {"train": 270, "valid": 1, "test": 30}


def test_given_valid_with_an_empty_side_is_told(small, tmp_path):
    valid = tsv(tmp_path / "v.tsv", [("A line", "一句话"), ("Another", "")])
    with pytest.raises(UserError, match=r"v\.tsv, line 2: the target is empty"):
        run(small[0], tmp_path / "data", valid=[str(valid)])
    empty = tsv(tmp_path / "empty.tsv", [])
    with pytest.raises(UserError, match=r"empty\.tsv has no pairs"):
        run(small[0], tmp_path / "data", valid=[str(empty)])


@pytest.mark.parametrize("count, least", [(3, 1), (30, 1), (500, 10), (700, 14)])
def test_small_corpora_are_divided_too(tmp_path, count, least):
    source = tsv(tmp_path / "x.tsv", bitext(count))
    report = run(source, tmp_path / "data")
    sizes = {name: split["pairs"] for name, split in report["splits"].items()}
    assert sum(sizes.values()) == count
    assert sizes["valid"] >= least and sizes["test"] >= least and sizes["train"] >= count / 3
    check_folder(tmp_path / "data", [source])


def test_pairs_that_all_hang_together_are_told(tmp_path, capsys):
    pairs = [("The same source", f"第{chr(0x4E00 + i)}个译文") for i in range(60)]
    source = tsv(tmp_path / "x.tsv", pairs)
    report = run(source, tmp_path / "data")
    assert "no pair could be held out for valid" in capsys.readouterr().err
    assert list(report["splits"]) == ["train"]
    Corpus.open(tmp_path / "data")


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "x.tsv is empty: give a file with pairs"),
        (b"Hi.\t\xe5\x97\xa8\xe3\x80\x82\n", "1 of 1 pairs of .*x.tsv are left, at least 3"),
        (b"\t\n\t\n", "0 of 2 pairs .* are left \\(removed: empty 2\\)"),
        (b"one\ntwo\n", "line 1 has no tab, but columns 1 and 2 are to be read"),
        (b"a\tb\nb\t\xff\n", "x.tsv, line 2 is not UTF-8"),
    ],
)
def test_unusable_input_is_told(tmp_path, content, said):
    (tmp_path / "x.tsv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        run(tmp_path / "x.tsv", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tsv"]


def test_column_out_of_range_is_told(small, tmp_path):
    with pytest.raises(UserError, match="line 1 has only 2 columns, but columns 1 and 5"):
        run(small[0], tmp_path / "data", columns=[1, 5])


def test_different_numbers_of_lines_are_told(tmp_path):
    source, target = parallel(tmp_path, bitext(50))
    target.write_bytes(target.read_bytes() + "多了\n".encode())
    with pytest.raises(UserError, match="has 50 lines and .*x.zh 51"):
        run([source, target], tmp_path / "data")


COMMANDS = {
    "missing": (["{tmp}/no.tsv", "{tmp}/data"], 1, "no.tsv does not exist"),
    "same language": (["{source}", "{tmp}/data", "--target-lang", "en"], 2, "both en"),
    "same file twice": (["{source}", "{source}", "{tmp}/data"], 2, "as source and as target"),
    "file as DEST": (["{source}", "{file}"], 1, "is a file: give a folder"),
    "no DEST": (["{source}"], 2, "required: DEST"),
    "too many": (["{source}"] * 3 + ["{tmp}/data"], 2, "got 3"),
    "foreign DEST": (["{source}", "{tmp}"], 1, "holds other files"),
    "folder as INPUT": (["{tmp}", "{tmp}/data"], 1, "is a folder"),
    "INPUT as DEST": (["{source}", "{source}"], 2, "both INPUT and DEST"),
    "bad language": (
        ["{source}", "{tmp}/data", "--source-lang", "zh-Hant"],
        2,
        "no name for a language",
    ),
    "bad filter": (["{source}", "{tmp}/data", "--filters", "lenght"], 1, "did you mean 'length'"),
    "bad convention": (
        ["{source}", "{tmp}/data", "--normalise", "nfc"],
        1,
        "unknown normalisation",
    ),
    "bad columns": (["{source}", "{tmp}/data", "--columns", "0,1"], 2, "numbers from 1"),
    "bad symbol": (["{source}", "{tmp}/data", "--extra-symbols", "a b"], 1, "extra symbol"),
    "both": (
        ["{source}", "{tmp}/data", "--valid", "{file}", "--valid-fraction", ".1"],
        2,
        "not both",
    ),
    "fractions": (
        ["{source}", "{tmp}/data", "--valid-fraction", "0.6", "--test-fraction", ".5"],
        2,
        "less than 1",
    ),
    "opencc": (["{source}", "{tmp}/data", "--opencc", "x2y"], 2, "it has .*t2s"),
    "flag": (["{source}", "{tmp}/data", "--vocab", "x"], 2, "unknown argument"),
    "user dir": (["{source}", "{tmp}/data", "--user-dir", "{tmp}/no"], 1, "is not a folder"),
    "tiny": (["{source}", "{tmp}/data", "--spm-size", "100"], 1, "too small"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_are_one_sentence(small, tmp_path, capsys, name):
    from ext_common.cli import run as run_command

    arguments, code, said = COMMANDS[name]
    (tmp_path / "file").write_text("x\ty\n")
    values = {"tmp": tmp_path, "source": small[0], "file": tmp_path / "file"}
    argv = [part.format(**values) for part in arguments]
    for flag, lang in (("--source-lang", "en"), ("--target-lang", "zh")):
        argv += [] if flag in argv else [flag, lang]
    with pytest.raises(SystemExit) as end:
        run_command(main, argv)
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert end.value.code == code, error
    assert last.startswith("error: ")
    assert re.search(said, last), last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


# --- conversion and plugins ----------------------------------------------------------------------


def test_traditional_becomes_simplified(tmp_path):
    pairs = [(a, b.replace("龙", "龍").replace("书", "書")) for a, b in bitext(60)]
    source = tsv(tmp_path / "x.tsv", pairs)
    run(source, tmp_path / "data", opencc="t2s", spm_size=400)
    text = "".join(row[2] for rows in splits(tmp_path / "data").values() for row in rows)
    assert "书" in text and "書" not in text and "龍" not in text
    assert Corpus.open(tmp_path / "data").opencc == "t2s"
    run(
        tsv(tmp_path / "y.tsv", [("A new book", "新書")]),
        tmp_path / "more",
        vocab_from=str(tmp_path / "data"),
    )
    assert splits(tmp_path / "more")["train"] == [(1, "A new book", "新书")]


def test_missing_opencc_is_told(small, tmp_path, monkeypatch):
    opencc.cache_clear()
    monkeypatch.setitem(sys.modules, "opencc", None)
    with pytest.raises(UserError, match=r"fairseq-ext\[opencc\]"):
        run(small[0], tmp_path / "data", opencc="t2s")
    with pytest.raises(UsageError, match="neither language"):
        monkeypatch.undo()
        run(small[0], tmp_path / "data", opencc="t2s", target_lang="de")


def test_filters_of_ones_own(small, tmp_path):
    plugin = tmp_path / "own_filters_of_mine"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(
        "from fairseq_ext.translation.prepare.filter_chain import FILTERS\n"
        "@FILTERS.register('no_cats')\n"
        "class NoCats:\n"
        "    def __init__(self, languages): pass\n"
        "    def __call__(self, source, target): return 'a cat' if 'cat' in source else None\n"
    )
    report = run(small[0], tmp_path / "data", filters="no_cats; empty", user_dir=str(plugin))
    cats = sum("cat" in source for source, _ in bitext(600))
    assert report["counts"]["removed"] == {"no_cats": cats}
    assert {row[1] for row in rejects(tmp_path / "data")} == {"no_cats: a cat"}


def test_filters_are_asked_in_their_order(tmp_path):
    """A pair counts under the first filter that removes it, whether it has a memory or not."""
    pairs = bitext(50)
    pairs += [("x" * 300, "好"), ("x" * 300, "好"), pairs[0]]
    source = tsv(tmp_path / "x.tsv", pairs)
    first = run(source, tmp_path / "a", filters="duplicate; length", spm_size=350)
    last = run(source, tmp_path / "b", filters="length; duplicate", spm_size=350)
    assert first["counts"]["removed"] == {"duplicate": 2, "length": 1}
    assert last["counts"]["removed"] == {"length": 2, "duplicate": 1}
