"""Lines in, as many lines out: the Python API, with stubs at scale and a real tiny model."""

import copy
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_common.cli import UserError
from ext_common.pack import PackOptions, pack
from ext_common.packed import Pack
from fairseq_ext.translation.decode.checkpoint import Vocabulary, read_state, split_paths
from fairseq_ext.translation.decode.options import (
    Candidate,
    DecodeOptions,
    SampleOptions,
    Source,
    make_batches,
)
from fairseq_ext.translation.decode.translator import Translator
from fairseq_ext.translation.text.spm import EOS, Codec

confident = runpy.run_path(str(Path(__file__).with_name("confident.py")))["confident"]
NASTY = [
    "",
    " ",
    "\t",
    "\r",
    "\ufeff",
    "\u200b",
    "\u2028",
    "a\u2028b",
    "a\x85b",
    "a\x0bb\x0cc\x1cd",
    "a\tb\tc",
    "\0",
    "😀",
    "👨‍👩‍👧",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "𠮷野家",
    "龘" * 50,
    "\U0010fffd",
    "<BT>",
    "<BT> I like",
    "▁",
    "</s>",
    "<unk> <pad> <s>",
    "@@ @@",
    "<0xE2><0x96>",
    "-" * 400,
    "a" * 3000,
    "。" * 700,
    "I like red apples. " * 300,
    "我喜欢红的苹果" * 200,
    "0 1 2 3.14 1,000",
    "ﷺ" * 100,
    "e\u0301" * 200,
    "\u202eabc",
]


class Letters:
    """A codec whose pieces are characters."""

    def encode(self, text):
        return [ord(c) + 4 for c in text]

    def decode(self, ids):
        return "".join(chr(i - 4) for i in ids)


class Echo:
    """A backend whose output says what it was given; it remembers its batches."""

    name = "echo"
    max_tokens = 1024

    def __init__(self, max_source=50, room=None, workers=1):
        self.workers = workers
        self.max_source = self.max_target = max_source
        self.room = room
        self.batches = []

    def decode(self, batch, options, limit):
        self.batches.append((limit, list(batch)))
        if self.room is not None and len(batch) * len(batch[0]) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        assert all(ids[-1] == EOS and len(ids) <= self.max_source for ids in batch)
        return [
            [Candidate(list(ids[:-1]), -float(rank), False) for rank in range(options.nbest)]
            for ids in batch
        ]


def echo(window=100, target="en", **options):
    vocabulary = Vocabulary(Letters(), Letters(), "en", target, "standard")
    return Translator(Echo(**options), vocabulary, window)


@pytest.fixture(scope="session")
def checkpoint(toy_checkpoint, toy_tsv):
    rows = toy_tsv.read_text(encoding="utf-8").splitlines()
    return confident(toy_checkpoint, [tuple(row.split("\t")) for row in rows])


@pytest.fixture(scope="session")
def toy_lines(toy_tsv):
    """Source lines, some of them seen in training."""
    rows = toy_tsv.read_text(encoding="utf-8").splitlines()
    return [row.split("\t")[0] for row in rows[-120:]]


@pytest.fixture(scope="session")
def translator(checkpoint):
    return Translator.from_checkpoint(checkpoint, threads=1)


# --- order and number of lines, with a backend that echoes -----------------------------------------


@settings(max_examples=50)
@given(
    st.lists(st.text(max_size=120) | st.sampled_from(NASTY), max_size=60),
    st.integers(1, 50),
    st.integers(1, 300),
)
def test_as_many_lines_out_as_in_and_in_order(lines, window, max_tokens):
    translator = echo(window)
    found = list(translator.translate(lines, DecodeOptions(max_tokens=max_tokens)))
    assert len(found) == len(lines)
    for line, translation in zip(lines, found, strict=True):
        clean = translator.vocabulary.clean(line)
        assert "".join(translation.text.split()) == "".join(clean.split())
        assert "\n" not in translation.text and "\t" not in translation.text
        assert (translation.parts == 0) == (not clean)


