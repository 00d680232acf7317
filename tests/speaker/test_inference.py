"""Loading checkpoints, and predictions that depend on nothing but the utterance."""

import copy
import hashlib
import os
import pickle
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import soundfile
import torch
from fairseq.models import BaseFairseqModel

from ext_common.checkpoints import build_network
from ext_common.cli import UserError
from fairseq_ext.speaker.batching import pad
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.inference import PARTS, SpeakerModel, rank, read_checkpoint
from fairseq_ext.speaker.network import PRESETS, network_of
from tests import processes


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return SpeakerModel.from_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def utterances(tiny_data):
    corpus = Corpus.open(tiny_data)
    return [corpus.read(row) for row in range(len(corpus))]


def state_hash(model):
    digest = hashlib.sha256()
    for key, value in model.network.state_dict().items():
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


# --- what comes out ------------------------------------------------------------------------------


def test_names_are_those_of_the_voices(model, tiny_recordings):
    paths = sorted(tiny_recordings.glob("*/*.wav"))
    found = [result.speaker for result in model.identify(paths)]
    right = [name == path.parent.name for name, path in zip(found, paths, strict=True)]
    assert np.mean(right) > 0.9


def test_identify_one_or_several(model, tiny_recordings):
    path = tiny_recordings / "ben" / "5.wav"
    one = model.identify(str(path), top_k=3)
    (same,) = model.identify([path], top_k=3)
    assert one == same
    assert one.candidates[0] == (one.speaker, one.score)
    scores = [match.score for match in one.candidates]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    # no more candidates than speakers, each once
    assert {m.speaker for m in model.identify(path, top_k=99).candidates} == set(model.speakers)
    with pytest.raises(ValueError, match="top_k"):
        model.identify(path, top_k=0)


def test_probabilities_where_validation_found_the_scale(model, save_checkpoint, utterances):
    found = model.identify(utterances[0], top_k=2)
    shares = np.exp(model.scale * model.scores(utterances[0]).astype(np.float64))
    expected = np.sort(shares / shares.sum())[::-1][:2]
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-5)
    older = SpeakerModel.from_checkpoint(
        save_checkpoint(lambda state: state["task_state"].pop("scale"))
    )
    assert older.identify(utterances[0], top_k=2).candidates == found.candidates
    assert older.identify(utterances[0]).probabilities is None


def test_scores_are_cosines_of_embedding_and_class_weights(model, utterances):
    embeddings = model.embed(utterances)
    weights = model.network.network.head.weight.detach().numpy()
    expected = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)) @ (
        weights / np.linalg.norm(weights, axis=1, keepdims=True)
    ).T
    assert model.score_kind == "cosine"
    np.testing.assert_allclose(model.scores(utterances), expected, atol=1e-6)


def test_scores_of_a_linear_head_are_log_probabilities(save_checkpoint, utterances):
    def linear(state):
        state["cfg"]["model"]["head"] = None
        state["cfg"]["model"]["criterion"] = "softmax"
        state["model"]["network.head.bias"] = torch.arange(4.0)

    model = SpeakerModel.from_checkpoint(save_checkpoint(linear))
    head = model.network.network.head
    logits = model.embed(utterances) @ head.weight.detach().numpy().T + np.arange(4.0)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert model.score_kind == "log-probability"
    np.testing.assert_allclose(model.scores(utterances), expected, atol=1e-5)


def test_an_audio_file_is_scored_as_its_prepared_features(model, tiny_data, tiny_recordings):
    corpus = Corpus.open(tiny_data)
    files = [tiny_recordings / name for name in corpus.ids[:6]]
    prepared = [corpus.read(row) for row in range(6)]
    np.testing.assert_array_equal(model.scores(files), model.scores(prepared))


# --- purity --------------------------------------------------------------------------------------


def test_prediction_changes_nothing_and_repeats_exactly(model, utterances):
    before, kept = state_hash(model), [u.copy() for u in utterances]
    random_state = torch.get_rng_state()
    first = model.scores(utterances)
    np.testing.assert_array_equal(first, model.scores(utterances))
    assert state_hash(model) == before
    assert not model.network.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all((a == b).all() for a, b in zip(kept, utterances, strict=True))


