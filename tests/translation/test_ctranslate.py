"""CTranslate2: what it finds is what fairseq finds, converted once, from weights read safely."""

import copy
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.translation.conftest import toy_pairs, write_data

pytest.importorskip("ctranslate2")

from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from fairseq_ext.translation.decode import ctranslate, shortlist
from fairseq_ext.translation.decode.ctranslate_backend import VERSION
from fairseq_ext.translation.decode.options import SampleOptions
from fairseq_ext.translation.decode.translator import DecodeOptions, Translator

confident = runpy.run_path(str(Path(__file__).with_name("confident.py")))["confident"]


@pytest.fixture(scope="session")
def checkpoint(toy_checkpoint, toy_tsv, tmp_path_factory):
    rows = toy_tsv.read_text(encoding="utf-8").splitlines()
    path = confident(toy_checkpoint, [tuple(row.split("\t")) for row in rows])
    return Path(shutil.copy(path, tmp_path_factory.mktemp("ct2") / "model.pt"))


@pytest.fixture(scope="session")
def lines(toy_tsv):
    rows = toy_tsv.read_text(encoding="utf-8").splitlines()
    found = [row.split("\t")[0] for row in rows[-150:]]
    return [*found, "", "😀", "龘" * 30, "I " * 200, "<BT> x"]


@pytest.fixture(scope="session")
def translator(checkpoint):
    return Translator.from_checkpoint(checkpoint, threads=1)


@pytest.fixture(scope="session")
def converted(checkpoint):
    return Translator.from_checkpoint(checkpoint, backend="ctranslate2", threads=1)


@pytest.fixture(scope="session")
def german(tmp_path_factory):
    """A prepared bitext of other languages."""
    data = tmp_path_factory.mktemp("german") / "data"
    write_data(data, toy_pairs(700), ("en", "de"))
    return data


@pytest.mark.parametrize(
    "options",
    [
        dict(beam=1),
        dict(beam=5),
        dict(beam=5, lenpen=0.0),
        dict(beam=4, lenpen=2.0, nbest=2),
        dict(beam=1, no_repeat_ngram=2),
        dict(beam=1, min_len=6),
        dict(beam=1, max_len_a=0, max_len_b=5),
    ],
    ids=str,
)
def test_the_same_as_fairseq(translator, converted, lines, options):
    options = DecodeOptions(**options)
    expected = list(translator.translate(lines, options))
    found = list(converted.translate(lines, options))
    assert len(found) == len(lines)
    same = [a.text == b.text for a, b in zip(expected, found, strict=True)]
    assert sum(same) >= 0.99 * len(lines)
    for a, b, equal in zip(expected, found, same, strict=True):
        assert a.parts == b.parts
        if equal and not a.cut and options.min_len == 1 and not options.no_repeat_ngram:
            # CTranslate2 shares what <unk> and <pad> would have got among the others, at each piece
            pieces = len(converted.vocabulary.target.encode(a.text)) + 1
            assert a.score == pytest.approx(b.score, abs=0.05 * pieces ** (1 - options.lenpen))


def test_int8_differs_a_little(translator, checkpoint, lines):
    converted = Translator.from_checkpoint(checkpoint, "ctranslate2", compute_type="int8")
    expected, found = translator(lines), converted(lines)
    assert sum(a == b for a, b in zip(expected, found, strict=True)) > 0.8 * len(lines)


def test_together_as_alone(converted, lines):
    for beam in (1, 5):
        assert converted(lines, beam=beam) == [converted([line], beam=beam)[0] for line in lines]


def test_long_input_and_output_are_not_cut(converted):
    """CTranslate2 by itself stops reading at 1,024 and writing at 256 pieces."""
    (found,) = converted.translate(
        ["I like " * 100], DecodeOptions(beam=1, max_len_a=0, max_len_b=600, min_len=500)
    )
    ids = converted.vocabulary.target.encode(found.text)
    assert found.parts == 1 and len(ids) > 300


