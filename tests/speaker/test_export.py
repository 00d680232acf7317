"""A model as an ONNX file: it computes what the model does, without torch, or is not written."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from ext_common import packed
from ext_common.cli import UsageError, UserError
from ext_common.pack import PackOptions, pack
from fairseq_ext.speaker import batching, inference
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.export import frontend, graph, parity
from fairseq_ext.speaker.export.__main__ import ExportOptions, checked, export
from fairseq_ext.speaker.export.exported import ExportedNetwork
from fairseq_ext.speaker.features import FeatureSpec, log_mel, resample
from fairseq_ext.speaker.inference import ExportedModel, SpeakerModel
from fairseq_ext.speaker.verify.backend import Backend, Side
from tests.speaker.conftest import voice

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SMALL = FeatureSpec(sample_rate=8000, n_fft=256, win_length=200, hop_length=80, f_min=20.0)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return SpeakerModel.from_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def once():
    """torch's exporter takes seconds: what it makes of the tiny model, once for all tests."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("scorer_graph", "front_graph"):
            original = getattr(graph, name)

            def kept(*args, name=name, original=original):
                if name not in made:
                    made[name] = original(*args)
                copy = onnx.ModelProto()
                copy.CopyFrom(made[name])
                return copy

            patch.setattr(graph, name, kept)
        patch.setattr(parity, "FRAMES", (1, 2, 15, 16, 101))
        yield


@pytest.fixture(scope="module")
def written(once, tiny_checkpoint, tiny_data, tmp_path_factory):
    """--features → the file."""
    folder = tmp_path_factory.mktemp("exported")
    for features in ("inside", "outside"):
        options = ExportOptions(features=features, data=str(tiny_data))
        export(tiny_checkpoint, folder / f"{features}.onnx", options)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two voices, one at 16 and one at 8 kHz, of different lengths."""
    folder = tmp_path_factory.mktemp("recordings")
    soundfile.write(folder / "ben.wav", voice("ben", 0.9, 77), 16000)
    soundfile.write(folder / "dora.wav", voice("dora", 2.0, 77)[::2], 8000)
    return [str(folder / "ben.wav"), str(folder / "dora.wav")]


def without_torch(program, repo_root, *arguments):
    """What a Python program says; one whose imports of torch fail says so in its first line."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("features", ["inside", "outside"])
def test_a_file_embeds_and_scores_recordings_as_its_checkpoint(
    model, written, recordings, features
):
    theirs = SpeakerModel.from_checkpoint(written / f"{features}.onnx")
    assert (theirs.speakers, theirs.score_kind) == (model.speakers, model.score_kind)
    assert theirs.scale == model.scale > 0
    assert theirs.spec.to_dict() == model.spec.to_dict()
    assert theirs.sha256 == model.sha256
    np.testing.assert_allclose(theirs.scores(recordings), model.scores(recordings), atol=1e-4)
    np.testing.assert_allclose(theirs.embed(recordings), model.embed(recordings), atol=1e-4)


def test_a_file_of_features_takes_prepared_data_in_any_company(model, written, tiny_data):
    corpus = Corpus.open(tiny_data)
    utterances = [corpus.read(row) for row in range(12)]
    theirs = SpeakerModel.from_checkpoint(written / "outside.onnx")
    expected = model.embed(utterances)
    np.testing.assert_allclose(theirs.embed(utterances), expected, atol=1e-4)
    np.testing.assert_allclose(theirs.embed(utterances, batch_size=1), expected, atol=1e-4)
    with pytest.raises(UserError, match="--features outside"):
        SpeakerModel.from_checkpoint(written / "inside.onnx").embed(utterances)