def test_ten_thousand_lines_keep_their_places():
    draw = random.Random(1)
    lines = [f"{n} {'x' * draw.randrange(40)}".strip() for n in range(10_000)]
    lines = [line if draw.random() < 0.9 else draw.choice(["", " ", "\u200b"]) for line in lines]
    translator = echo(window=1777)
    assert translator(iter(lines)) == [line.strip(" \u200b") for line in lines]


def test_memory_does_not_grow_with_the_input():
    """A window is read only when the one before it is used up."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield f"line {read}"

    found = echo(window=10).translate(endless())
    assert [next(found).text for _ in range(25)][-1] == "line 25"
    assert read == 30


def test_done_counts_every_line_once():
    lines = ["", "a", "a", "b" * 120, "c"] * 7
    counted = []
    list(echo(window=8).translate(lines, done=counted.append))
    assert sum(counted) == len(lines)


def test_one_str_is_refused():
    with pytest.raises(TypeError, match="list of lines"):
        echo()("abc")


# --- over-long lines -------------------------------------------------------------------------------


def test_overlong_lines_are_split_at_sentences_and_joined():
    translator = echo(max_source=12)
    line = "One two. Three four. Five six seven."
    (found,) = translator.translate([line])
    assert found.text == line and found.parts == 4
    parts = sorted(
        translator.vocabulary.text(ids[:-1]) for _, b in translator.backend.batches for ids in b
    )
    assert parts == ["Five six", "One two.", "Three four.", "seven."]


def test_parts_are_joined_without_space_in_chinese():
    translator = echo(max_source=5, target="zh")
    assert translator(["我走了。你呢？", "我走。"]) == ["我走了。你呢？", "我走。"]
    assert echo(max_source=5, target="en")(["我走了。你呢？"]) == ["我走了。 你呢？"]


def test_shorter_parts_on_request():
    translator = echo(max_source=50)
    (found,) = translator.translate(["One two. Three four."], DecodeOptions(max_source=13))
    assert found.parts == 2
    assert {len(ids) for _, batch in translator.backend.batches for ids in batch} == {9, 12}


# --- batches -----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 60), max_size=80),
    st.integers(1, 400),
    st.sampled_from([0.0, 0.5, 2.0]),
)
def test_batches(lengths, max_tokens, a):
    sources = [Source((n,) * length) for n, length in enumerate(lengths)]
    options = DecodeOptions(max_len_a=a, max_len_b=7)
    batches = list(make_batches(sources, options, 100, max_tokens))
    assert sorted(one for _, batch in batches for one in batch) == sorted(sources)
    sizes = [len(one.ids) for _, batch in batches for one in batch]
    assert sizes == sorted(sizes, reverse=True)
    for limit, batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(s.ids) for s in batch) <= max_tokens
        assert {options.limit(len(s.ids), 100) for s in batch} == {limit}


def test_the_longest_output_depends_on_the_line_alone():
    options = DecodeOptions(max_len_a=2, max_len_b=10)
    assert [options.limit(n, 1024) for n in (1, 8, 9, 16)] == [26, 26, 42, 42]
    assert options.limit(1000, 1024) == 1023
    assert DecodeOptions(max_len_a=0, max_len_b=0, min_len=5).limit(3, 1024) == 5


def test_equal_lines_are_decoded_once():
    translator = echo()
    assert translator(["b", "a", "b", "a", "b"]) == ["b", "a", "b", "a", "b"]
    assert sum(len(batch) for _, batch in translator.backend.batches) == 2


def test_workers_keep_the_order_and_pass_on_errors():
    translator = echo(workers=3)
    lines = [f"{n} {'x' * (n % 40)}".strip() for n in range(500)]
    assert translator(lines, max_tokens=100) == lines
    translator.backend.room = 4
    with pytest.raises(UserError, match="pieces with a beam of 5"):
        translator(lines, max_tokens=100)


def test_a_full_device_halves_the_batch():
    translator = echo(room=40)
    lines = [f"{n:09d}" for n in range(33)]
    assert translator(lines) == lines
    assert max(len(batch) for _, batch in translator.backend.batches) == 33


def test_a_line_that_never_fits_is_told():
    with pytest.raises(UserError, match="10 pieces with a beam of 5"):
        echo(room=4)(["123456789"])


def test_other_errors_are_not_swallowed():
    translator = echo()
    translator.backend.decode = lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        translator(["a"])


@pytest.mark.parametrize(
    "given, text",
    [
        (dict(beam=0), "--beam must be at least 1"),
        (dict(beam=2, nbest=3), "--nbest 3 needs a --beam"),
        (dict(max_tokens=0), "--max-tokens must be at least 1"),
        (dict(max_len_b=-1), "--max-len-b must be at least 0"),
        (dict(lenpen=float("inf")), "--lenpen"),
        (dict(max_source=1), "--max-source must be at least 2"),
    ],
)
def test_options_are_checked(given, text):
    with pytest.raises(ValueError, match=text):
        DecodeOptions(**given)


# --- a real model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [dict(beam=1), dict(), dict(beam=3, nbest=3), dict(lenpen=0.3, no_repeat_ngram=2)],
)
def test_together_as_alone(translator, toy_lines, options):
    """float32, sentences of all lengths in one batch, their order shuffled."""
    lines = [*toy_lines[:60], *NASTY[:26], "I", "you like red apples and we see big houses."]
    random.Random(3).shuffle(lines)
    options = DecodeOptions(**options)
    together = list(translator.translate(lines, options))
    alone = [translator.translate_window([line], options)[0] for line in lines]
    assert [t.text for t in together] == [t.text for t in alone]
    for a, b in zip(together, alone, strict=True):
        assert [h.text for h in a.hypotheses] == [h.text for h in b.hypotheses]
        assert [h.score for h in a.hypotheses] == pytest.approx(
            [h.score for h in b.hypotheses], abs=2e-4
        )


def test_batches_of_any_size_give_the_same(translator, toy_lines):
    expected = translator(toy_lines)
    assert len(set(expected)) > 20
    for max_tokens in (1, 37, 10_000):
        assert translator(toy_lines, max_tokens=max_tokens) == expected


def test_it_has_learned_something(translator, toy_tsv):
    rows = [row.split("\t") for row in toy_tsv.read_text(encoding="utf-8").splitlines()[:200]]
    found = translator([source for source, _ in rows])
    assert sum(a == b for a, (_, b) in zip(found, rows, strict=True)) > 20


def test_the_same_as_fairseqs_generator(checkpoint, translator, toy_lines):
    """Oracle: fairseq's own ensemble, every hypothesis with its own copy of the source."""
    import torch
    from fairseq.sequence_generator import SequenceGenerator

    from fairseq_ext.translation.decode.checkpoint import build_model

    model = build_model(read_state(checkpoint), checkpoint)
    dictionary = model.decoder.dictionary
    for beam in (5, 1, 3):
        generator = SequenceGenerator(
            [model], dictionary, beam_size=beam, max_len_a=0, max_len_b=40
        )
        options = DecodeOptions(beam=beam, nbest=beam, max_len_a=0, max_len_b=40, unkpen=0)
        found = translator.translate(toy_lines[:40], options)
        for line, translation in zip(toy_lines, found, strict=False):
            ids = torch.tensor([translator.vocabulary.encode(line)])
            net_input = {"src_tokens": ids, "src_lengths": torch.tensor([ids.size(1)])}
            expected = generator.generate([model], {"net_input": net_input})[0]
            texts = [translator.vocabulary.text(h["tokens"].tolist()) for h in expected]
            assert [h.text for h in translation.hypotheses] == texts
            scores = [float(h["score"]) for h in expected]
            assert [h.score for h in translation.hypotheses] == pytest.approx(scores, abs=2e-4)