def test_unk_and_pad_are_never_chosen(checkpoint, lines):
    """Even where the model wants nothing else."""
    folder = next(checkpoint.parent.glob("*.ctranslate2-*-float32"))
    assert json.loads((folder / ctranslate.DESCRIPTION).read_text())["check"]["lines"] == 100
    converted = Translator.from_checkpoint(checkpoint, backend="ctranslate2")
    seen = []
    decode = converted.backend.decode

    def spy(batch, options, limit):
        found = decode(batch, options, limit)
        seen.extend(i for best in found for candidate in best for i in candidate.ids)
        return found

    converted.backend.decode = spy
    list(converted.translate(lines, DecodeOptions(beam=5, nbest=5)))
    assert seen and not set(seen) & {1, 2, 3}


def test_other_penalties_of_unk_are_refused(converted):
    with pytest.raises(UserError, match="--unkpen 0"):
        converted(["I like"], unkpen=1.0)


# --- a shortlist ------------------------------------------------------------------------------------


def shortlisted(checkpoint, data):
    return Translator(*ctranslate.open_model([checkpoint], threads=1, shortlist=str(data)))


def test_a_shortlist_of_the_right_pairs_changes_little(
    checkpoint, converted, lines, toy_data, capsys
):
    expected, found = converted(lines), shortlisted(checkpoint, toy_data)(lines)
    # probabilities are shared among the pieces of the list, so that close ones change places
    assert sum(a == b for a, b in zip(expected, found, strict=True)) > 0.9 * len(lines)
    assert "learnt from 601 of 601 pairs" in capsys.readouterr().err
    assert shortlisted(checkpoint, toy_data)(lines) == found
    assert not capsys.readouterr().err


def test_a_beam_keeps_to_the_shortlist(checkpoint, converted, toy_data, monkeypatch):
    """And a draw does not: others would be drawn."""
    monkeypatch.setattr(shortlist, "BEST", 0)
    monkeypatch.setattr(shortlist, "FREQUENT", 2)
    maps = f"*-shortlist-*/{shortlist.MAP}"
    before = set(checkpoint.parent.glob(maps))
    backend = shortlisted(checkpoint, toy_data).backend
    source = converted.vocabulary.encode("I like red apples.")
    options = DecodeOptions(beam=2, min_len=8)
    limit = options.limit(len(source), 100)
    (best, *_), (plain, *_) = (
        b.decode([source], options, limit)[0] for b in (backend, converted.backend)
    )
    (made,) = set(checkpoint.parent.glob(maps)) - before
    usual = set(made.read_text().split("\n")[0].split())
    assert len(usual) == 2
    allowed = {*map(str, source), *usual}
    assert set(map(str, best.ids)) <= allowed and not set(map(str, plain.ids)) <= allowed
    drawn = [one.sample([source], [1], SampleOptions(), 20) for one in (backend, converted.backend)]
    assert drawn[0] == drawn[1]


def test_a_shortlist_of_other_languages_is_refused(checkpoint, german):
    with pytest.raises(UserError, match="has no language 'zh': it has en and de"):
        shortlisted(checkpoint, german)


# --- conversion and its folder -----------------------------------------------------------------------


