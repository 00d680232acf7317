"""CTranslate2 says what Hugging Face says, is converted once, and draws as far as it can be told to."""

import json
import math
import runpy
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from fairseq_ext.backtranslation.models import huggingface_ctranslate as wing
from fairseq_ext.backtranslation.models.huggingface import fingerprint
from fairseq_ext.backtranslation.models.huggingface import open_model as open_huggingface
from fairseq_ext.translation.decode import ctranslate
from fairseq_ext.translation.decode.options import DecodeOptions, SampleOptions
from fairseq_ext.translation.decode.translator import Translator

ctranslate2 = pytest.importorskip("ctranslate2")
_marian = runpy.run_path(str(Path(__file__).with_name("tiny_marian.py")))
make_marian, LENGTH = _marian["make_marian"], _marian["LENGTH"]
LINES = [source for source, _ in _marian["toy_pairs"](150, seed=5)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """In place of ~/.cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    return make_marian(tmp_path_factory.mktemp("hf") / "opus-mt-zh-en", updates=200)


@pytest.fixture(scope="module")
def reference(trained):
    return open_huggingface(trained)


@pytest.fixture(scope="module")
def exact(trained):
    return wing.open_model(trained, compute_type="float32", threads=1)


@pytest.fixture(scope="module")
def flat(tmp_path_factory, cache):
    """Random weights, on which many pieces have a chance, in both backends."""
    folder = make_marian(tmp_path_factory.mktemp("hf") / "random")
    return open_huggingface(folder)[0], wing.open_model(folder, compute_type="float32", threads=1)[
        0
    ]


@pytest.fixture(scope="module")
def batch(reference):
    return [tuple(reference[1].encode(line)) for line in LINES]


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "opus-mt-zh-en"))


@pytest.fixture
def ready(exact, trained, tmp_path):
    """What ct2-transformers-converter writes: no tokenizer, no note of ours."""
    made = wing.converted(trained, "float32")
    folder = Path(shutil.copytree(made, tmp_path / "ct2"))
    shutil.rmtree(folder / wing.TOKENIZER)
    (folder / ctranslate.DESCRIPTION).unlink()
    return folder


def total(backend, source, ids, limit):
    """Log-probability of ids and </s>, among what may come, as Hugging Face's model has it."""
    with torch.inference_mode():
        source = torch.tensor([source])
        start = torch.tensor([[backend.start, *ids]])
        mask = torch.ones_like(source)
        logits = backend.model(source, attention_mask=mask, decoder_input_ids=start).logits[0]
    logits = logits.clone()
    logits[:, [*backend.banned, backend.unk]] = -torch.inf
    logits[0, backend.eos] = -torch.inf
    lprobs = torch.log_softmax(logits.double(), dim=-1)
    return sum(float(lprobs[n, i]) for n, i in enumerate([*ids, backend.eos]))


def test_a_shortlist(trained, ready, toy_data, exact):
    """Of a model converted here, and of a folder that is no work of ours, with a map of its own."""
    (ready / "vmap.txt").write_text("\tnothing\n")
    pairs = [
        wing.open_model(trained, compute_type="float32", threads=1, shortlist=str(toy_data)),
        wing.open_model(ready, tokenizer=trained, threads=1, shortlist=str(toy_data)),
    ]
    expected, *found = (Translator(*pair)(LINES, beam=2) for pair in (exact, *pairs))
    for lines in found:
        assert sum(a == b for a, b in zip(expected, lines, strict=True)) > 0.7 * len(LINES)
    (folder,) = ready.parent.glob(f"{ready.name}-shortlist-*")
    written = (folder / "vmap.txt").read_text(encoding="utf-8")
    names = set(exact[1].tokenizer.get_vocab())
    assert written.count("\n") > 50 and set(written.replace("\t", " ").split()) <= names


# --- the same as Hugging Face -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(beam=1),
        dict(beam=4),
        dict(beam=4, lenpen=2.0, nbest=3),
        dict(beam=3, lenpen=0.0),
        dict(beam=1, min_len=6),
        dict(beam=1, no_repeat_ngram=2),
    ],
    ids=str,
)
def test_the_same_as_hugging_face(reference, exact, options):
    options = DecodeOptions(**options)
    expected = list(Translator(*reference).translate(LINES, options))
    found = list(Translator(*exact).translate(LINES, options))
    differing = [
        (line, a.text, b.text)
        for line, a, b in zip(LINES, expected, found, strict=True)
        if a.text != b.text
    ]
    print(differing)
    assert len(differing) <= 0.01 * len(LINES), differing
    assert len({one.text for one in found}) > 50
    for a, b in zip(expected, found, strict=True):
        if a.text == b.text and not a.cut and options.min_len == 1 and not options.no_repeat_ngram:
            # CTranslate2 shares what is forbidden, such as <unk>, among the others
            assert a.score == pytest.approx(b.score, abs=0.02 * (10 if not options.lenpen else 1))