def test_hundreds_of_nasty_lines(translator):
    draw = random.Random(5)
    lines = NASTY + [
        "".join(draw.choices("ab 我。\t\u2028😀龘", k=draw.randrange(30))) for _ in range(300)
    ]
    draw.shuffle(lines)
    found = list(translator.translate(lines, DecodeOptions(beam=2, max_len_a=0.5, max_len_b=5)))
    assert len(found) == len(lines)
    for line, translation in zip(lines, found, strict=True):
        assert not set(translation.text) & set("\n\r\t\x0b\x0c\x1c\x85\u2028\u2029\0")
        assert "▁" not in translation.text and "<unk>" not in translation.text
        assert (translation.parts == 0) == (not translator.vocabulary.clean(line))


def test_nbest_is_sorted_and_scored(translator, toy_lines):
    for translation in translator.translate(toy_lines[:20], DecodeOptions(beam=4, nbest=4)):
        scores = [h.score for h in translation.hypotheses]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True) and scores[0] < 0


def test_an_output_that_reaches_its_limit_is_marked(translator):
    (found,) = translator.translate(["I like red apples."], DecodeOptions(max_len_a=0, max_len_b=2))
    assert found.cut
    (found,) = translator.translate(["I like red apples."])
    assert not found.cut


def test_ensembles(checkpoint, translator, toy_lines, tmp_path):
    """Of equal models: the model. Of a model and a broken one: not the model."""
    import torch

    same = Translator.from_checkpoint(f"{checkpoint}:{checkpoint}")
    lines = toy_lines[:30]
    assert same(lines) == translator(lines)
    state = read_state(checkpoint)
    for tensor in state["model"].values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    torch.save(state, tmp_path / "noise.pt")
    mixed = Translator.from_checkpoint([checkpoint, tmp_path / "noise.pt"])
    assert mixed(lines) != translator(lines)