def test_converted_once_and_found_again(checkpoint, converted, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("converted a second time")

    import fairseq_ext.translation.decode.ctranslate_convert as module

    monkeypatch.setattr(module, "convert", never)
    again = Translator.from_checkpoint(checkpoint, backend="ctranslate2")
    assert again(["I like red apples."]) == converted(["I like red apples."])
    assert capsys.readouterr().err == ""
    names = sorted(p.name for p in checkpoint.parent.iterdir())
    assert not [name for name in names if name.startswith(".")]


def test_a_converted_model_needs_neither_torch_nor_fairseq(checkpoint, converted, repo_root):
    code = f"""
import sys
from fairseq_ext.translation.decode.translator import Translator
t = Translator.from_checkpoint({str(checkpoint)!r}, backend="ctranslate2", threads=1)
print(ascii(t(["I like red apples."])))
assert not {{"torch", "fairseq"}} & set(sys.modules), "imported"
"""
    done = processes.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(repo_root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ascii(converted(["I like red apples."]))


@pytest.fixture
def own(checkpoint, tmp_path):
    """A checkpoint with its converted folder, in a folder of its own."""
    folder = next(checkpoint.parent.glob("*.ctranslate2-*-float32"))
    shutil.copytree(folder, tmp_path / folder.name)
    return Path(shutil.copy(checkpoint, tmp_path / "model.pt")), tmp_path / folder.name


@pytest.fixture
def conversions(monkeypatch):
    """Conversions that are counted and made by copying."""
    import fairseq_ext.translation.decode.ctranslate_convert as module

    made = []

    def convert(checkpoint, folder, compute_type, digest, user_dir=None, ema=None):
        made.append((checkpoint.name, compute_type))
        (folder / "model.bin").write_bytes(b"weights")
        description = {
            "version": VERSION,
            "checkpoint_sha256": digest,
            "files": {"model.bin": 7},
        }
        (folder / ctranslate.DESCRIPTION).write_text(json.dumps(description))
        return "converted"

    monkeypatch.setattr(module, "convert", convert)
    return made


def test_another_checkpoint_of_the_same_name_is_converted_anew(own, converted, conversions):
    path, folder = own
    assert ctranslate.converted(path, "float32") == folder and not conversions
    made_of_it = Path(shutil.copytree(folder, f"{folder}-shortlist-1234abcd"))
    path.write_bytes(b"other weights")
    new = ctranslate.converted(path, "float32")
    assert new != folder and conversions == [("model.pt", "float32")]
    assert not folder.exists(), "what belongs to no checkpoint is removed"
    assert not made_of_it.exists()


@pytest.mark.parametrize("damage", ["model.bin", ctranslate.DESCRIPTION, "cut"])
def test_a_damaged_folder_is_made_anew(own, converted, conversions, damage):
    path, folder = own
    if damage == "cut":
        os.truncate(folder / "model.bin", 10)
    else:
        (folder / damage).unlink()
    assert ctranslate.converted(path, "float32") == folder
    assert conversions and ctranslate.is_whole(folder, sha256_file(path))
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, folder.name])


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    import fairseq_ext.translation.decode.ctranslate_convert as module

    def fail(checkpoint, folder, *_):
        (folder / "model.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "convert", fail)
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    with pytest.raises(KeyboardInterrupt):
        ctranslate.converted(path, "float32")
    assert list(tmp_path.iterdir()) == [path]


def test_beside_a_checkpoint_that_cannot_be_written_to(tmp_path, conversions, monkeypatch):
    """The user's cache, else a folder for this process."""
    (tmp_path / "read only").mkdir()
    path = tmp_path / "read only" / "model.pt"
    path.write_bytes(b"x")
    real = Path.mkdir
    closed = [path.parent]

    def mkdir(self, *args, **kwargs):
        if self.parent in closed:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = ctranslate.converted(path, "float32")
    assert found.parent == tmp_path / "cache" / "fairseq_ext"
    assert ctranslate.converted(path, "float32") == found and len(conversions) == 1
    shutil.rmtree(tmp_path / "cache")
    closed.append(tmp_path / "cache" / "fairseq_ext")
    found = ctranslate.converted(path, "float32")
    assert found.is_dir() and tmp_path not in found.parents


# --- what is not supported ---------------------------------------------------------------------------


def rebuilt(checkpoint, folder, arch="transformer", **changes):
    """A checkpoint of a model with other options, not trained."""
    import torch

    from fairseq_ext.translation.decode.checkpoint import build_model, read_state

    state = read_state(checkpoint)
    build_model(state, checkpoint)  # registers all that is needed
    from fairseq import models, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: F401
    from omegaconf import OmegaConf

    args = copy.deepcopy(state["cfg"]["model"])
    args = copy.deepcopy(args) if not isinstance(args, dict) else OmegaConf.create(args)
    for name, value in {"arch": arch, "_name": arch, **changes}.items():
        setattr(args, name, value)
    if arch != "transformer":
        models.ARCH_CONFIG_REGISTRY[arch](args)
    cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    task = tasks.setup_task(cfg.task, from_checkpoint=True)
    task.load_state_dict(state["task_state"])
    torch.manual_seed(1)
    model = task.build_model(args)
    state["cfg"]["model"] = args
    state["model"] = model.state_dict()
    path = folder / "other.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "changes, texts",
    [
        (dict(activation_fn="tanh"), ["activation function is 'tanh'"]),
        (
            dict(
                decoder_attention_heads=4,
                encoder_normalize_before=True,
                decoder_normalize_before=False,
                activation_fn="tanh",
            ),
            ["activation", "numbers of heads (2, 4)", "normalise at different places"],
        ),
        (dict(no_token_positional_embeddings=True), ["no positional embeddings"]),
        (dict(no_cross_attention=True), ["does not attend to the source"]),
    ],
)
def test_all_reasons_are_told_at_once(checkpoint, tmp_path, changes, texts):
    path = rebuilt(checkpoint, tmp_path, **changes)
    with pytest.raises(UserError, match="cannot be converted for CTranslate2") as error:
        Translator.from_checkpoint(path, backend="ctranslate2")
    for text in texts:
        assert text in str(error.value)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [path]