def test_random_weights_are_the_same_too(flat, batch):
    """Where every output runs into its limit."""
    hugging, exact = flat
    options = DecodeOptions(beam=1)
    expected, found = (backend.decode(batch, options, 20) for backend in flat)
    same = [a[0].ids == b[0].ids for a, b in zip(expected, found, strict=True)]
    assert sum(same) >= 0.99 * len(batch)
    assert sum(one.cut for (one,) in found) > 100
    assert max(len(one.ids) for (one,) in found) == 20


def test_int8_differs_a_little(trained, reference, capsys):
    backend, vocabulary = wing.open_model(trained, threads=1)
    assert backend.model.compute_type.startswith("int8")
    folder = wing.converted(trained, "int8")
    check = json.loads((folder / ctranslate.DESCRIPTION).read_text())["check"]
    assert check["lines"] == wing.SAMPLES and 0 < check["same"] <= wing.SAMPLES
    found = Translator(backend, vocabulary)(LINES, beam=1)
    expected = Translator(*reference)(LINES, beam=1)
    assert sum(a == b for a, b in zip(expected, found, strict=True)) > 0.8 * len(LINES)


def test_together_as_alone(exact, batch):
    backend, _ = exact
    for beam in (1, 4):
        options = DecodeOptions(beam=beam)
        together = backend.decode(batch[:40], options, 20)
        for ids, (one,) in zip(batch, together, strict=False):
            ((alone,),) = backend.decode([ids], options, 20)
            assert alone.ids == one.ids


def test_no_silent_limits(exact, tmp_path):
    """CTranslate2 by itself stops reading at 1,024 and writing at 256 pieces, with a beam of 2."""
    asked = {}

    class Model:
        device, num_translators = "cpu", 1

        def translate_batch(self, sources, **options):
            asked.update(options, sources=sources)
            return []

    vocabulary = exact[1]
    backend = wing.HuggingFaceCTranslate2Backend(Model(), (3000, 3000), vocabulary)
    ids = [*vocabulary.encode("鱼" * 2000)]
    backend.decode([ids], DecodeOptions(beam=7), 2500)
    assert asked["max_input_length"] == 0 and asked["max_decoding_length"] == 2501
    assert asked["beam_size"] == 7 and asked["disable_unk"]
    # </s> is not added by what Hugging Face's models are converted to
    assert asked["sources"][0][-1] == "</s>" and len(asked["sources"][0]) == len(ids)
    backend = wing.HuggingFaceCTranslate2Backend(Model(), (9, 9), vocabulary, source_eos=True)
    backend.decode([ids], DecodeOptions(), 5)
    assert len(asked["sources"][0]) == len(ids) - 1
    assert (exact[0].max_source, exact[0].max_target) == (LENGTH, LENGTH)
    config = json.loads(
        (wing.converted(Path(_folder_of(exact)), "float32") / "config.json").read_text()
    )
    assert config["add_source_eos"] is False


def _folder_of(opened):
    return Path(opened[1].tokenizer.name_or_path)


def test_the_longest_source_and_target(exact):
    backend, vocabulary = exact
    ids = vocabulary.encode("我喜欢鱼" * 100)
    longest = [*ids[: LENGTH - 1], ids[-1]]
    options = DecodeOptions(beam=1, min_len=10_000)
    ((one,),) = backend.decode([longest], options, LENGTH - 1)
    assert len(one.ids) == LENGTH - 1 and one.cut