@pytest.mark.parametrize("features", ["inside", "outside"])
def test_a_long_recording_is_heard_in_windows(model, written, features, monkeypatch):
    """Four of them, whose embeddings are averaged by the frames that count in each."""
    samples = voice("carl", 7.0, 5)
    theirs = SpeakerModel.from_checkpoint(written / f"{features}.onnx")
    monkeypatch.setattr(batching.windows, "__defaults__", (300, 1))
    monkeypatch.setattr(inference, "CHUNK_FRAMES", 300)
    parts = batching.windows(701)
    assert len(parts) == 4
    heard = theirs.spec.features(samples)
    size = 160 if features == "inside" else 1
    with monkeypatch.context() as patch:
        patch.setattr(inference, "CHUNK_FRAMES", 9999)
        alone = theirs.embed([heard[p.start * size : p.end * size] for p in parts])
    expected = sum((p.last - p.first) / 701 * one for p, one in zip(parts, alone, strict=True))
    np.testing.assert_allclose(theirs.embed([heard])[0], expected, atol=1e-4)
    ours = model.embed([log_mel(samples, model.spec)])[0]
    assert parity.cosine_of(theirs.embed([heard])[0], ours) > 0.99


def test_what_was_measured_stands_beside_the_file(written):
    record = json.loads((written / "inside.onnx.manifest.json").read_text())
    assert record["counts"]["difference"] <= 1e-4
    accuracy = record["counts"]["accuracy"]
    assert accuracy["utterances"] == 8 and accuracy["others"] == 0
    assert accuracy["file"] == accuracy["model"]


def test_identify_runs_where_torch_is_not_installed(
    written, recordings, tiny_checkpoint, repo_root
):
    """The import of torch fails in the process, as where it is not there."""
    program = (
        "import sys; sys.modules.update(torch=None, torchaudio=None)\n"
        "from fairseq_ext.speaker.identify import main\n"
        "for path in sys.argv[3:]: print(main([*sys.argv[1:3], '--path', path]))"
    )
    files = [str(written / f"{features}.onnx") for features in ("inside", "outside")]
    done = without_torch(program, repo_root, *recordings, *files)
    names = [r.speaker for r in SpeakerModel.from_checkpoint(tiny_checkpoint).identify(recordings)]
    table = [["Id", "Category"], *zip(recordings, names, strict=True)]
    expected = [list(row) for row in table] + [["0"]]
    assert [line.split() for line in done.stdout.splitlines()] == 2 * expected, done.stderr


def test_verification_and_galleries_run_where_torch_is_not_installed(
    written, recordings, tiny_checkpoint, repo_root, tmp_path
):
    program = (
        "import sys; sys.modules.update(torch=None, torchaudio=None)\n"
        "from fairseq_ext.speaker.gallery.__main__ import main as gallery\n"
        "from fairseq_ext.speaker.verify.__main__ import main as verify\n"
        "one, two, path, people = sys.argv[1:]\n"
        "verify([one, two, '--path', path])\n"
        "gallery(['enrol', people, one, '--name', 'x', '--path', path])\n"
        "gallery(['identify', people, two, '--path', path])"
    )
    arguments = [*recordings[:2], str(written / "inside.onnx"), str(tmp_path / "people.npz")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
    )
    one, two = SpeakerModel.from_checkpoint(tiny_checkpoint).embed(recordings[:2])
    cosine = float(one @ two) / np.sqrt(float(one @ one) * float(two @ two))
    shown = done.stdout.split()
    assert shown[:1] == ["cosine"] and shown[-1].endswith(f",x,{shown[1].strip(',')}"), done.stderr
    assert float(shown[1].strip(",")) == pytest.approx(cosine, abs=2e-4)