def test_an_lstm_is_told_to_be_none(checkpoint, tmp_path):
    path = rebuilt(
        checkpoint,
        tmp_path,
        arch="lstm",
        share_all_embeddings=True,
        encoder_embed_path=None,
        decoder_embed_path=None,
        encoder_hidden_size=32,
        decoder_hidden_size=32,
        decoder_out_embed_dim=32,
    )
    with pytest.raises(UserError, match="it is no Transformer of fairseq"):
        Translator.from_checkpoint(path, backend="ctranslate2")
    lines = ["I like red apples.", "", "you see", "龘 😀", "we buy new books and big houses."]
    lstm = Translator.from_checkpoint(path, threads=1)
    for beam in (1, 4):
        together = lstm(lines, beam=beam, max_len_a=0, max_len_b=8)
        alone = [lstm([line], beam=beam, max_len_a=0, max_len_b=8)[0] for line in lines]
        assert together == alone and together[1] == ""


@pytest.mark.parametrize(
    "changes",
    [
        dict(encoder_normalize_before=True, decoder_normalize_before=True),
        dict(encoder_normalize_before=False, decoder_normalize_before=False),
        dict(encoder_learned_pos=True, decoder_learned_pos=True, activation_fn="gelu"),
        dict(layernorm_embedding=True, no_scale_embedding=True),
        dict(share_all_embeddings=False, share_decoder_input_output_embed=False),
        dict(encoder_layers=2, decoder_layers=1, encoder_ffn_embed_dim=48),
    ],
    ids=str,
)
def test_other_transformers_are_converted(checkpoint, tmp_path, changes, lines):
    """With random weights: the check at conversion is the assertion, and refuses less than 99 %."""
    path = rebuilt(checkpoint, tmp_path, **changes)
    options = dict(beam=1, max_len_a=0, max_len_b=12)
    found = Translator.from_checkpoint(path, backend="ctranslate2", threads=1)(
        lines[:40], **options
    )
    expected = Translator.from_checkpoint(path, threads=1)(lines[:40], **options)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 39


def test_a_conversion_that_does_not_agree_is_refused(checkpoint, tmp_path, monkeypatch):
    import fairseq_ext.translation.decode.ctranslate_convert as module

    real = module.make_spec

    def wrong(model):
        spec = real(model)
        spec.decoder.layer[0].ffn.linear_0.weight = -spec.decoder.layer[0].ffn.linear_0.weight
        return spec

    monkeypatch.setattr(module, "make_spec", wrong)
    path = Path(shutil.copy(checkpoint, tmp_path / "model.pt"))
    with pytest.raises(UserError, match=r"greedy output is that of fairseq on \d+ of 100"):
        Translator.from_checkpoint(path, backend="ctranslate2")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(compute_type="float16"), "'float16' cannot be used by CTranslate2 on cpu"),
        (dict(compute_type="int9"), "'int9' cannot be used"),
        (dict(device="cuda:9"), "device 'cuda:9' cannot be used by CTranslate2"),
        (dict(device="tpu"), "device 'tpu' cannot be used by CTranslate2"),
    ],
)
def test_what_cannot_be_had(checkpoint, options, text):
    with pytest.raises(UserError, match=text):
        Translator.from_checkpoint(checkpoint, backend="ctranslate2", **options)


def test_no_ensembles(checkpoint):
    with pytest.raises(UserError, match="takes one checkpoint"):
        Translator.from_checkpoint([checkpoint, checkpoint], backend="ctranslate2")


def test_without_the_package(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match="pip install ctranslate2"):
        Translator.from_checkpoint(checkpoint, backend="ctranslate2")