def test_prefixes_go_in_and_never_come_out(tmp_path, cache):
    folder = make_marian(tmp_path / "zh-x", languages=("eng", "deu"))
    with pytest.raises(UserError, match="writes several languages"):
        wing.open_model(folder, compute_type="float32")
    backend, vocabulary = wing.open_model(folder, compute_type="float32", prefix=">>eng<<")
    assert vocabulary.target_lang == "en"
    hugging, _ = open_huggingface(folder, prefix=">>eng<<")
    sources = [vocabulary.encode(line) for line in LINES]
    expected = hugging.decode(sources, DecodeOptions(beam=1), 15)
    found = backend.decode(sources, DecodeOptions(beam=1), 15)
    same = sum(a[0].ids == b[0].ids for a, b in zip(expected, found, strict=True))
    assert same >= 0.99 * len(LINES)
    drawn = backend.sample(sources, range(len(sources)), SampleOptions(temperature=5.0), 40)
    ids = {i for one in drawn for i in one.ids}
    assert len(ids) > 50 and not ids & set(vocabulary.code_ids)


# --- sampling ---------------------------------------------------------------------------------------


def test_a_batch_that_is_drawn_again_is_the_same(exact, flat, batch):
    for backend in (exact[0], flat[1]):
        options, seeds = SampleOptions(temperature=1.3), range(100, 140)
        first = backend.sample(batch[:40], seeds, options, 25)
        # whatever was drawn in between
        backend.sample(batch[:7], range(7), options, 25)
        backend.decode(batch[:7], DecodeOptions(), 25)
        assert backend.sample(batch[:40], seeds, options, 25) == first
        other = backend.sample(batch[:40], range(200, 240), options, 25)
        assert [one.ids for one in other] != [one.ids for one in first]
        assert [
            one.ids for one in backend.sample(batch[:40], seeds, SampleOptions(topk=3), 25)
        ] != [one.ids for one in first]


@pytest.mark.slow
def test_another_process_draws_the_same(trained, exact, batch):
    import subprocess
    import sys

    code = f"""
from fairseq_ext.backtranslation.models.huggingface_ctranslate import open_model
from fairseq_ext.translation.decode.options import SampleOptions
backend, _ = open_model({str(trained)!r}, compute_type="float32", threads=2)
found = backend.sample({batch[:20]!r}, range(20), SampleOptions(temperature=1.3), 25)
print([one.ids for one in found])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = exact[0].sample(batch[:20], range(20), SampleOptions(temperature=1.3), 25)
    assert json.loads(done.stdout) == [one.ids for one in found]


def test_batches_at_the_same_time_do_not_disturb_each_other(flat, batch):
    backend, options = flat[1], SampleOptions()
    chunks = [(batch[n : n + 10], range(n, n + 10)) for n in range(0, 100, 10)]
    expected = [backend.sample(ids, seeds, options, 15) for ids, seeds in chunks]
    start = threading.Barrier(5)

    def again(chunk):
        start.wait(timeout=60)
        return backend.sample(*chunk, options, 15)

    for _ in range(3):
        with ThreadPoolExecutor(5) as pool:
            assert list(pool.map(again, chunks)) == expected


def test_a_line_depends_on_its_batch(flat, batch):
    """As far as CTranslate2 goes: this is what fairseq and Hugging Face do better."""
    backend, options = flat[1], SampleOptions()
    together = backend.sample(batch[:20], range(20), options, 15)
    alone = [backend.sample([ids], [n], options, 15)[0] for n, ids in enumerate(batch[:20])]
    assert [one.ids for one in together] != [one.ids for one in alone]


@pytest.mark.parametrize("how", [dict(), dict(temperature=2.0), dict(topk=6)], ids=str)
def test_samples_are_as_frequent_as_probable(flat, batch, how):
    hugging, backend = flat
    count, options = 4000, SampleOptions(**how)
    drawn = backend.sample([batch[0]] * count, range(count), options, 1)
    with torch.inference_mode():
        source = torch.tensor([batch[0]])
        start = torch.tensor([[hugging.start]])
        logits = hugging.model(source, decoder_input_ids=start).logits[0, 0].double()
    logits = logits.clone()
    logits[[*hugging.banned, hugging.unk, hugging.eos]] = -torch.inf
    if options.topk:
        logits[logits < logits.topk(options.topk).values[-1]] = -torch.inf
    probs = torch.softmax(logits / options.temperature, dim=-1)
    found = [one.ids[0] for one in drawn]
    assert all(probs[i] > 0 for i in set(found))
    often = [i for i in range(len(probs)) if probs[i] * count >= 5]
    observed = [found.count(i) for i in often] + [sum(i not in often for i in found)]
    expected = [float(probs[i]) * count for i in often]
    expected.append(count - sum(expected))
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert len(observed) >= 6
    assert chisquare(observed, expected).pvalue > 0.001


def test_the_best_one_is_greedy(exact, batch):
    backend, _ = exact
    drawn = backend.sample(batch, range(len(batch)), SampleOptions(topk=1), 20)
    greedy = backend.decode(batch, DecodeOptions(beam=1), 20)
    assert [one.ids for one in drawn] == [one.ids for (one,) in greedy]


def test_the_score_of_a_sample(reference, exact, batch):
    """At temperature 1, as of Hugging Face's model."""
    options = SampleOptions(temperature=1.5, topk=20)
    drawn = exact[0].sample(batch[:40], range(40), options, 40)
    ended = [(source, one) for source, one in zip(batch, drawn, strict=False) if not one.cut]
    assert len(ended) > 20
    for source, one in ended:
        expected = total(reference[0], source, one.ids, 40) / (len(one.ids) + 1)
        assert one.score == pytest.approx(expected, abs=1e-3)