@pytest.mark.parametrize("batch_size,max_frames", [(None, 40000), (1, 40000), (3, 150), (None, 1)])
def test_the_company_in_a_batch_changes_nothing(model, utterances, batch_size, max_frames):
    alone = [model.embed([u])[0] for u in utterances]
    together = model.embed(utterances, batch_size=batch_size, max_frames=max_frames)
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    backwards = model.embed(utterances[::-1], batch_size=batch_size, max_frames=max_frames)
    np.testing.assert_allclose(backwards[::-1], together, atol=1e-5)


def test_batches_are_bounded_and_cover_every_utterance_once(model, utterances):
    seen, widest = [], 0
    network = model.network

    class Watch(torch.nn.Module):
        def forward(self, source, padding_mask=None):
            nonlocal widest
            widest = max(widest, source.shape[0] * source.shape[1])
            return network(source, padding_mask)

    watched = SpeakerModel(Watch(), model.speakers, model.spec)
    for positions, found in watched.predict(iter(utterances), batch_size=4, max_frames=250):
        assert 1 <= len(positions) <= 4 and len(found["scores"]) == len(positions)
        seen += positions
    assert sorted(seen) == list(range(len(utterances)))
    assert max(len(u) for u in utterances) <= widest <= 250


def test_nothing_in_nothing_out(model):
    assert model.identify([]) == []
    assert model.scores([]).shape == (0, len(model.speakers))


def test_features_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match=r"features \(T, 40\), got \(30, 80\)"):
        model.scores([np.zeros((30, 80))])