def test_an_ensemble_needs_one_vocabulary_and_direction(checkpoint, toy_pairs_codec, tmp_path):
    import torch

    state = read_state(checkpoint)
    for change, text in (
        (
            dict(spm={"en": toy_pairs_codec, "zh": toy_pairs_codec}),
            "different SentencePiece models",
        ),
        (dict(source_lang="zh", target_lang="en"), "an ensemble needs one direction"),
        (dict(normalise="none"), "an ensemble needs one convention"),
    ):
        other = copy.deepcopy(state)
        other["task_state"]["translation"].update(change)
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(UserError, match=text):
            Translator.from_checkpoint([checkpoint, tmp_path / "other.pt"])


@pytest.fixture(scope="session")
def toy_pairs_codec(toy_data):
    """Another SentencePiece model, as a checkpoint holds it."""
    import torch

    from fairseq_ext.translation.text.spm import train_model

    model = train_model([toy_data / "text" / "train.en"], size=400)
    return torch.frombuffer(bytearray(model), dtype=torch.uint8)


# --- checkpoints -------------------------------------------------------------------------------------


def test_a_checkpoint_of_fairseq_train_and_nothing_else(
    toy_checkpoint, toy_data, tmp_path, monkeypatch
):
    """Another folder, no data: the model as trained by the command."""
    import torch

    path = tmp_path / "elsewhere.pt"
    state = torch.load(toy_checkpoint, weights_only=False)
    state["cfg"]["task"]["data"] = str(tmp_path / "deleted")
    torch.save(state, path)
    monkeypatch.chdir(tmp_path)
    lines = ["I like red apples.", "", "gold 鑫"]
    found = Translator.from_checkpoint("elsewhere.pt", threads=1)(lines)
    assert len(found) == 3 and found[1] == ""
    assert found == Translator.from_checkpoint(toy_checkpoint, threads=1)(lines)