# --- converted once ---------------------------------------------------------------------------------


def test_converted_once_and_checked(copy, capsys):
    folder = wing.converted(copy, "float32")
    said = capsys.readouterr().err
    assert "this happens once" in said and f"of {wing.SAMPLES} sample lines" in said
    assert folder.parent == copy.parent and fingerprint(copy)[:8] in folder.name
    stamp = (folder / "model.bin").stat().st_mtime_ns
    assert wing.converted(copy, "float32") == folder
    assert (folder / "model.bin").stat().st_mtime_ns == stamp
    assert not capsys.readouterr().err
    assert not list(copy.parent.glob(".ctranslate2-*"))
    # a damaged one is made again
    (folder / "model.bin").write_bytes(b"")
    assert wing.converted(copy, "float32") == folder
    assert (folder / "model.bin").stat().st_size > 1000


def test_another_model_is_another_folder(copy, capsys):
    first = wing.converted(copy, "float32")
    state = load_file(copy / "model.safetensors")
    state["model.decoder.layers.0.fc1.bias"] += 0.5
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    second = wing.converted(copy, "float32")
    assert (
        first != second
        and (first / "model.bin").read_bytes() != (second / "model.bin").read_bytes()
    )


def test_beside_a_folder_that_cannot_be_written_to(trained, copy, cache, monkeypatch):
    original = Path.mkdir

    def refuse(self, *args, **kwargs):
        if self.parent == copy.parent:
            raise PermissionError(13, "Permission denied")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert wing.converted(copy, "float32").parent == cache / "fairseq_ext"


def test_float32_that_disagrees_is_refused(copy, monkeypatch):
    """Marian decodes from <pad>; CTranslate2 from zeros, whatever the weights of <pad>."""
    state = load_file(copy / "model.safetensors")
    state["model.shared.weight"][-1] = 3.0
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"of 100 sample lines.*it is not used; use --backend hugg"):
        wing.converted(copy, "float32")
    assert not list(copy.parent.glob("*.ctranslate2-*"))


def test_what_cannot_be_converted(copy, monkeypatch):
    from ctranslate2.converters import transformers as converters

    # so that no test before this one has converted it
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config + "\n")
    monkeypatch.delitem(converters._MODEL_LOADERS, "MarianConfig")
    with pytest.raises(
        UserError, match="cannot be converted for CTranslate2 .*MarianConfig"
    ) as error:
        wing.converted(copy, "float32")
    assert "\n" not in str(error.value)


# --- ready-made -------------------------------------------------------------------------------------


def test_a_folder_of_ours_by_itself(trained, exact, batch, tmp_path):
    made = shutil.copytree(wing.converted(trained, "float32"), tmp_path / "alone")
    backend, vocabulary = wing.open_model(made, compute_type="float32", threads=1)
    assert (vocabulary.source_lang, vocabulary.target_lang) == ("zh", "en")
    assert (backend.max_source, backend.max_target) == (LENGTH, LENGTH)
    options = DecodeOptions(beam=1)
    assert backend.decode(batch, options, 20) == exact[0].decode(batch, options, 20)
    assert wing.describe(made) == wing.describe(trained)


