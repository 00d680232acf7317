"""Reverse models behind their interface: what becomes of a line, whose draws are its own."""

import numpy as np
import pytest
import torch

from ext_common import manifest
from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from ext_common.random import STREAM, line_seed
from fairseq_ext.backtranslation import back_translate
from fairseq_ext.backtranslation.models.backends import (
    BACKENDS,
    Line,
    ModelOptions,
    ReverseModel,
    describe_model,
    kind_of,
    open_model,
)
from fairseq_ext.backtranslation.modes import FILLER, add_noise, make_mode
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.decode.checkpoint import Vocabulary
from fairseq_ext.translation.decode.options import Candidate
from fairseq_ext.translation.decode.translator import Translator


class Letters:
    def encode(self, text):
        return [ord(c) + 4 for c in text]

    def decode(self, ids):
        return "".join(chr(i - 4) for i in ids)


class Says:
    """A backend that says what it was given, and its seed behind it; "x" makes it run on, "!" say nothing."""

    name = "says"
    workers = 1
    max_source = max_target = 40
    max_tokens = 100

    def decode(self, batch, options, limit):
        return [[self._say(ids, str(rank)) for rank in range(options.nbest)] for ids in batch]

    def sample(self, batch, seeds, options, limit):
        return [self._say(ids, f" {seed}") for ids, seed in zip(batch, seeds, strict=True)]

    def _say(self, ids, more):
        text = Letters().decode(ids[:-1])
        if text.startswith("!"):
            return Candidate([], -1.0, False)
        found = Letters().encode(text + more)
        return Candidate(found, -float(len(text)), text.startswith("x"))


def says(**options):
    vocabulary = Vocabulary(Letters(), Letters(), "zh", "en", "none")
    return ReverseModel(
        Translator(Says(), vocabulary), {"sha256": "0" * 64}, ModelOptions(**options)
    )


def translate(model, lines, mode="beam", numbers=None, **options):
    numbers = range(1, len(lines) + 1) if numbers is None else numbers
    return model.translate(model.encode(lines), numbers, make_mode(mode), **options)


def test_every_line_has_its_outcome_in_order():
    lines = ["b", "", "aaa", "x on", "!", " \t", "c" * 40, "c" * 39]
    found = [best for (best,) in translate(says(), lines)]
    assert found[0] == Line("b0", -1.0) and found[2] == Line("aaa0", -3.0)
    assert found[7].text == "c" * 39 + "0"
    reasons = [line.reason for line in found]
    assert reasons[1] == reasons[5] == "the line is empty"
    assert reasons[3] == "the output did not end within 5 pieces"
    assert reasons[4] == "the output is empty"
    assert reasons[6] == "the line has 41 pieces, the model holds 40"
    assert all(line == Line("", None, line.reason) for line in found if line.reason)


def test_draws_are_of_seed_number_round_and_rank():
    ((one, two),) = translate(says(), ["a"], "sampling", [17], seed=3, round=2, nbest=2)
    assert one.text == f"a {line_seed(3, 17, 2)}" and two.text == f"a {line_seed(3, 17, 2, 1)}"
    # lines that are equal are drawn apart, and found again wherever they stand
    numbers = [5, 17, 9]
    found = translate(says(), ["a", "a", "bb"], "sampling", numbers, seed=3, round=2)
    assert [line.text.split()[1] for (line,) in found] == [str(line_seed(3, n, 2)) for n in numbers]


def test_n_best_of_a_search_are_its_hypotheses():
    assert [line.text for line in translate(says(), ["a"], nbest=3)[0]] == ["a0", "a1", "a2"]
    assert [line.reason for line in translate(says(), [""], nbest=3)[0]] == [
        "the line is empty"
    ] * 3


def test_noise_is_of_the_line():
    lines = ["one two three four five six"] * 5
    found = [best.text for (best,) in translate(says(), lines, "noised-beam")]
    again = [best.text for (best,) in translate(says(), lines[:2], "noised-beam", [4, 2])]
    assert again == [found[3], found[1]] and len(set(found)) > 1


def test_noise_is_of_the_stream_that_a_mode_has():
    """None: the numbers that NumPy's Philox gave a line before."""
    mode = make_mode("noised-beam")
    old = np.random.Generator(np.random.Philox(key=9)).random((3, 40))
    words = [f"w{k}" for k in range(40)]
    drop, fill, shuffle = mode.noise
    new, mode.stream = mode.finish(" ".join(words), 9, "en"), None
    found = mode.finish(" ".join(words), 9, "en")
    assert found.split() == add_noise(words, old, drop, fill, shuffle) != new.split()
    assert make_mode("topk").search().stream == STREAM


# --- a real model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(reverse_checkpoint):
    return open_model(str(reverse_checkpoint), ModelOptions(threads=1))


def test_it_knows_its_languages_and_hash(model, reverse_checkpoint):
    assert (model.source_lang, model.target_lang) == ("zh", "en")
    assert model.sha256 == sha256_file(reverse_checkpoint)
    described = describe_model(str(reverse_checkpoint), ModelOptions())
    assert described == model.description
    assert described["backend"] == "fairseq" and described["compute_type"] == "float32"