def test_verify_and_gallery_take_the_backend_in_a_file_where_torch_is_not_installed(
    once, tiny_checkpoint, tiny_data, recordings, tmp_path, repo_root
):
    model = SpeakerModel.from_checkpoint(tiny_checkpoint)
    corpus = Corpus.open(tiny_data)
    embeddings = model.embed(corpus.read(row) for row in range(20))
    speakers = [corpus.speakers[corpus.labels[row]] for row in range(20)]
    backend = Backend.fit("mean_cosine", "none", embeddings, speakers, model.sha256)
    trials = np.random.default_rng(1).standard_normal((400, 1)) + np.arange(400)[:, None] % 2
    backend = backend.calibrated(trials, np.arange(400) % 2 == 1)
    backend.save(tmp_path / "B.npz")
    path = tmp_path / "m.onnx"
    export(tiny_checkpoint, path, ExportOptions(backend=str(tmp_path / "B.npz")))
    sides = [Side.of_tests(row[None], np.array([np.nan])) for row in model.embed(recordings)]
    pairs = *sides, np.zeros(1, np.int32), np.zeros(1, np.int32)
    (expected,) = backend.llr(backend.scores(*pairs), *pairs)
    program = (
        "import sys; sys.modules.update(torch=None, torchaudio=None)\n"
        "from fairseq_ext.speaker.verify.__main__ import main as verify\n"
        "from fairseq_ext.speaker.gallery.__main__ import main as gallery\n"
        "a, b, path, people = sys.argv[1:]\n"
        "verify([a, b, '--path', path])\n"
        "gallery(['enrol', people, a, '--name', 'a', '--path', path])\n"
        "gallery(['identify', people, a, '--path', path])\n"
        "gallery(['show', people])\n"
    )
    done = without_torch(program, repo_root, *recordings, path, tmp_path / "people.npz")
    assert f"log-likelihood ratio {expected:.3f}" in done.stdout, done.stderr
    assert f"{recordings[0]},a," in done.stdout and "mean_cosine" in done.stdout
    with pytest.raises(UserError, match="of another model"):
        other = replace(backend, model="f" * 64)
        other.save(tmp_path / "other.npz")
        export(tiny_checkpoint, path, ExportOptions(backend=str(tmp_path / "other.npz")))


def test_a_graph_that_computes_something_else_is_not_written(
    once, tiny_checkpoint, tmp_path, monkeypatch
):
    original = graph.scorer_graph

    def wrong(*args):
        made = original(*args)
        weights = next(w for w in made.graph.initializer if "embedding.weight" in w.name)
        weights.CopyFrom(
            onnx.numpy_helper.from_array(1.001 * onnx.numpy_helper.to_array(weights), weights.name)
        )
        return made

    monkeypatch.setattr(graph, "scorer_graph", wrong)
    with pytest.raises(UserError, match="differ from the model's by up to"):
        export(tiny_checkpoint, tmp_path / "m.onnx", ExportOptions(features="outside"))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_looks_at_its_values_is_refused_in_a_sentence():
    class Looks(torch.nn.Module):
        def forward(self, x, lengths):
            return x * 2 if bool((lengths > 3).all()) else x

    with pytest.raises(UserError, match="exporter cannot make a graph of this network"):
        graph.exported(Looks(), (torch.randn(2, 5), torch.tensor([5, 2])), ["x", "n"], ["y"])


def test_int8_is_of_matrices_only_and_held_to_its_accuracy(
    once, model, tiny_data, tiny_checkpoint, monkeypatch
):
    with pytest.raises(ValueError, match="--data"):
        ExportOptions(weights="int8")
    options = ExportOptions(weights="int8", features="outside", data=str(tiny_data))
    data, measured = checked(model, str(tiny_checkpoint), options)
    types = [node.op_type for node in onnx.load_from_string(data).graph.node]
    assert types.count("MatMulInteger") >= 8 and "ConvInteger" not in types
    assert 1e-4 < measured["difference"] and 0.99 < measured["cosine"] < 1
    theirs = ExportedModel(ExportedNetwork(data, "int8"))
    assert theirs.sha256 != model.sha256
    monkeypatch.setattr(parity, "LOSS", -0.01)
    with pytest.raises(UserError, match="more than half a point"):
        checked(model, str(tiny_checkpoint), options)


@pytest.mark.parametrize("content", [b"", b"no model", "foreign"])
def test_another_file_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "m.onnx"
    if content == "foreign":
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        x, y = (onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy")
        opset = onnx.helper.make_opsetid("", 18)
        made = onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=[opset], ir_version=10
        )
        content = made.SerializeToString()
    path.write_bytes(content)
    with pytest.raises(UserError, match="give a file that fairseq_ext.speaker.export wrote"):
        SpeakerModel.from_checkpoint(path)


def test_what_cannot_be_asked_of_a_file(written, tmp_path):
    path = written / "outside.onnx"
    with pytest.raises(UserError, match="runs on the CPU"):
        SpeakerModel.from_checkpoint(path, device="cuda")
    with pytest.raises(UserError, match="is an exported file"):
        export(path, tmp_path / "m.onnx", ExportOptions())
    with pytest.raises(UsageError, match=r"\*.onnx"):
        export(path, tmp_path / "m.bin", ExportOptions())
    with pytest.raises(UserError, match="does not exist"):
        SpeakerModel.from_checkpoint(tmp_path / "none.onnx")