def test_a_folder_with_a_tokenizer_elsewhere(ready, trained, exact, batch):
    with pytest.raises(UserError, match="no tokenizer: give --tokenizer"):
        wing.open_model(ready, compute_type="float32")
    backend, vocabulary = wing.open_model(
        ready, compute_type="float32", tokenizer=trained, threads=1
    )
    assert backend.max_source == LENGTH
    options = DecodeOptions(beam=1)
    assert backend.decode(batch, options, 20) == exact[0].decode(batch, options, 20)
    said = wing.describe(ready, tokenizer=trained)
    assert said["source_lang"] == "zh" and said["backend"] == "ctranslate2"
    assert len(said["sha256"]) == 64


def test_a_folder_with_a_tokenizer_in_it(ready, trained, exact, batch):
    for name in ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, ready / name)
    backend, vocabulary = wing.open_model(ready, compute_type="float32", threads=1)
    options = DecodeOptions(beam=1)
    assert backend.decode(batch, options, 20) == exact[0].decode(batch, options, 20)
    said = wing.describe(ready)
    assert (said["source_lang"], said["target_lang"]) == ("zh", "en")
    before = said["sha256"]
    (ready / "source.spm").write_bytes((ready / "target.spm").read_bytes())
    assert wing.describe(ready)["sha256"] != before


def test_an_older_tokenizer_that_does_not_say_its_class(ready, trained, exact, batch):
    """In opus-mt only config.json says it, which in this folder is CTranslate2's."""
    for name in ("source.spm", "target.spm", "vocab.json"):
        shutil.copyfile(trained / name, ready / name)
    saved = '{"source_lang": "zh", "target_lang": "en"}'
    (ready / "tokenizer_config.json").write_text(saved)
    backend, vocabulary = wing.open_model(ready, compute_type="float32", threads=1)
    options = DecodeOptions(beam=1)
    assert backend.decode(batch, options, 20) == exact[0].decode(batch, options, 20)


def test_the_tokenizer_of_another_model(ready, tmp_path):
    other = make_marian(tmp_path / "other", pieces=60)
    with pytest.raises(
        UserError, match="give --tokenizer and the folder of the Hugging Face model"
    ):
        wing.open_model(ready, compute_type="float32", tokenizer=other)


def test_other_mistakes(ready, trained, tmp_path):
    with pytest.raises(UserError, match="is no CTranslate2 model: leave out --tokenizer"):
        wing.open_model(trained, tokenizer=trained)
    with pytest.raises(UserError, match="compute type 'int4' cannot be used"):
        wing.open_model(trained, compute_type="int4")
    (ready / "model.bin").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be loaded by CTranslate2"):
        wing.open_model(ready, tokenizer=trained)
    with pytest.raises(UserError, match="is no folder"):
        wing.open_model(tmp_path / "nothing")


def test_a_folder_converted_from_fairseq(reverse_checkpoint, toy_mono, cache):
    """The fourth kind: its vocabulary is SentencePiece's, in the folder."""
    made = ctranslate.converted(reverse_checkpoint, "float32")
    expected = ctranslate.open_model([str(reverse_checkpoint)], threads=1)
    backend, vocabulary = wing.open_model(made, compute_type="float32", threads=1)
    assert (vocabulary.source_lang, vocabulary.target_lang) == ("zh", "en")
    lines = toy_mono[:30]
    found = Translator(backend, vocabulary)(lines, beam=1)
    assert found == Translator(*expected)(lines, beam=1)
    assert wing.describe(made)["sha256"] == sha256_file(reverse_checkpoint)
    batch = [tuple(vocabulary.encode(vocabulary.clean(line))) for line in lines]
    options = SampleOptions(temperature=1.5)
    first = backend.sample(batch, range(30), options, 25)
    assert backend.sample(batch, range(30), options, 25) == first
    assert backend.sample(batch, range(1, 31), options, 25) != first
    assert all(math.isfinite(one.score) for one in first)
