"""Hugging Face's models decode as fairseq's do, and a line gets what is its own."""

import json
import math
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from ext_common.cli import UserError
from ext_common.random import line_seed
from fairseq_ext.backtranslation.models import huggingface, huggingface_folder
from fairseq_ext.backtranslation.models.huggingface import open_model
from fairseq_ext.translation.decode.options import DecodeOptions, SampleOptions
from fairseq_ext.translation.decode.translator import Translator

_marian = runpy.run_path(str(Path(__file__).with_name("tiny_marian.py")))
make_marian, LENGTH = _marian["make_marian"], _marian["LENGTH"]
LINES = [source for source, _ in _marian["toy_pairs"](40, seed=5)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_marian(tmp_path_factory.mktemp("hf") / "opus-mt-zh-en", updates=200)


@pytest.fixture(scope="module")
def opened(trained):
    return open_model(trained)


def test_threads_are_those_of_the_process_but_while_it_decodes(trained, batch):
    before = torch.get_num_threads()
    backend, _ = open_model(trained, threads=before + 1)
    seen = []
    backend.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    assert torch.get_num_threads() == before
    backend.decode(batch[:2], DecodeOptions(beam=1), 5)
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Random weights: many pieces have a chance."""
    return open_model(make_marian(tmp_path_factory.mktemp("hf") / "random"))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A model of two target languages."""
    return make_marian(tmp_path_factory.mktemp("hf") / "zh-x", languages=("eng", "deu"))


@pytest.fixture(scope="module")
def batch(opened):
    return [tuple(opened[1].encode(line)) for line in LINES]


@pytest.fixture
def copy(trained, tmp_path):
    """A folder to break."""
    return Path(shutil.copytree(trained, tmp_path / "opus-mt-zh-en"))


def log_probs(backend, source, ids, temperature=1.0):
    """(len(ids) + 1, V): natural log-probabilities of every next piece, from one forward pass."""
    start = torch.tensor([[backend.start, *ids]])
    with torch.inference_mode():
        source = torch.tensor([source])
        mask = torch.ones_like(source)
        logits = backend.model(source, attention_mask=mask, decoder_input_ids=start).logits[0]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def total(backend, source, ids):
    """Log-probability of ids and </s>."""
    lprobs = log_probs(backend, source, ids)
    return sum(float(lprobs[n, i]) for n, i in enumerate([*ids, backend.eos]))


def allowed(backend, first=True):
    """Which ids may come: at the start no </s>."""
    size = backend.model.config.vocab_size
    never = {*backend.banned, backend.unk, *([backend.eos] if first else [])}
    return [i for i in range(size) if i not in never]


# --- search -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", [1, 4])
def test_together_as_alone(opened, batch, beam):
    backend, _ = opened
    options = DecodeOptions(beam=beam, nbest=beam)
    assert len({len(ids) for ids in batch}) > 4
    together = backend.decode(batch, options, 30)
    for ids, several in zip(batch, together, strict=True):
        (alone,) = backend.decode([ids], options, 30)
        assert [one.ids for one in alone] == [one.ids for one in several]
        for a, b in zip(alone, several, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-5)


@pytest.mark.parametrize("lenpen", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("beam, nbest", [(1, 1), (5, 5), (4, 2)])
def test_scores_are_fairseqs(opened, batch, beam, nbest, lenpen):
    """Sum of log-probabilities, </s> among them, over (pieces + 1) ** lenpen."""
    backend, _ = opened
    found = backend.decode(batch[:12], DecodeOptions(beam=beam, nbest=nbest, lenpen=lenpen), 40)
    for source, several in zip(batch, found, strict=False):
        assert len(several) == nbest
        assert [one.score for one in several] == sorted((c.score for c in several), reverse=True)
        assert len({tuple(one.ids) for one in several}) == nbest
        for one in several:
            expected = total(backend, source, one.ids) / (len(one.ids) + 1) ** lenpen
            assert one.score == pytest.approx(expected, abs=2e-4)


def fairseq_search(backend, source, beam, lenpen, limit):
    """Beam search as SequenceGenerator does it, one hypothesis at a time."""
    active, finished = [((), 0.0)], []
    for step in range(limit + 1):
        candidates = []
        for ids, score in active:
            lprobs = log_probs(backend, source, ids)[-1]
            may = allowed(backend, first=step == 0) if step < limit else [backend.eos]
            candidates += [((*ids, i), score + float(lprobs[i])) for i in may]
        candidates = sorted(candidates, key=lambda one: -one[1])[: 2 * beam]
        for ids, score in candidates[:beam]:
            if ids[-1] == backend.eos and len(finished) < beam:
                finished.append((list(ids[:-1]), score / len(ids) ** lenpen))
        if len(finished) == beam:
            break
        active = [one for one in candidates if one[0][-1] != backend.eos][:beam]
    return sorted(finished, key=lambda one: -one[1])


@pytest.mark.parametrize(
    "beam, lenpen, limit", [(1, 1.0, 20), (3, 1.0, 20), (4, 0.0, 20), (4, 2.0, 6)]
)
def test_the_search_is_fairseqs(opened, flat, batch, beam, lenpen, limit):
    options = DecodeOptions(beam=beam, nbest=beam, lenpen=lenpen)
    for backend in (opened[0], flat[0]):
        found = backend.decode(batch[:6], options, limit)
        for source, several in zip(batch, found, strict=False):
            expected = fairseq_search(backend, source, beam, lenpen, limit)
            assert [one.ids for one in several] == [ids for ids, _ in expected]
            for one, (_, score) in zip(several, expected, strict=True):
                assert one.score == pytest.approx(score, abs=2e-4)


def test_the_limit_is_fairseqs(opened, batch):
    backend, _ = opened
    for beam in (1, 3):
        for (one, *_), source in zip(
            backend.decode(batch, DecodeOptions(beam=beam), 3), batch, strict=True
        ):
            assert len(one.ids) == 3 and one.cut
            assert one.score == pytest.approx(total(backend, source, one.ids) / 4, abs=2e-4)
        free = [best for best, *_ in backend.decode(batch, DecodeOptions(beam=beam), 40)]
        assert [one.cut for one in free] == [len(one.ids) == 40 for one in free]
        assert not all(one.cut for one in free)


def test_more_hypotheses_than_there_are(flat, batch):
    """With a limit of one piece and min_len 1 there are only so many outputs."""
    backend, _ = flat
    there = len(allowed(backend))
    (found,) = backend.decode(batch[:1], DecodeOptions(beam=there + 5, nbest=there + 5), 1)
    assert len({tuple(one.ids) for one in found}) == len(found) <= there
    assert all(math.isfinite(one.score) for one in found)


def test_options_that_forbid(flat, batch):
    backend, _ = flat
    for beam in (1, 3):
        options = DecodeOptions(beam=beam, no_repeat_ngram=2)
        for (one,) in backend.decode(batch, options, 25):
            pairs = list(zip(one.ids, one.ids[1:], strict=False))
            assert len(pairs) == len(set(pairs)) > 0
        for (one,) in backend.decode(batch, DecodeOptions(beam=beam, min_len=12), 25):
            assert len(one.ids) >= 12


def test_unk_pad_and_start_never_come(copy, batch):
    """Even where the model wants nothing else; <unk> does where it may."""
    backend, vocabulary = open_model(copy)
    backend.model.final_logits_bias[0, [backend.pad, backend.unk]] = 50.0
    for options in (DecodeOptions(beam=1), DecodeOptions(beam=3, nbest=3)):
        found = backend.decode(batch, options, 12)
        ids = {i for several in found for one in several for i in one.ids}
        assert ids and not ids & {backend.pad, backend.unk, backend.eos}
    drawn = backend.sample(batch, range(len(batch)), SampleOptions(), 12)
    assert not {i for one in drawn for i in one.ids} & {backend.pad, backend.unk, backend.eos}
    for (one,) in backend.decode(batch, DecodeOptions(beam=1, unkpen=0.0), 12):
        assert set(one.ids) == {backend.unk} and vocabulary.text(one.ids) == ""


CARDS = {
    "other search": dict(num_beams=6, max_length=3, length_penalty=0.1, early_stopping="never"),
    "sampling": dict(do_sample=True, top_k=50, temperature=9.0, num_beams=1),
    "penalties": dict(repetition_penalty=9.0, no_repeat_ngram_size=1, min_length=20),
}


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_what_a_card_prefers_does_not_count(copy, opened, batch, card, where):
    """Older models have these in config.json, and no generation_config.json."""
    generation = copy / "generation_config.json"
    saved = json.loads((copy / where).read_text())
    if where == "config.json":
        card = card | json.loads(generation.read_text())
        generation.unlink()
    (copy / where).write_text(json.dumps(saved | card))
    backend, _ = open_model(copy)
    for options in (DecodeOptions(beam=1), DecodeOptions(beam=4, nbest=2)):
        expected = opened[0].decode(batch, options, 20)
        assert backend.decode(batch, options, 20) == expected
    seeds = range(len(batch))
    assert backend.sample(batch, seeds, SampleOptions(), 20) == opened[0].sample(
        batch, seeds, SampleOptions(), 20
    )


def test_what_a_card_forbids_stays_forbidden(copy, opened, batch):
    """Bans of one piece and of several."""
    (best,) = opened[0].decode(batch[:1], DecodeOptions(beam=1), 20)[0]
    path = copy / "generation_config.json"
    for words in ([best.ids[:1]], [best.ids[:2]]):
        card = json.loads(path.read_text())
        path.write_text(json.dumps(card | {"bad_words_ids": words}))
        backend, _ = open_model(copy)
        for options in (DecodeOptions(beam=1), DecodeOptions(beam=3)):
            ((one,),) = backend.decode(batch[:1], options, 20)
            text, never = " ".join(map(str, one.ids)), " ".join(map(str, words[0]))
            assert f" {never} " not in f" {text} "


# --- sampling ---------------------------------------------------------------------------------------


def test_a_sample_is_its_lines_own(flat, batch):
    """The same seeds in other batches and orders give the same ids."""
    backend, _ = flat
    seeds = [line_seed(1, line, 1) for line in range(len(batch))]
    options = SampleOptions(temperature=0.8)
    expected = backend.sample(batch, seeds, options, 25)
    assert len({tuple(one.ids) for one in expected}) > 30
    order = sorted(range(len(batch)), key=lambda n: (n * 17) % len(batch))
    for size in (1, 7, len(batch)):
        for start in range(0, len(batch), size):
            rows = order[start : start + size]
            found = backend.sample([batch[n] for n in rows], [seeds[n] for n in rows], options, 25)
            for n, one in zip(rows, found, strict=True):
                assert one.ids == expected[n].ids
                assert one.score == pytest.approx(expected[n].score, abs=1e-4)
    # a source under other seeds
    other = backend.sample([batch[0]] * 20, range(20), options, 25)
    assert len({tuple(one.ids) for one in other}) > 10


def test_a_larger_limit_only_goes_on(flat, batch):
    backend, _ = flat
    seeds = range(len(batch))
    short = backend.sample(batch, seeds, SampleOptions(), 5)
    long = backend.sample(batch, seeds, SampleOptions(), 25)
    assert [one.ids for one in short] == [one.ids[:5] for one in long]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_are_as_frequent_as_probable(flat, batch, temperature):
    backend, _ = flat
    count, options = 4000, SampleOptions(temperature=temperature)
    seeds = [line_seed(1, line, 1) for line in range(count)]
    drawn = backend.sample([batch[0]] * count, seeds, options, 1)
    probs = log_probs(backend, batch[0], [], temperature)[0].exp()
    may = allowed(backend)
    probs = probs[may] / probs[may].sum()
    found = [one.ids[0] for one in drawn]
    assert set(found) <= set(may)
    often = [n for n in range(len(may)) if probs[n] * count >= 5]
    rest = [n for n in range(len(may)) if n not in often]
    observed = [found.count(may[n]) for n in often]
    expected = [float(probs[n]) * count for n in often]
    observed.append(count - sum(observed))
    expected.append(float(probs[rest].sum()) * count if rest else 0.0)
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert len(observed) > 8
    assert chisquare(observed, expected).pvalue > 0.001


def test_nothing_hides_behind_the_50_best(flat, batch):
    """transformers 4 has top_k=50 where nobody asks for it."""
    backend, _ = flat
    best = log_probs(backend, batch[0], [])[0].topk(50).indices.tolist()
    options = SampleOptions(temperature=3.0)
    drawn = backend.sample([batch[0]] * 500, range(500), options, 1)
    outside = sum(one.ids[0] not in best for one in drawn)
    assert outside > 25
    options = SampleOptions(temperature=3.0, topk=50)
    may = torch.full((backend.model.config.vocab_size,), -torch.inf)
    may[allowed(backend)] = 0
    best = (log_probs(backend, batch[0], [])[0] + may).topk(50).indices.tolist()
    drawn = backend.sample([batch[0]] * 500, range(500), options, 1)
    assert {one.ids[0] for one in drawn} <= set(best)


def test_the_best_one_is_greedy(opened, flat, batch):
    for backend, _ in (opened, flat):
        drawn = backend.sample(batch, range(len(batch)), SampleOptions(topk=1), 20)
        greedy = backend.decode(batch, DecodeOptions(beam=1), 20)
        assert [one.ids for one in drawn] == [one.ids for (one,) in greedy]
        nearly = backend.sample(batch, range(len(batch)), SampleOptions(topp=1e-9), 20)
        assert [one.ids for one in nearly] == [one.ids for (one,) in greedy]


def test_the_score_of_a_sample(flat, batch):
    """Mean log-probability at temperature 1 of its pieces and </s>, among what may come."""
    backend, _ = flat
    options = SampleOptions(topk=20, temperature=0.5)
    for source, one in zip(
        batch, backend.sample(batch, range(len(batch)), options, 10), strict=True
    ):
        lprobs, ids = log_probs(backend, source, one.ids), [*one.ids, backend.eos]
        scores = []
        for step, i in enumerate(ids):
            may = allowed(backend, first=step == 0) if step < 10 else [backend.eos]
            scores.append(float(lprobs[step, i] - lprobs[step, may].logsumexp(0)))
        assert one.score == pytest.approx(sum(scores) / len(ids), abs=2e-4)
        assert one.cut == (len(one.ids) == 10)


# --- text -------------------------------------------------------------------------------------------


def test_lines_through_the_translator(opened):
    """In order, each as it is alone, empty ones too."""
    backend, vocabulary = opened
    lines = ["", *LINES, " \t", *LINES[:3], "\u3000"]
    for beam in (1, 3):
        expected = []
        for line in lines:
            text = vocabulary.clean(line)
            options = DecodeOptions(beam=beam)
            if text:
                ids = vocabulary.encode(text)
                limit = options.limit(len(ids), backend.max_target)
                ((one,),) = backend.decode([ids], options, limit)
                text = vocabulary.text(one.ids)
            expected.append(text)
        assert Translator(backend, vocabulary)(lines, beam=beam) == expected
        assert len(set(expected)) > 10


def test_ids_are_the_tokenizers(opened):
    vocabulary = opened[1]
    assert (vocabulary.source_lang, vocabulary.target_lang) == ("zh", "en")
    for line in LINES:
        assert vocabulary.encode(line) == vocabulary.tokenizer(line)["input_ids"]
    assert vocabulary.clean(" a\u2581b\n\0") == "a_b"


_PARTS = [
    "</s>",
    "<unk>",
    "<pad>",
    ">>eng<<",
    ">>deu<<",
    ">>",
    "<<",
    "<",
    ">",
    "我",
    "鱼",
    "s",
    " ",
]


@given(st.lists(st.sampled_from(_PARTS), min_size=1, max_size=8).map("".join))
def test_no_text_is_a_special_piece(several, text):
    for prefix in (">>eng<<", ">>deu<<"):
        vocabulary = _vocabulary(several, prefix)
        text = vocabulary.clean(text)
        ids = vocabulary.encode(text)
        tokenizer = vocabulary.tokenizer
        assert ids[0] == tokenizer.get_vocab()[prefix] and ids[-1] == tokenizer.eos_token_id
        special = {tokenizer.eos_token_id, tokenizer.pad_token_id, *vocabulary.code_ids}
        assert not set(ids[1:-1]) & special
        # and nothing is lost but how it is spaced
        pieces = "".join(tokenizer.tokenize(vocabulary.escape(text)))
        assert pieces.replace("▁", "") == text.replace(" ", "")


_opened: dict = {}


def _vocabulary(folder, prefix):
    if prefix not in _opened:
        _opened[prefix] = huggingface.load_vocabulary(folder, prefix=prefix)
    return _opened[prefix]


def test_marians_own_tokenizer_would_lose_it(several):
    """What the neutral spelling is for."""
    vocabulary = _vocabulary(several, ">>eng<<")
    lost = vocabulary.tokenizer(">>fra<< 鱼")["input_ids"]
    kept = vocabulary.encode(">>fra<< 鱼")
    assert len(kept) - 1 > len(lost)


def test_text_of_ids_is_one_line_without_special_pieces(opened):
    vocabulary = opened[1]
    known = vocabulary.tokenizer.get_vocab()
    words = vocabulary.tokenizer(text_target="like fish.")["input_ids"]
    assert vocabulary.text(words) == "like fish."
    assert vocabulary.text([known["<pad>"], *words, known["<unk>"]]) == "like fish."
    assert vocabulary.join(["one", "", "two"]) == "one two"


def test_encoding_in_threads(opened):
    vocabulary, lines = opened[1], LINES * 20
    expected = [vocabulary.encode(line) for line in lines]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(vocabulary.encode, lines)) == expected


def test_nothing_is_cut_that_is_too_long(opened):
    """It is the caller who reports it."""
    backend, vocabulary = opened
    assert backend.max_source == backend.max_target == LENGTH
    ids = vocabulary.encode("我喜欢鱼" * 300)
    assert len(ids) > 1200 > backend.max_source
    longest = [*ids[: LENGTH - 1], ids[-1]]
    options = DecodeOptions(max_len_a=0, max_len_b=10_000, min_len=10_000)
    limit = options.limit(LENGTH, backend.max_target)
    for beam in (1, 2):
        ((one,),) = backend.decode([longest], DecodeOptions(beam=beam, min_len=10_000), limit)
        assert len(one.ids) == LENGTH - 1


# --- prefixes ---------------------------------------------------------------------------------------


def test_a_prefix_stands_before_every_line(several):
    backend, vocabulary = open_model(several, prefix=">>eng<<")
    known = vocabulary.tokenizer.get_vocab()
    assert vocabulary.target_lang == "en"
    assert vocabulary.encode("鱼")[0] == known[">>eng<<"]
    assert {known[">>eng<<"], known[">>deu<<"]} <= set(backend.banned)
    # as the tokenizer itself would have it
    assert vocabulary.encode("鱼") == vocabulary.tokenizer(">>eng<< 鱼")["input_ids"]
    assert open_model(several, prefix="deu")[1].prefix == ">>deu<<"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "writes several languages: give --prefix and one of >>deu<<, >>eng<<"),
        (dict(target_lang="en"), "did you mean '>>eng<<'.: give --prefix"),
        (dict(target_lang="de"), "did you mean '>>deu<<'.: give --prefix"),
        (dict(prefix=">>fra<<"), "has no prefix '>>fra<<'.*it has >>deu<<, >>eng<<"),
        (dict(prefix=">>engl<<"), "has no prefix '>>engl<<': did you mean '>>eng<<'"),
        (dict(prefix=">>eng<<", target_lang="de"), "prefix .*en.*de|language en, not de"),
    ],
    ids=str,
)
def test_prefixes_that_are_missing_or_wrong(several, options, message):
    with pytest.raises(UserError, match=message):
        open_model(several, **options)