def test_threads_are_those_of_the_process_but_while_it_decodes(toy_checkpoint):
    import torch

    before = torch.get_num_threads()
    translator = Translator.from_checkpoint(toy_checkpoint, threads=before + 1)
    seen = []
    layer = translator.backend.models[0].decoder.layers[0]
    layer.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    assert torch.get_num_threads() == before
    translator(["I like red apples."])
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


@pytest.mark.slow
def test_translating_loads_fairseq_without_what_its_other_tasks_need(toy_checkpoint, repo_root):
    """And a criterion of fairseq that needs them has them all the same."""
    code = f"""
import sys
from fairseq_ext.translation import Translator
print(Translator.from_checkpoint({str(toy_checkpoint)!r})(["I like red apples."])[0] != "")
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert "fairseq" in loaded and not {{"scipy", "sklearn", "matplotlib"}} & loaded
from fairseq.criterions import sentence_prediction as criterion
from fairseq.tasks import audio_classification as task
assert round(criterion.f1_score([1, 0, 1], [1, 1, 1]), 3) == 0.8
assert criterion.pearsonr([1, 2, 3], [2, 4, 6])[0] > 0.999
assert task.sklearn_metrics.roc_curve([0, 1], [0.2, 0.8])[0].tolist() == [0, 0, 1]
import scipy.stats, sklearn.metrics
assert criterion.f1_score([1], [1]) == sklearn.metrics.f1_score([1], [1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def broken(kind, checkpoint, folder):
    """A file that is no usable checkpoint."""
    import torch

    path = folder / "bad.pt"
    if kind == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:50_000])
    elif kind == "no checkpoint":
        torch.save({"a": 1}, path)
    elif kind == "no cfg":
        torch.save({**read_state(checkpoint), "cfg": None}, path)
    elif kind == "plain translation":
        state = read_state(checkpoint)
        state["task_state"] = {}
        state["cfg"]["task"]["_name"] = "translation"
        torch.save(state, path)
    elif kind == "speaker":
        state = read_state(checkpoint)
        state["task_state"] = {"speakers": ["a"], "spec": {}}
        state["cfg"]["task"]["_name"] = "speaker_id"
        torch.save(state, path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("backend", ["fairseq", "ctranslate2"])
@pytest.mark.parametrize(
    "kind, text",
    [
        ("missing", "does not exist: give the path of a checkpoint"),
        ("folder", "is a folder: give one checkpoint in it"),
        ("truncated", "is truncated"),
        ("no checkpoint", "is not a checkpoint of fairseq-train"),
        ("no cfg", "has no cfg"),
        ("plain translation", "fairseq's own --task translation"),
        ("speaker", r"is of another task \(speaker_id\)"),
    ],
)
def test_what_is_no_translation_model(kind, text, backend, checkpoint, tmp_path):
    path = broken(kind, checkpoint, tmp_path)
    with pytest.raises(UserError, match=text) as error:
        Translator.from_checkpoint(path, backend=backend)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == ([path] if kind != "missing" else [])


def test_a_checkpoint_runs_nothing(tmp_path):
    import os
    import pickle

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_here"),)

    import torch

    torch.save({"model": Malicious()}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(UserError, match="refused unread"):
        Translator.from_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "was_here").exists()


def test_paths_of_an_ensemble(tmp_path):
    assert split_paths("a.pt:b.pt") == ["a.pt", "b.pt"]
    assert split_paths([Path("a.pt"), "b.pt"]) == ["a.pt", "b.pt"]
    (tmp_path / "a:b.pt").touch()
    assert split_paths(tmp_path / "a:b.pt") == [str(tmp_path / "a:b.pt")]
    for nothing in ("", [], "a.pt:"):
        with pytest.raises(UserError, match="no checkpoint given"):
            split_paths(nothing)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(backend="marian"), "unknown backend 'marian'"),
        (dict(compute_type="int8"), "no compute type 'int8'"),
        (dict(device="cuda:99"), "'cuda:99' cannot be used"),
    ],
)
def test_what_cannot_be_had(checkpoint, options, text):
    with pytest.raises(UserError, match=text):
        Translator.from_checkpoint(checkpoint, **options)


# --- sampling: a line's draws are its own --------------------------------------------------------------


def sample(translator, lines, seeds, max_tokens=1024, **options):
    options = SampleOptions(max_tokens=max_tokens, **options)
    vocabulary = translator.vocabulary
    ids = [tuple(vocabulary.encode(vocabulary.clean(line))) for line in lines]
    sources = [[Source(one, seed)] for one, seed in zip(ids, seeds, strict=True)]
    return [parts[0][0] for parts in translator.decode_window(sources, options)]


@pytest.mark.parametrize("how", [{}, {"topk": 5}, {"topp": 0.9, "temperature": 1.5}], ids=str)
def test_a_sample_does_not_depend_on_its_batch(translator, toy_lines, how):
    lines, seeds = toy_lines[:40], list(range(40))
    together = sample(translator, lines, seeds, **how)
    backwards = sample(translator, lines[::-1], seeds[::-1], **how)[::-1]
    small = sample(translator, lines, seeds, max_tokens=30, **how)
    alone = [sample(translator, [a], [b], **how)[0] for a, b in zip(lines, seeds, strict=True)]
    for other in (backwards, small, alone):
        assert [c.ids for c in other] == [c.ids for c in together]
        assert [c.score for c in other] == pytest.approx([c.score for c in together], abs=1e-4)


def test_equal_lines_with_other_seeds_are_drawn_apart(translator, toy_lines):
    found = sample(translator, [toy_lines[0]] * 30, range(30), temperature=3.0)
    assert len({tuple(c.ids) for c in found}) > 15
    again = sample(translator, [toy_lines[0]] * 30, range(30), temperature=3.0)
    assert [c.ids for c in again] == [c.ids for c in found]


def test_the_most_probable_piece_alone_is_greedy_search(translator, toy_lines):
    greedy = translator(toy_lines[:30], beam=1)
    drawn = sample(translator, toy_lines[:30], range(30), topk=1)
    assert [translator.vocabulary.text(c.ids) for c in drawn] == greedy


def test_first_pieces_come_as_often_as_the_model_says(translator, toy_lines):
    """One source many times: frequencies of the first piece beside the model's softmax."""
    import torch
    from scipy.stats import chisquare

    n = 1500
    found = sample(
        translator, [toy_lines[0]] * n, range(n), temperature=4.0, max_len_a=0, max_len_b=3
    )
    ids = translator.vocabulary.encode(toy_lines[0])
    model = translator.backend.models[0]
    with torch.inference_mode():
        logits, _ = model(torch.tensor([ids]), torch.tensor([len(ids)]), torch.tensor([[EOS]]))
    logits = logits[0, 0] / 4.0
    # never the specials, and not the end of a sentence at its beginning
    logits[:4] = -torch.inf
    wanted = torch.softmax(logits.double(), 0) * n
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=len(wanted))
    often = wanted >= 5
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    expected = [*wanted[often].tolist(), float(wanted[~often].sum())]
    assert often.sum() > 3 and chisquare(observed, expected).pvalue > 1e-3


def test_a_pack_translates_as_its_checkpoint(translator, checkpoint, toy_lines, tmp_path):
    path = tmp_path / "toy.zip"
    pack(str(checkpoint), str(path), PackOptions())
    theirs = Translator.from_checkpoint(path)
    options = DecodeOptions(nbest=2)
    ours = list(translator.translate(toy_lines[:8], options))
    assert list(theirs.translate(toy_lines[:8], options)) == ours
    source = translator.vocabulary.source
    packed = Codec(Pack(path).read("spm.en.model"), source.extra_symbols)
    assert packed.encode("I like red") == source.encode("I like red")