def test_rank_breaks_ties_by_column():
    scores = np.array([[0.5, 0.9, 0.9, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert rank(scores, 3).tolist() == [[1, 2, 0], [0, 1, 2]]
    assert rank(scores, 9).shape == (2, 4)


# --- checkpoints ---------------------------------------------------------------------------------


def test_read_checkpoint_returns_plain_dicts(tiny_checkpoint, tiny_state):
    state = read_checkpoint(tiny_checkpoint)
    assert type(state["cfg"]["model"]) is dict
    assert state["task_state"] == tiny_state["task_state"]
    assert state["model"].keys() == tiny_state["model"].keys()


def damaged(tmp_path, save_checkpoint):
    whole = save_checkpoint().read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    torch.save({"model": {}, "cfg": {"task": {"_name": "translation"}}}, tmp_path / "mt.pt")
    torch.save({"args": Namespace(task="translation", arch="t"), "model": {}}, tmp_path / "old.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}, "run": os.system}, tmp_path / "evil.pt")


@pytest.mark.parametrize(
    "name,words",
    [
        ("missing.pt", "does not exist"),
        ("cut.pt", "truncated"),
        ("text.pt", "no checkpoint at all"),
        ("folder", "is a folder"),
        ("mt.pt", r"another task \(translation\).*--task speaker_id"),
        ("old.pt", r"another task \(translation\)"),
        ("list.pt", "not a checkpoint of fairseq-train"),
        ("evil.pt", "posix.system.*refused"),
    ],
)
def test_what_is_no_speaker_model_is_refused_in_a_sentence(tmp_path, save_checkpoint, name, words):
    damaged(tmp_path, save_checkpoint)
    with pytest.raises(UserError, match=words) as caught:
        read_checkpoint(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["task", "model"])
def test_what_is_not_registered_is_refused_with_its_name(save_checkpoint, part):
    def change(state):
        state["cfg"][part]["_name"] = "that_of_somebody"

    with pytest.raises(UserError, match=rf"{part} 'that_of_somebody'.*--user-dir") as caught:
        SpeakerModel.from_checkpoint(save_checkpoint(change))
    assert "\n" not in str(caught.value)


SMALL = dict(d_model=16, nhead=2, d_ffn=32, layers=2, embedding_dim=8, front_channels=4)
OPTIONS = {
    "conformer_speaker": {**SMALL, "subcenters": 2},
    "conformer_speaker_classroom": {"criterion": "softmax", "head": None},
    "conformer_speaker_large": {**SMALL, "pooled_layers": "last", "feature_norm": "utterance"},
    "transformer_speaker": {**SMALL, "front_end": "linear", "frame_stack": 2},
}


@pytest.mark.parametrize("arch", PRESETS)
def test_the_network_is_the_one_that_fairseq_builds(arch, tiny_state, tiny_checkpoint, utterances):
    """Bit for bit; what an option of today is not named in the checkpoint has its default."""
    given = {"_name": arch, "criterion": "am_softmax", **OPTIONS[arch]}
    state = {**tiny_state, "cfg": {**tiny_state["cfg"], "model": given}}
    torch.manual_seed(3)
    state["model"] = network_of(state).state_dict()
    ours, theirs = (
        build_network(copy.deepcopy(state), tiny_checkpoint, PARTS, None, own).eval()
        for own in (network_of, None)
    )
    assert isinstance(theirs, BaseFairseqModel) and not isinstance(ours, BaseFairseqModel)
    source, mask = pad([torch.from_numpy(u) for u in utterances[:7]])
    with torch.inference_mode():
        mine, other = ours(source, mask), theirs(source, mask)
    assert mine["logits"].abs().sum() > 0
    assert all(torch.equal(mine[key], other[key]) for key in ("embedding", "logits"))


def test_weights_of_another_size_are_refused(save_checkpoint):
    def change(state):
        state["cfg"]["model"]["d_ffn"] = 48

    with pytest.raises(UserError, match="does not fit this model"):
        SpeakerModel.from_checkpoint(save_checkpoint(change))


def test_a_device_that_is_not_there_is_refused(tiny_checkpoint):
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used"):
        SpeakerModel.from_checkpoint(tiny_checkpoint, device="cuda:99")


PLUGIN = '''
from fairseq_ext.speaker.pooling import POOLINGS, MeanPooling

@POOLINGS.register("pooling_of_a_plugin")
class Mine(MeanPooling):
    """Twice the mean."""

    def forward(self, x, padding_mask=None):
        return 2 * super().forward(x, padding_mask)
'''


def test_a_plugin_of_ones_own_is_found_again(
    save_checkpoint, tmp_path, monkeypatch, model, utterances
):
    def change(state):
        state["cfg"]["model"]["pooling"] = "pooling_of_a_plugin"
        state["cfg"]["common"]["user_dir"] = "my_speaker_plugin"

    path = save_checkpoint(change)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match="pooling_of_a_plugin.*--user-dir my_speaker_plugin"):
        SpeakerModel.from_checkpoint(path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        SpeakerModel.from_checkpoint(path, user_dir="nowhere")
    (tmp_path / "my_speaker_plugin").mkdir()
    (tmp_path / "my_speaker_plugin" / "__init__.py").write_text(PLUGIN)
    there = SpeakerModel.from_checkpoint(path, user_dir=str(tmp_path / "my_speaker_plugin"))
    # the folder that the checkpoint names, below the working folder
    monkeypatch.chdir(tmp_path)
    again = SpeakerModel.from_checkpoint(path)
    np.testing.assert_array_equal(again.embed(utterances), there.embed(utterances))
    # a layer norm stands behind the pooling: twice the mean differs by its epsilon alone
    np.testing.assert_allclose(again.embed(utterances), model.embed(utterances), atol=1e-2)
    assert type(again.network.network.pooling).__name__ == "Mine"


def test_importing_and_loading_leaves_logging_alone(tiny_checkpoint, repo_root, tmp_path):
    code = (
        "import logging, sys\n"
        "from fairseq_ext.speaker import SpeakerModel\n"
        "assert 'torch' not in sys.modules\n"
        f"model = SpeakerModel.from_checkpoint({str(tiny_checkpoint)!r})\n"
        "assert not {'fairseq', 'omegaconf', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "root = logging.getLogger()\n"
        "print(model.speakers, root.level, root.handlers)\n"
    )
    done = python(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['anna', 'ben', 'carl', 'dora'] 30 []\n"
    assert done.stderr == ""


def python(arguments, cwd):
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    if "PYTHONPATH" in os.environ:
        env["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return processes.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_checkpoint_of_fairseq_train_needs_neither_data_nor_folder(
    tiny_data, tiny_recordings, repo_root, tmp_path
):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    run.mkdir()
    flags = (
        f"{data} --user-dir {repo_root / 'fairseq_ext'} --task speaker_id --epoch-updates 10"
        " --arch conformer_speaker --d-model 16 --nhead 2 --d-ffn 32 --layers 1 --kernel-size 7"
        " --criterion am_softmax --optimizer adam --lr 1e-2 --batch-size 16 --max-update 20"
        " --crop-frames 20 --save-dir ckpt --cpu --num-workers 0 --log-format none"
    )
    done = python(["-m", "fairseq_cli.train", *flags.split()], run)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(data)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    files = [str(tiny_recordings / name / "9.wav") for name in ("anna", "ben", "carl", "dora")]
    checkpoint = run / "ckpt" / "checkpoint_best.pt"
    done = python(
        ["-m", "fairseq_ext.speaker.identify", *files, "--path", str(checkpoint)], elsewhere
    )
    assert done.returncode == 0, done.stderr
    head, *rows = (line.split() for line in done.stdout.splitlines())
    assert head == ["Id", "Category"]
    assert [row[0] for row in rows] == files
    # four voices with pitches far apart, seen in training
    assert sum(name in path for path, name in rows) >= 3
    assert done.stderr == ""
    assert list(elsewhere.iterdir()) == []


def test_a_checkpoint_without_a_written_head_has_that_of_its_criterion(save_checkpoint):
    def change(state):
        state["cfg"]["model"]["head"] = None

    assert SpeakerModel.from_checkpoint(save_checkpoint(change)).score_kind == "cosine"


def test_silence_is_nobody(tiny_checkpoint, tmp_path):
    path = tmp_path / "silent.wav"
    soundfile.write(path, np.zeros(16000), 16000)
    with pytest.raises(UserError, match="all samples are 0"):
        SpeakerModel.from_checkpoint(tiny_checkpoint).identify(path)


@pytest.mark.parametrize("command", ["identify", "embed"])
def test_no_output_replaces_the_model(command, tiny_recordings, save_checkpoint):
    path = save_checkpoint()
    before = path.read_bytes()
    audio = next(tiny_recordings.rglob("*.wav"))
    arguments = [audio, "--path", path, "--output", path]
    result = processes.run(
        [sys.executable, "-m", f"fairseq_ext.speaker.{command}", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "would replace" in result.stderr
    assert path.read_bytes() == before


# --- what an utterance is ----------------------------------------------------------------------


def test_one_utterance_in_every_form_is_one_embedding(model, tiny_recordings):
    path = tiny_recordings / "dora" / "9.wav"
    expected = model.embed([path])[0]
    assert expected.ndim == 1
    samples, rate = soundfile.read(path, dtype="float32")
    stereo = np.stack([samples, -samples], 1)
    with open(path, "rb") as file:
        forms = [str(path), path, file, (samples, rate), (stereo, rate)]
        for form in forms:
            np.testing.assert_allclose(model.embed(form), expected, atol=1e-5)
    assert model.identify((samples, rate)).speaker == "dora"
    assert model.scores(path).shape == (len(model.speakers),)
    # a pair of utterances is two of them
    assert model.embed((path, path)).shape == (2, len(expected))
    with pytest.raises(ValueError, match="finite"):
        model.embed((np.full(4000, np.nan), rate))
    with pytest.raises(UserError, match="0.025 s, at least 0.1 s"):
        model.identify((samples[:400], rate))


def test_a_model_can_be_pickled(model, utterances):
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.embed(utterances), model.embed(utterances))