def test_a_prefix_where_there_are_none(trained):
    with pytest.raises(UserError, match="it has none, so leave out --prefix"):
        open_model(trained, prefix=">>eng<<")


# --- files ------------------------------------------------------------------------------------------


def one_sentence(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_a_folder_without_tokenizer(copy):
    for name in ("source.spm", "vocab.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(UserError, match="has no tokenizer that can be loaded") as error:
        open_model(copy)
    assert str(copy) in one_sentence(error)


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights that can be loaded") as error:
        open_model(copy)
    one_sentence(error)


def test_a_damaged_file_of_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="has no weights that can be loaded") as error:
        open_model(copy)
    one_sentence(error)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "m2m_100"])
def test_another_kind_of_model(copy, kind):
    (copy / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"of type '{kind}'") as error:
        open_model(copy)
    one_sentence(error)


@pytest.mark.parametrize("config", ["{}", "{", '{"model_type": "no such type"}'])
def test_a_config_that_cannot_be_used(copy, config):
    (copy / "config.json").write_text(config)
    with pytest.raises(UserError) as error:
        open_model(copy)
    assert str(copy) in one_sentence(error)


@pytest.mark.parametrize("key", ["model.encoder.layers.0.fc1.weight", "model.shared.weight"])
def test_weights_that_are_missing(copy, key):
    state = load_file(copy / "model.safetensors")
    assert key in state
    del state[key]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights missing") as error:
        open_model(copy)
    one_sentence(error)