def test_a_pack_answers_as_its_checkpoint_with_and_without_torch(
    once, tiny_checkpoint, tiny_data, tiny_recordings, tmp_path, repo_root
):
    path = tmp_path / "voices.zip"
    pack(str(tiny_checkpoint), str(path), PackOptions(data=str(tiny_data)))
    assert {"model.onnx", "speakers.json", "features.json"} <= set(packed.Pack(path).files)
    model, theirs = map(SpeakerModel.from_checkpoint, (tiny_checkpoint, path))
    corpus = Corpus.open(tiny_data)
    utterances = [corpus.read(row) for row in range(8)]
    np.testing.assert_array_equal(theirs.scores(utterances), model.scores(utterances))
    assert theirs.sha256 == model.sha256
    assert model.sha256 in packed.Pack(path).read(packed.CARD).decode()
    recordings = [str(tiny_recordings / name / "9.wav") for name in ("dora", "anna")]
    program = (
        "import sys; sys.modules.update(torch=None, torchaudio=None, safetensors=None)\n"
        "from ext_common.pack import main as pack\n"
        "from fairseq_ext.speaker.identify import main\n"
        "path, folder, *recordings = sys.argv[1:]\n"
        "pack(['--unpack', path, folder])\n"
        "for given in (path, folder + '/model.onnx'): main([*recordings, '--path', given])"
    )
    done = without_torch(program, repo_root, path, tmp_path / "parts", *recordings)
    names = [found.speaker for found in model.identify(recordings)]
    unpacked, *rows = [line.split() for line in done.stdout.splitlines()]
    expected = [list(row) for row in zip(recordings, names, strict=True)]
    assert rows[1:3] == rows[4:] == expected, done.stderr
    assert unpacked[-3:] == ["all", "as", "packed"]


def test_a_file_can_be_pickled(written, recordings):
    theirs = SpeakerModel.from_checkpoint(written / "inside.onnx")
    again = pickle.loads(pickle.dumps(theirs))
    np.testing.assert_array_equal(again.scores(recordings), theirs.scores(recordings))


# --- features without torch ------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [FeatureSpec(), SMALL, FeatureSpec(n_mels=80, n_fft=512)])
@pytest.mark.parametrize("samples", [1, 200, 1600, 7123])
def test_features_by_numpy_and_by_convolution_are_those_of_training(spec, samples):
    waveform = np.random.default_rng(samples).standard_normal(samples).astype(np.float32) / 10
    expected = log_mel(waveform, spec)
    np.testing.assert_allclose(frontend.log_mel(waveform, spec), expected, atol=1e-3)
    # beside a longer one, and with something behind its end that must not count
    batch = np.full((2, samples + 999), 7.0, dtype=np.float32)
    batch[0, :samples] = waveform
    with torch.inference_mode():
        lengths = torch.tensor([samples, samples + 999])
        found, frames = graph.FrontEnd(spec)(torch.from_numpy(batch), lengths)
    assert frames.tolist() == [len(expected), 1 + (samples + 999) // spec.hop_length]
    np.testing.assert_allclose(found[0, : frames[0]].numpy(), expected, atol=1e-3)


def test_a_specification_that_sets_loudness_does_so_without_torch():
    spec = FeatureSpec(loudness_db=-27.0, trim_silence=True)
    waveform = np.concatenate([np.zeros(8000, np.float32), voice("anna", 0.5, 1)])
    np.testing.assert_allclose(frontend.log_mel(waveform, spec), log_mel(waveform, spec), atol=1e-3)
    samples = frontend.WaveformSpec.from_dict(spec.to_dict()).features(waveform)
    plain = replace(spec, loudness_db=None, trim_silence=False)
    np.testing.assert_array_equal(log_mel(samples, plain), log_mel(waveform, spec))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_is_torchaudios_in_float64(rate):
    """Its filters in float32 are up to 1e-4 away from that."""
    import torchaudio

    samples = np.random.default_rng(rate).standard_normal(rate // 3 + 7)
    expected = torchaudio.functional.resample(torch.from_numpy(samples), rate, 16000).numpy()
    found = resample(samples.astype(np.float32), rate, 16000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
