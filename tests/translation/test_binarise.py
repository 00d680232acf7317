"""The binarised files: fairseq's own are the oracle, the SentencePiece model is the meaning."""

import numpy as np
import pytest
import torch
from fairseq.binarizer import FileBinarizer
from fairseq.data import Dictionary, indexed_dataset
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import UserError
from fairseq_ext.translation.prepare import binarise as module
from fairseq_ext.translation.prepare.binarise import (
    SpmBinarizer,
    binarise,
    check_dictionary,
    count_lines,
    line_parts,
    read_part,
    sentence_lengths,
    write_dictionary,
)
from fairseq_ext.translation.text.spm import EOS

NASTY = [
    "",
    " ",
    "😀 gold 鑫",
    "a\u2028b\u0085c",
    "<BT> <unk> </s> <0x41>",
    "x" * 3000,
    "@@ \u200f\u05e9\u05dc",
    "龘",
]


@pytest.fixture(scope="module")
def text(toy_data, tmp_path_factory):
    """Lines of both languages and nasty ones between."""
    path = tmp_path_factory.mktemp("lines") / "lines"
    lines = (toy_data / "text" / "train.en").read_text("utf-8").split("\n")[:-1]
    lines += (toy_data / "text" / "train.zh").read_text("utf-8").split("\n")[:-1]
    for place, line in enumerate(NASTY * 3):
        lines.insert(place * 37, line)
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def files(stem):
    return [stem.with_name(stem.name + end).read_bytes() for end in (".bin", ".idx")]


def read(stem):
    dataset = indexed_dataset.MMapIndexedDataset(str(stem))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("workers, part", [(1, 1 << 20), (1, 500), (2, 500), (3, 7777)])
def test_same_bytes_as_fairseqs_own(text, toy_codec, tmp_path, workers, part):
    FileBinarizer.multiprocess_dataset(
        str(text), "mmap", SpmBinarizer(toy_codec), str(tmp_path / "theirs"), toy_codec.size, 1
    )
    summary = binarise(text, toy_codec, tmp_path / "ours", workers, part)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{whose}.{end}" for whose in ("ours", "theirs") for end in ("bin", "idx")
    ]
    assert summary.num_seq == count_lines(text)
    assert summary.num_tok == sentence_lengths(tmp_path / "ours").sum()
    assert summary.num_replaced == 0


def test_ids_are_those_of_the_model_and_give_the_lines_back(text, toy_codec, tmp_path):
    binarise(text, toy_codec, tmp_path / "x", 2, 5000)
    lines = text.read_bytes().decode().split("\n")[:-1]
    ids = read(tmp_path / "x")
    assert ids == [[*toy_codec.encode(line), EOS] for line in lines]
    assert [toy_codec.decode(sentence) for sentence in ids] == lines


def test_large_vocabularies_take_four_bytes(toy_codec, text, tmp_path, monkeypatch):
    monkeypatch.setattr(type(toy_codec), "size", property(lambda self: 70_000))
    binarise(text, toy_codec, tmp_path / "x", 1, 5000)
    dataset = indexed_dataset.MMapIndexedDataset(str(tmp_path / "x"))
    assert dataset._index.dtype == np.uint32


def test_offsets_beyond_two_gigabytes_do_not_overflow(toy_codec, text, tmp_path, monkeypatch):
    pointers = []
    monkeypatch.setattr(
        indexed_dataset.MMapIndexedDatasetBuilder,
        "finalize",
        lambda self, file: (
            pointers.extend(
                indexed_dataset.MMapIndexedDataset.Index.writer(file, self._dtype)._get_pointers(
                    [size * 10**7 for size in self._sizes]
                )
            )
            if "part" not in file
            else FINALIZE(self, file)
        ),
    )
    monkeypatch.setattr(module, "check_counts", lambda *_: None)
    binarise(text, toy_codec, tmp_path / "x", 1, 5000)
    assert pointers[-1] > 2**33
    assert np.all(np.diff(pointers) > 0)


FINALIZE = indexed_dataset.MMapIndexedDatasetBuilder.finalize