def test_weights_under_the_name_of_what_they_are_tied_to(copy, opened, batch):
    """Where only the head is saved, the embeddings have it, or it is refused: never garbage."""
    state = load_file(copy / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.shared.weight")
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    try:
        backend, _ = open_model(copy)
    except UserError as error:
        assert "weights missing" in str(error)
        return
    options = DecodeOptions(beam=1)
    assert backend.decode(batch, options, 20) == opened[0].decode(batch, options, 20)


def test_weights_that_are_not_those_of_the_file(copy, monkeypatch):
    """What upgrades did: another tensor took the place of the one that was saved."""
    original = huggingface.import_transformers().AutoModelForSeq2SeqLM.from_pretrained

    def untied(*args, **kwargs):
        model, report = original(*args, **kwargs)
        model.model.shared.weight.data.normal_()
        return model, report

    transformers = huggingface.import_transformers()
    monkeypatch.setattr(transformers.AutoModelForSeq2SeqLM, "from_pretrained", untied)
    with pytest.raises(
        UserError, match=r"not those of the file after loading \(model.shared.weight"
    ):
        open_model(copy)


def test_the_older_file_of_weights(copy, opened, batch):
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    backend, _ = open_model(copy)
    options = DecodeOptions(beam=1)
    assert backend.decode(batch, options, 20) == opened[0].decode(batch, options, 20)


class _Harm:
    def __reduce__(self):
        return (print, ("code of a file of weights was run",))


def test_no_code_of_a_file_is_run(copy, capsys):
    (copy / "model.safetensors").unlink()
    torch.save({"model.shared.weight": _Harm()}, copy / "pytorch_model.bin")
    with pytest.raises(UserError):
        open_model(copy)
    assert "was run" not in capsys.readouterr().out


def test_a_bad_compute_type_and_device(trained):
    with pytest.raises(
        UserError, match="no compute type 'int8': it has float32, float16, bfloat16"
    ):
        open_model(trained, compute_type="int8")
    with pytest.raises(UserError, match="device 'nowhere' cannot be used"):
        open_model(trained, device="nowhere")


def test_bfloat16_decodes(trained, batch):
    backend, _ = open_model(trained, compute_type="bfloat16")
    assert backend.model.dtype == torch.bfloat16
    ((one, *_), *_) = backend.decode(batch, DecodeOptions(beam=2), 20)
    assert one.ids and math.isfinite(one.score)


def test_transformers_is_not_installed(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[huggingface\]'"):
        open_model(trained)


def test_a_name_that_the_hub_does_not_give(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def unreachable(name, **options):
        asked.append((name, options.get("local_files_only", False)))
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="no route to host.*give a local folder") as error:
        open_model("Helsinki-NLP/opus-mt-zh-en")
    one_sentence(error)
    # what is there already is taken first
    assert asked == [("Helsinki-NLP/opus-mt-zh-en", True), ("Helsinki-NLP/opus-mt-zh-en", False)]
    asked.clear()
    for path in ("./nowhere/model", "/nowhere/model", "nowhere", str(tmp_path / "none")):
        with pytest.raises(UserError, match="is no folder"):
            open_model(path)
    assert not asked
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_model(file)


def test_a_name_that_the_hub_gave_before(monkeypatch, trained):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(trained))
    assert huggingface_folder.find_folder("Helsinki-NLP/opus-mt-zh-en") == trained


# --- what files say ---------------------------------------------------------------------------------


def test_the_fingerprint_is_of_what_is_loaded(copy, trained):
    expected = huggingface.fingerprint(trained)
    assert len(expected) == 64 and huggingface.fingerprint(copy) == expected
    (copy / "README.md").write_text("a model")
    (copy / "pytorch_model.bin").write_bytes(b"the same in another format")
    (copy / ".cache").mkdir()
    (copy / "training_args.bin").write_bytes(b"x")
    assert huggingface.fingerprint(copy) == expected
    for name in ("model.safetensors", "source.spm", "vocab.json", "config.json"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert huggingface.fingerprint(copy) != expected
        (copy / name).write_bytes(before)
    assert huggingface.fingerprint(copy) == expected
    (copy / "vocab.json").rename(copy / "other.json")
    assert huggingface.fingerprint(copy) != expected


def test_a_description_needs_no_torch(trained):
    import subprocess

    code = (
        "import sys; from fairseq_ext.backtranslation.models.huggingface_folder import describe;"
        f" print(describe({str(trained)!r})['target_lang'], 'torch' in sys.modules,"
        " 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["en", "False", "False"]
    assert huggingface.describe(trained) == {
        "sha256": huggingface.fingerprint(trained),
        "backend": "huggingface",
        "source_lang": "zh",
        "target_lang": "en",
    }


def said(folder, name="model", **languages):
    folder = folder / name
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(languages))
    return folder


def test_languages_of_the_files(tmp_path):
    folder = said(tmp_path, source_lang="zho", target_lang="eng")
    found = huggingface_folder.languages
    assert found(folder) == ("zh", "en")
    assert found(folder, "zh", "en") == ("zh", "en")
    assert found(folder, "cmn_Hans", "eng") == ("zh", "en")
    with pytest.raises(UserError, match="has the source language zh, not de"):
        found(folder, "de")
    with pytest.raises(UserError, match="has the target language en, not zh"):
        found(folder, "zh", "zh")
    # a family of languages, of which one is asked for
    family = said(tmp_path, "family", source_lang="eng", target_lang="gmw")
    assert found(family, None, "de") == ("en", "de")
    assert found(family, None, None, ">>nld<<") == ("en", "nl")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text('{"source_lang": "fra", "target_lang": "ces"}')
    assert found(tmp_path / "config") == ("fr", "cs")


@pytest.mark.parametrize(
    "name, languages",
    [
        ("opus-mt-zh-en", ("zh", "en")),
        ("opus-mt-en-zh", ("en", "zh")),
        ("opus-mt-tc-big-eng-deu", ("en", "de")),
        ("Helsinki-NLP--opus-mt-ja-en", ("ja", "en")),
    ],
)
def test_languages_of_the_name(tmp_path, name, languages):
    assert huggingface_folder.languages(said(tmp_path, name)) == languages


def test_languages_that_nothing_says(tmp_path):
    folder = said(tmp_path, source_lang="zh")
    with pytest.raises(UserError, match="does not say its target language: give --model-target"):
        huggingface_folder.languages(folder)
    assert huggingface_folder.languages(folder, target_lang="en") == ("zh", "en")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        huggingface_folder.languages(folder)