def test_a_shortlist_is_part_of_what_a_model_is(reverse_checkpoint, toy_data):
    path, data = str(reverse_checkpoint), str(toy_data)
    said = describe_model(path, ModelOptions(backend="ctranslate2", shortlist=data))
    plain = describe_model(path, ModelOptions(backend="ctranslate2"))
    assert said == {**plain, "shortlist": Corpus.open(data).split_sha256}
    with pytest.raises(UserError, match="--shortlist is for --backend ctranslate2"):
        describe_model(path, ModelOptions(shortlist=data))


def test_a_process_reads_a_checkpoint_once(model, reverse_checkpoint, tmp_path, monkeypatch):
    """To describe and to open it; the moments of the optimizer, most of a file, are only hashed."""
    state = torch.load(reverse_checkpoint, weights_only=False)
    state["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.ones(1 << 23)}}}
    path = tmp_path / "large.pt"
    torch.save(state, path)
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(a[0]) or load(*a, **k))
    hashed, digest = [], manifest.sha256_file
    monkeypatch.setattr(manifest, "sha256_file", lambda p: hashed.append(p) or digest(p))
    before = bytes_read()
    said = describe_model(str(path), ModelOptions())
    opened = open_model(str(path), ModelOptions(threads=1))
    size = path.stat().st_size
    assert (len(loads), len(hashed)) == (1, 1) and opened.description == said
    assert size > 1 << 25 and size <= bytes_read() - before < 1.2 * size
    # another content under the same name is another model
    state["model"]["encoder.layer_norm.bias"] += 1
    torch.save(state, path)
    assert describe_model(str(path), ModelOptions())["sha256"] != said["sha256"]


def bytes_read():
    """What this process has read by system calls, which leave out what is mapped."""
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["rchar"])


@pytest.mark.parametrize("mode", ["beam", "sampling", "topk", "topp", "noised-beam"])
def test_output_depends_on_the_line_alone(model, toy_mono, mode):
    lines = toy_mono[:30]
    whole = translate(model, lines, mode)
    parts = [translate(model, [line], mode, [n])[0] for n, line in enumerate(lines, 1)]
    back = translate(model, lines[::-1], mode, range(len(lines), 0, -1))[::-1]
    for other in (parts, back):
        assert [best.text for (best,) in other] == [best.text for (best,) in whole]
    assert all(best.text and best.reason is None for (best,) in whole)
    again = translate(model, lines, mode, seed=2)
    assert (again == whole) == (mode == "beam")


def test_the_api_gives_lines(model, toy_mono, reverse_checkpoint):
    lines = [*toy_mono[:5], "", toy_mono[5]]
    found = back_translate(lines, model, "beam")
    assert len(found) == 7 and found[5] == ""
    assert found == back_translate(lines, str(reverse_checkpoint), "beam", threads=1)
    with pytest.raises(TypeError, match="not one str"):
        back_translate("abc", model)
    with pytest.raises(TypeError, match="has its options"):
        back_translate(lines, model, device="cpu")


def test_what_a_path_is(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(UserError, match="no folder of a model"):
        kind_of(str(folder))
    (folder / "checkpoint_best.pt").touch()
    with pytest.raises(UserError, match="give a file, such as .*checkpoint_best.pt"):
        kind_of(str(folder))
    (folder / "config.json").touch()
    assert kind_of(str(folder)) == "huggingface"
    (folder / "model.bin").touch()
    assert kind_of(str(folder)) == "ctranslate2"
    assert kind_of("Helsinki-NLP/opus-mt-zh-en") == "huggingface"
    assert kind_of("ckpt/a.pt") == kind_of("a.pt:b.pt") == kind_of("no/such/file.pt") == "fairseq"


def test_an_unknown_backend_names_those_there_are(reverse_checkpoint):
    with pytest.raises(UserError, match="fairseq"):
        open_model(str(reverse_checkpoint), ModelOptions(backend="farseq"))
    assert "fairseq" in BACKENDS


def test_filler_is_no_piece_of_the_text(model):
    """<BLANK> in a real line is text like any other."""
    ids = model.encode([FILLER])[0]
    assert 3 not in ids


@pytest.mark.parametrize("split, parts", [(True, 3), (False, 1)])
def test_a_paragraph_is_translated_sentence_by_sentence(split, parts):
    """By a model whose training had one sentence in a line, and whose output is its input."""
    from dataclasses import replace

    from fairseq_ext.translation.text.sentences import Lines
    from tests.translation.test_translate import echo

    translator = echo()
    translator.vocabulary = replace(translator.vocabulary, lines=Lines(100, 0.0))
    model = ReverseModel(translator, {"sha256": "x"}, ModelOptions(split=split))
    encoded = model.encode(["It rains. Who is there? Nobody!", "One line.", ""])
    assert list(map(len, encoded)) == [parts, 1, 0]
    found = model.translate(encoded, [1, 2, 3], make_mode("beam", {"beam": 2}), nbest=2)
    assert [[line.text for line in several] for several in found] == [
        ["It rains. Who is there? Nobody!"] * 2,
        ["One line."] * 2,
        ["", ""],
    ]