def test_unknown_pieces_are_counted(toy_codec, tmp_path, monkeypatch):
    monkeypatch.setattr(type(toy_codec), "encode", lambda self, line: [3] * line.count("?") + [300])
    (tmp_path / "t").write_text("?a?\nb\n???\n")
    assert binarise(tmp_path / "t", toy_codec, tmp_path / "x", 1, 3).num_replaced == 5


def test_lost_line_is_noticed(text, toy_codec, tmp_path, monkeypatch):
    def one_less(path, start, end):
        lines = list(read_part(path, start, end))
        return iter(lines[1:] if start == 0 else lines)

    monkeypatch.setattr(module, "read_part", one_less)
    with pytest.raises(UserError, match=r"x has .* sentences, .* lines"):
        binarise(text, toy_codec, tmp_path / "x", 1, 5000)


def test_killed_process_is_told(text, toy_codec, tmp_path, monkeypatch):
    def die(*_):
        import os

        os._exit(9)

    monkeypatch.setattr(module, "read_part", die)
    with pytest.raises(UserError, match="fewer --workers"):
        binarise(text, toy_codec, tmp_path / "x", 2, 5000)


@given(
    st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))),
    st.integers(1, 60),
)
def test_parts_are_whole_lines_and_all_of_them(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("parts") / "x"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    parts = line_parts(path, size)
    assert [start for start, _ in parts] + [path.stat().st_size] == [0] + [end for _, end in parts]
    assert [line for part in parts for line in read_part(path, *part)] == [f"{x}\n" for x in lines]
    assert count_lines(path) == len(lines)


def test_dictionary_gives_the_ids_of_the_model(toy_codec, tmp_path):
    write_dictionary(toy_codec, tmp_path / "dict.txt")
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    assert len(dictionary) == toy_codec.size
    assert dictionary.symbols == toy_codec.pieces(range(toy_codec.size))
    ids = toy_codec.encode("I like 😀 龘 <BT>")
    line = " ".join(toy_codec.pieces(ids))
    assert dictionary.encode_line(line, add_if_not_exist=False).tolist() == [*ids, EOS]


@pytest.mark.parametrize("change", ["swapped", "shorter", "repeated", "no count"])
def test_another_dictionary_is_refused(toy_codec, tmp_path, change):
    path = tmp_path / "dict.txt"
    write_dictionary(toy_codec, path)
    lines = path.read_text("utf-8").split("\n")[:-1]
    if change == "swapped":
        lines[300], lines[301] = lines[301], lines[300]
    elif change == "shorter":
        lines.pop()
    elif change == "repeated":
        lines[300] = lines[301]
    else:
        lines[300] = lines[300].removesuffix(" 1")
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    with pytest.raises(UserError, match=r"dict\.txt"):
        check_dictionary(toy_codec, path)


def test_pieces_that_a_dictionary_could_misread(tmp_path):
    """fairseq's dictionary file has flags, and separates by spaces."""
    from fairseq_ext.translation.text.spm import Codec, train_model

    words = [
        "#fairseq:overwrite",
        "madeupword0000",
        "a\u3000b",
        "c\u00a0d",
        "e\u2028f",
        "g\u0085h",
        "1 1",
        "i\tj",
    ]
    (tmp_path / "t").write_bytes(
        "".join(f"{a} {b}\n" for a in words for b in words for _ in "123").encode()
    )
    symbols = ["<BT>", "#fairseq:overwrite"]
    codec = Codec(train_model([tmp_path / "t"], size=340, extra_symbols=symbols), symbols)
    write_dictionary(codec, tmp_path / "dict.txt")
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    assert dictionary.index("#fairseq:overwrite") == codec.symbol_id("#fairseq:overwrite")
    pieces = "".join(dictionary.symbols)
    assert {"\u3000", "\u00a0", "\u2028", "\u0085", "\t"} <= set(pieces)


def test_empty_file_has_no_sentences(toy_codec, tmp_path):
    (tmp_path / "t").write_text("")
    assert binarise(tmp_path / "t", toy_codec, tmp_path / "x", 2).num_seq == 0
    assert len(sentence_lengths(tmp_path / "x")) == 0


def test_binarised_line_is_an_int_tensor(toy_codec):
    from fairseq.binarizer import BinarizeSummary

    line = SpmBinarizer(toy_codec).binarize_line("I see\n", BinarizeSummary())
    assert line.dtype == torch.int32 and line[-1] == EOS
