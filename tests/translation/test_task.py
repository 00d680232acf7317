"""translation_spm: nothing dropped, text by the model, BLEU and chrF as sacreBLEU has them."""

import json
import logging
import math
import re
import shutil
from argparse import Namespace
from types import SimpleNamespace

import fairseq  # noqa: F401
import numpy as np
import pytest
import sacrebleu
import torch
from fairseq.data import LanguagePairDataset
from fairseq.logging import metrics as logged

import fairseq_ext  # noqa: F401
from ext_common.cli import UserError
from fairseq_ext.translation import validation
from fairseq_ext.translation.batching import batches
from fairseq_ext.translation.score.metrics import BLEU_KEYS, CHRF_KEYS
from fairseq_ext.translation.task import TranslationSpmConfig, TranslationSpmTask
from fairseq_ext.translation.text.vocabulary import SpmDictionary

from .conftest import ROOT, toy_pairs, train_flags, write_data
from .conftest import fairseq as run


def config(data, **changes):
    own = dict(data=str(data), train_subset="train", dataset_impl=None, seed=1)
    return TranslationSpmConfig(**{**own, "required_seq_len_multiple": 1, **changes})


def task_on(data, from_checkpoint=False, **changes):
    return TranslationSpmTask.setup_task(config(data, **changes), from_checkpoint=from_checkpoint)


@pytest.fixture(scope="module")
def task(toy_data):
    return task_on(toy_data)


def pairs_of(sizes, task):
    """A dataset of sentence pairs of so many pieces, </s> included."""
    draw = np.random.default_rng(len(sizes))
    sides = [
        [torch.tensor([*draw.integers(300, 400, n[side] - 1), 2]) for n in sizes] for side in (0, 1)
    ]
    lengths = [[len(row) for row in rows] for rows in sides]
    src, tgt = task.source_dictionary, task.target_dictionary
    return LanguagePairDataset(sides[0], lengths[0], src, sides[1], lengths[1], tgt)


def seen(iterator):
    return [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=False) if batch]


# --- nothing is dropped ---------------------------------------------------------------------------


def test_compiled_batches_have_few_shapes(task):
    """Of both sides' padded lengths and the number of sentences: 20 where there were hundreds."""
    draw = np.random.default_rng(1)
    source = draw.gamma(3, 6, 4000).clip(2, 100)
    sizes = np.stack([source, (source * draw.uniform(0.7, 1.4, 4000)).clip(2, 100)], 1).astype(int)
    dataset = SimpleNamespace(sizes=sizes, num_tokens_vec=lambda rows: sizes[rows].max(1))

    def shapes_of(multiple):
        found = batches(dataset, np.argsort(sizes[:, 0], kind="stable"), 600, None, multiple)
        assert sorted(np.concatenate(found)) == list(range(4000))
        padded = [tuple(-(-sizes[rows].max(0) // multiple) * multiple) for rows in found]
        assert all(len(rows) * max(p) <= 600 for rows, p in zip(found, padded, strict=True))
        return len({(len(rows), *p) for rows, p in zip(found, padded, strict=True)})

    assert shapes_of(16) <= 20 < 100 < shapes_of(1)


@pytest.mark.parametrize("count", [*range(1, 18), 100])
def test_no_sentence_is_dropped_and_any_fits_a_batch(task, count):
    """fairseq's own iterator drops count mod 8 sentences, and fails where one exceeds --max-tokens."""
    sizes = np.random.default_rng(count).integers(1, 60, (count, 2))
    dataset = pairs_of(sizes, task)
    for max_tokens, max_sentences in [(20, None), (None, 3), (100, 8), (1000, None), (None, None)]:
        for shards in (1, 3):
            found = []
            for shard in range(shards):
                iterator = task.get_batch_iterator(
                    dataset,
                    max_tokens=max_tokens,
                    max_sentences=max_sentences,
                    max_positions=(1024, 1024),
                    required_batch_size_multiple=8,
                    num_shards=shards,
                    shard_id=shard,
                )
                for batch in seen(iterator):
                    found += batch
                    padded = len(batch) * sizes[batch].max()
                    assert len(batch) == 1 or padded <= (max_tokens or math.inf)
                    assert len(batch) <= (max_sentences or math.inf)
            assert sorted(found) == list(range(count))


def test_over_long_training_pairs_are_counted_once_and_the_others_kept(toy_data, caplog):
    task = task_on(toy_data)
    dataset = pairs_of([(5, 5), (1024, 1024), (1025, 5), (5, 1030), (1, 1)], task)
    options = dict(max_tokens=50, max_positions=(1024, 1024), ignore_invalid_inputs=True)
    with caplog.at_level(logging.WARNING):
        for epoch in (1, 2, 3):
            iterator = task.get_batch_iterator(dataset, epoch=epoch, **options)
            assert sorted(sum(seen(iterator), [])) == [0, 1, 4]
    told = [r.getMessage() for r in caplog.records if "longer than" in r.getMessage()]
    assert len(told) == 1
    assert "2 of 5" in told[0] and "1,024" in told[0] and "1,030" in told[0]


def test_max_tokens_is_no_limit_for_a_training_pair(task, toy_data):
    """fairseq's trainer passes the smaller of positions and --max-tokens, and skips what is longer."""
    task = task_on(toy_data)
    task.build_model(tiny_model_options())
    dataset = pairs_of([(5, 5), (300, 300)], task)
    iterator = task.get_batch_iterator(
        dataset, max_tokens=50, max_positions=(50, 50), ignore_invalid_inputs=True
    )
    assert sorted(sum(seen(iterator), [])) == [0, 1]


def test_over_long_sentences_of_a_test_are_an_error_with_a_remedy(task):
    dataset = pairs_of([(5, 5), (1025, 5)], task)
    with pytest.raises(
        UserError, match=r"1 of 2 .*number 2, has 1,025 and 5.*translation\.translate"
    ):
        task.get_batch_iterator(dataset, max_tokens=50, max_positions=(1024, 1024))


def test_a_resumed_epoch_has_the_batches_of_the_uninterrupted_one(task):
    """fairseq keeps the batches of the first epoch, but a resume at epoch 3 makes others."""
    sizes = np.random.default_rng(1).integers(1, 9, (200, 2))
    dataset = pairs_of(sizes, task)

    def order(epoch, skip=0):
        iterator = task.get_batch_iterator(dataset, max_tokens=40, seed=5, epoch=epoch)
        if skip:
            state = {"version": 2, "epoch": epoch, "iterations_in_epoch": skip, "shuffle": True}
            iterator.load_state_dict(state)
        return [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=True)]

    first, third = order(1), order(3)
    assert first != third
    assert sorted(map(tuple, first)) != sorted(map(tuple, third)), (
        "other batches, not only their order"
    )
    assert order(3, skip=7) == third[7:]


# --- vocabulary and checkpoint ----------------------------------------------------------------------


def tiny_model_options(**changes):
    from fairseq.models import ARCH_CONFIG_REGISTRY

    own = dict(arch="transformer", encoder_layers=1, decoder_layers=1, share_all_embeddings=True)
    for side in ("encoder", "decoder"):
        own |= {f"{side}_embed_dim": 16, f"{side}_ffn_embed_dim": 16, f"{side}_attention_heads": 2}
    options = Namespace(**{**own, "dropout": 0.0, **changes})
    ARCH_CONFIG_REGISTRY["transformer"](options)
    return options


def saved(task, tmp_path):
    """The task's state as a checkpoint gives it back."""
    torch.save(task.state_dict(), tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """The toy pairs again, with another SentencePiece model."""
    folder = tmp_path_factory.mktemp("other") / "data"
    write_data(folder, toy_pairs(700), size=600)
    return folder


def test_state_is_what_the_contract_says(task, toy_codec, tmp_path):
    state = saved(task, tmp_path)["translation"]
    assert state["source_lang"] == "en" and state["target_lang"] == "zh"
    assert state["normalise"] == "standard" and state["extra_symbols"] == ["<BT>"]
    assert state["spm"]["zh"].numpy().tobytes() == toy_codec.model
    assert state["dict"]["en"] == toy_codec.pieces(range(4, toy_codec.size))


def test_a_checkpoint_needs_no_data(task, tmp_path, toy_codec):
    state = saved(task, tmp_path)
    for again in (task_on("gone", from_checkpoint=True), task_on(tmp_path / "gone")):
        again.load_state_dict(state)
        assert again.target_dictionary == task.target_dictionary
        assert (again.cfg.source_lang, again.cfg.target_lang) == ("en", "zh")
        tokens, lengths = again.get_interactive_tokens_and_lengths(["Ａ  😀"], None)
        assert tokens[0].tolist() == [*toy_codec.encode("A 😀"), 2] and lengths == [len(tokens[0])]
        assert again.state_dict().keys() == state.keys()


def test_without_data_and_checkpoint_the_folder_is_the_complaint(tmp_path):
    task = task_on(tmp_path / "gone")
    for needed in (lambda: task.target_dictionary, lambda: task.build_model(tiny_model_options())):
        with pytest.raises(UserError, match=r"gone does not exist.*translation\.prepare"):
            needed()
    (tmp_path / "dict.en.txt").write_text("a 1\n")
    with pytest.raises(UserError, match=r"no prepared bitext.*translation\.prepare"):
        task_on(tmp_path).source_dictionary  # noqa: B018


def test_data_with_other_models_is_refused(task, other_data, tmp_path):
    state = saved(task, tmp_path)
    with pytest.raises(UserError, match="other SentencePiece models than the checkpoint"):
        task_on(other_data).load_state_dict(state)
    late = task_on(other_data, from_checkpoint=True)
    late.load_state_dict(state)
    with pytest.raises(UserError, match="has not the SentencePiece model for en"):
        late.load_dataset("test")
    resuming = task_on(other_data)
    for same_run in (True, False):
        with pytest.raises(UserError, match="other SentencePiece models"):
            resuming.check_resume({"task_state": state}, same_run)


def test_the_other_direction(task, toy_data, tmp_path):
    reverse = task_on(toy_data, source_lang="zh")
    assert reverse.cfg.target_lang == "en"
    reverse.load_dataset("test")
    item = reverse.dataset("test")[0]
    lines = {
        lang: (toy_data / "text" / f"test.{lang}").read_text("utf-8").split("\n")[0]
        for lang in ("en", "zh")
    }
    assert reverse.source_dictionary.string(item["source"], "x") == lines["zh"]
    assert reverse.target_dictionary.string(item["target"], "x") == lines["en"]
    state = saved(reverse, tmp_path)
    # not said: the checkpoint knows, also for who asked for the dictionaries before it was read
    unsaid = task_on(toy_data)
    held = unsaid.source_dictionary, unsaid.target_dictionary
    unsaid.load_state_dict(state)
    assert (unsaid.cfg.source_lang, unsaid.cfg.target_lang) == ("zh", "en")
    assert [d.lang for d in held] == ["zh", "en"]
    for said in ({"source_lang": "en", "target_lang": "zh"}, {"target_lang": "zh"}):
        with pytest.raises(UserError, match="translates zh to en, not en to zh"):
            task_on(toy_data, **said).load_state_dict(state)
    with pytest.raises(UserError, match="translates zh to en"):
        task.check_resume({"task_state": state}, same_run=True)
    task.check_resume({"task_state": state}, same_run=False)
    with pytest.raises(UserError, match="-t fr does not fit"):
        task_on(toy_data, target_lang="fr").source_dictionary  # noqa: B018


def test_a_mixture_of_back_translation_trains_one_way(toy_data, tmp_path):
    data = tmp_path / "mixture"
    shutil.copytree(toy_data, data)
    described = json.loads((data / "corpus.json").read_text())
    (data / "corpus.json").write_text(json.dumps({**described, "one_way": True}))
    task_on(data).load_dataset("train")
    reverse = task_on(data, source_lang="zh")
    reverse.load_dataset("test")
    with pytest.raises(UserError, match="has synthetic en, .*: give -s en -t zh"):
        reverse.load_dataset("train")


def test_two_vocabularies(tmp_path):
    data = tmp_path / "data"
    write_data(data, toy_pairs(700), size=420, joint=False)
    task = task_on(data)
    assert task.source_dictionary != task.target_dictionary
    with pytest.raises(UserError, match="one SentencePiece model for each language"):
        task.build_model(tiny_model_options())
    task.build_model(tiny_model_options(share_all_embeddings=False))
    again = task_on("gone", from_checkpoint=True)
    again.load_state_dict(saved(task, tmp_path))
    assert again.source_dictionary == task.source_dictionary
    assert again.target_dictionary == task.target_dictionary
    # a dictionary file that the ids were not made with
    lines = (data / "dict.zh.txt").read_text("utf-8").split("\n")
    lines[300], lines[301] = lines[301], lines[300]
    (data / "dict.zh.txt").write_text("\n".join(lines), "utf-8")
    with pytest.raises(UserError, match=r"dict\.zh\.txt does not list the pieces"):
        task_on(data).load_dataset("valid")


def test_options_that_contradict_are_refused(toy_data):
    with pytest.raises(UserError, match="--eval-bleu is BLEU for European languages"):
        task_on(toy_data, eval_bleu=True)
    with pytest.raises(UserError, match="--valid-beam"):
        task_on(toy_data, valid_beam=0)


def test_a_missing_split_is_named(task):
    with pytest.raises(UserError, match="no split 'dev': it has train, valid, test"):
        task.load_dataset("dev")


def test_train1_is_added_once_without_a_flag(toy_data, tmp_path):
    """fairseq's default --upsample-primary -1 fails as soon as there is a train1."""
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    for file in toy_data.glob("valid.en-zh.*"):
        shutil.copy(file, data / file.name.replace("valid.", "train1."))
    task = task_on(data)
    task.load_dataset("train", combine=True)
    assert len(task.dataset("train")) == 601 + 43


def test_reads_what_prepare_writes(toy_tsv, tmp_path):
    """In both directions; the lines under text/ are the sentences, in their order."""
    from fairseq_ext.translation.prepare.__main__ import PrepareOptions, prepare

    prepare([toy_tsv], tmp_path / "data", PrepareOptions(source_lang="en", target_lang="zh"))
    for source, target in (("en", "zh"), ("zh", "en")):
        task = task_on(tmp_path / "data", source_lang=source)
        for split in ("train", "valid", "test"):
            task.load_dataset(split)
            sides = {"source": source, "target": target}
            for side, lang in sides.items():
                path = tmp_path / "data" / "text" / f"{split}.{lang}"
                expected = path.read_text("utf-8").split("\n")[:-1]
                dataset = task.dataset(split)
                codec = getattr(task, f"{side}_dictionary").codec
                found = [codec.decode(dataset[i][side].tolist()) for i in range(len(dataset))]
                assert found == expected


# --- validation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validating(toy_data):
    """A task with the valid set, a tiny model and a criterion."""
    from fairseq import criterions

    task = task_on(toy_data)
    torch.manual_seed(3)
    model = task.build_model(tiny_model_options())
    criterion = criterions.CRITERION_REGISTRY["cross_entropy"](task, sentence_avg=False)
    task.load_dataset("valid")
    # untrained, but with a liking for the pieces that references have, else nothing would match
    targets = torch.cat([task.dataset("valid")[i]["target"] for i in range(43)])
    counts = torch.bincount(targets, minlength=len(task.target_dictionary))
    model.decoder.output_projection.bias = torch.nn.Parameter(0.7 * torch.log1p(counts.float()))
    return task, model, criterion


@pytest.fixture
def validate(validating, monkeypatch):
    """Validation in such batches: what is logged."""
    task, model, criterion = validating
    # the same limit in every batch: an untrained model's hypotheses do not end by themselves
    monkeypatch.setattr(validation, "LENGTH", (0.0, 12))

    def run(*, changes=(), **batching):
        for name, value in dict(changes).items():
            monkeypatch.setattr(task.cfg, name, value)
        text = validation.TextValidation(task, task.cfg.valid_beam, task.cfg.valid_sentences)
        monkeypatch.setattr(task, "_validation", text)
        iterator = task.get_batch_iterator(task.dataset("valid"), **batching)
        with logged.aggregate(new_root=True) as meters:
            for sample in iterator.next_epoch_itr(shuffle=False):
                *_, output = task.valid_step(sample, model, criterion)
                # what is logged goes into a checkpoint, which holds plain numbers only
                scores = [output[key] for key in BLEU_KEYS + CHRF_KEYS if key in output]
                assert all(type(score) is float for score in scores)
                task.reduce_metrics([output], criterion)
            return meters.get_smoothed_values()

    return run


@pytest.fixture(scope="module")
def one_by_one(validating):
    """Hypothesis and reference of each sentence of valid, by another way through fairseq."""
    task, model, _ = validating
    generator = task.build_generator([model], Namespace(beam=1, max_len_a=0, max_len_b=12))
    hypotheses, references = [], []
    for i in range(len(task.dataset("valid"))):
        item = task.dataset("valid")[i]
        lengths = torch.tensor([len(item["source"])])
        sample = {"net_input": {"src_tokens": item["source"][None], "src_lengths": lengths}}
        best = task.inference_step(generator, [model], sample)[0][0]["tokens"]
        hypotheses.append(task.build_bpe(None).decode(task.target_dictionary.string(best)))
        references.append(task.target_dictionary.string(item["target"], "x", escape_unk=True))
    return hypotheses, references


@pytest.mark.parametrize("batching", [{"max_sentences": 5}, {"max_tokens": 300}])
def test_validation_scores_are_those_of_the_whole_corpus(batching, validate, one_by_one, toy_data):
    hypotheses, references = one_by_one
    assert references == (toy_data / "text" / "valid.zh").read_text("utf-8").split("\n")[:-1]
    found = validate(**batching)
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh").score
    chrf = sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert (found["bleu"], found["chrf"]) == (round(bleu, 2), round(chrf, 2))
    assert min(bleu, chrf) > 0 and {type(found["bleu"]), type(found["chrf"])} == {float}


def test_validation_text_can_be_limited_and_switched_off(
    validate, validating, one_by_one, monkeypatch
):
    hypotheses, references = one_by_one
    task, _, _ = validating
    step, seen = task.inference_step, []
    monkeypatch.setattr(
        task,
        "inference_step",
        lambda generator, models, sample: seen.append(sample) or step(generator, models, sample),
    )
    found = validate(changes={"valid_sentences": 10}, max_sentences=7)
    # fairseq's LSTM refuses a batch that is wider than its longest sentence
    for sample in seen:
        tokens, lengths = (sample["net_input"][key] for key in ("src_tokens", "src_lengths"))
        assert tokens.shape[1] == int(lengths.max())
    assert sum(len(sample["net_input"]["src_tokens"]) for sample in seen) == 10 and len(seen) > 1
    expected = sacrebleu.corpus_chrf(hypotheses[:10], [references[:10]]).score
    assert found["chrf"] == round(expected, 2)
    found = validate(changes={"no_valid_text": True}, max_sentences=20)
    assert found["loss"] > 0 and not {"bleu", "chrf"} & found.keys()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ("bleu", True)),
        ({"select_by": "chrf"}, ("chrf", True)),
        ({"select_by": "loss"}, None),
        ({"no_valid_text": True}, None),
    ],
)
def test_what_selects_the_best_checkpoint(toy_data, options, expected):
    assert task_on(toy_data, **options).best_metric == expected


def test_no_unknown_is_ever_generated(validating):
    task, model, _ = validating
    item = task.dataset("valid")[0]
    net_input = {
        "src_tokens": item["source"][None],
        "src_lengths": torch.tensor([len(item["source"])]),
    }
    bias = model.decoder.output_projection.bias
    before = bias[3].item()
    try:
        with torch.no_grad():
            bias[3] = 1e4
        generator = task.build_generator([model], Namespace(beam=2, max_len_b=5))
        best = task.inference_step(generator, [model], {"net_input": net_input})[0]
    finally:
        with torch.no_grad():
            bias[3] = before
    assert all(3 not in hypothesis["tokens"].tolist() for hypothesis in best)


def test_default_scoring_only_changes_for_our_dictionaries(task):
    from fairseq import scoring
    from fairseq.data import Dictionary
    from fairseq.scoring.bleu import Scorer

    ours = scoring.build_scorer("bleu", task.target_dictionary)
    ours.add_string("我今天去学校读书。", "我今天去学校看书。")
    assert "tok:zh" in ours.result_string() and ours.score() == pytest.approx(66.06, abs=0.01)
    assert isinstance(scoring.build_scorer("bleu", Dictionary()), Scorer)
    assert isinstance(SpmDictionary(task.target_dictionary.codec, "zh"), Dictionary)
    assert type(scoring.build_scorer("chrf", task.target_dictionary)).__name__ == "ChrFScorer"


# --- fairseq's commands -------------------------------------------------------------------------------


def lines_of(output):
    """{"S": {id: text}, …} of what fairseq-generate or -interactive printed."""
    found = {}
    for kind, number, rest in re.findall(r"^([STHD])-(\d+)\t(.*)$", output, re.M):
        text = rest.split("\t", 1)[1] if kind in "HD" else rest
        found.setdefault(kind, {})[int(number)] = text
    return found


def validations(output):
    found = re.findall(r'\{[^{}\n]*"valid_loss"[^{}\n]*\}', output)
    return [json.loads(line) for line in found]


def ours(*more):
    return ["--user-dir", ROOT / "fairseq_ext", "--task", "translation_spm", "--cpu", *more]


@pytest.mark.slow
@pytest.mark.parametrize("flag", [[], ["--remove-bpe"], ["--post-process", "sentencepiece"]])
def test_generate_prints_text_and_the_score_of_its_language(flag, toy_data, toy_checkpoint):
    done = run(
        "generate",
        toy_data,
        *ours("--path", toy_checkpoint, "--gen-subset", "test", "--beam", 2, "--batch-size", 7),
        *flag,
    )
    found = lines_of(done.stdout)
    for kind, lang in (("S", "en"), ("T", "zh")):
        text = (toy_data / "text" / f"test.{lang}").read_text("utf-8").split("\n")[:-1]
        assert [found[kind][i] for i in range(len(text))] == text, "all of them, emoji included"
    assert found["D"].keys() == found["T"].keys()
    assert not re.search("▁|<0x|<unk>", "".join(found["D"].values()))
    if flag:
        assert found["H"] == found["D"]
    hypotheses = [found["D"][i] for i in sorted(found["D"])]
    references = [found["T"][i] for i in sorted(found["T"])]
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh")
    last = done.stdout.rstrip().split("\n")[-1]
    assert f"tok:zh|smooth:exp|version:{sacrebleu.__version__} = {bleu.score:.2f} " in last


@pytest.mark.slow
def test_interactive_works_without_the_data(toy_checkpoint, tmp_path):
    typed = ["I  like ｒｅｄ 😀 龘 apples.", "", "you\u2028see", "<BT> <unk> ▁"]
    done = run(
        "interactive",
        tmp_path / "gone",
        *ours("--path", toy_checkpoint, "--beam", 2),
        input="\n".join(typed) + "\n",
    )
    found = lines_of(done.stdout)
    assert [found["S"][i] for i in range(4)] == [
        "I like red 😀 龘 apples.",
        "",
        "you see",
        "<BT> <unk> _",
    ]
    assert sorted(found["D"]) == [0, 1, 2, 3]
    assert not re.search("▁|<0x|<unk>", "".join(found["D"].values()))


@pytest.mark.slow
def test_training_selects_by_bleu_and_stops_early(toy_data, tmp_path):
    """With a learning rate of nearly 0 BLEU stays what it is: the first is best, patience runs out."""
    flags = ["--lr", "1e-9", "--patience", 2, "--max-epoch", 9, "--max-update", 0]
    done = run("train", *train_flags(toy_data, tmp_path, *flags))
    found = validations(done.stdout + done.stderr)
    assert len(found) == 3, "the first and two that are no better"
    assert {"valid_bleu", "valid_chrf", "valid_best_bleu"} <= found[-1].keys()
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert state["cfg"]["checkpoint"]["best_checkpoint_metric"] == "bleu"
    assert state["cfg"]["checkpoint"]["maximize_best_checkpoint_metric"] is True


@pytest.mark.slow
def test_stopped_and_resumed_in_an_epoch_is_the_uninterrupted_run(toy_data, tmp_path):
    """Weights to the bit, with dropout, subword sampling and a worker; the stop is within epoch 2."""
    flags = ["--subword-sampling", 0.2, "--subword-sampling-sides", "both", "--dropout", 0.1]
    flags += ["--num-workers", 1, "--no-valid-text", "--no-epoch-checkpoints"]

    def weights(folder, updates):
        run("train", *train_flags(toy_data, tmp_path / folder, *flags, "--max-update", updates))
        state = torch.load(tmp_path / folder / "checkpoint_last.pt", weights_only=False)
        iterator = state["extra_state"]["train_iterator"]
        return state["model"], (iterator["epoch"], iterator["iterations_in_epoch"])

    whole, end = weights("whole", 40)
    half, stop = weights("halves", 24)
    again, resumed_end = weights("halves", 40)
    assert stop[0] > 1 and stop[1] > 0 and resumed_end == end
    assert any(not torch.equal(whole[name], half[name]) for name in whole)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(toy_data, toy_checkpoint, tmp_path):
    flags = ["--restore-file", toy_checkpoint, "--max-update", 62, "--distributed-world-size", 2]
    done = run("train", *train_flags(toy_data, tmp_path, *flags))
    (both,) = validations(done.stdout + done.stderr)[-1:]
    alone = run(
        "validate",
        toy_data,
        *ours(
            "--path", tmp_path / "checkpoint_last.pt", "--log-format", "json", "--batch-size", 50
        ),
    )
    (one,) = validations(alone.stdout + alone.stderr)
    assert float(both["valid_chrf"]) > 0
    # the longest a hypothesis may be depends on its batch, so two tokens in a thousand may differ
    assert float(both["valid_chrf"]) == pytest.approx(float(one["valid_chrf"]), abs=0.2)
    assert float(both["valid_bleu"]) == pytest.approx(float(one["valid_bleu"]), abs=0.2)


@pytest.mark.slow
def test_resuming_with_other_models_is_one_sentence(other_data, toy_checkpoint, tmp_path):
    flags = train_flags(other_data, tmp_path, "--restore-file", toy_checkpoint)
    done = run("train", *flags, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr and "Traceback" not in done.stderr
    assert "other SentencePiece models than the checkpoint" in done.stderr


@pytest.mark.slow
def test_fairseqs_own_task_is_untouched(toy_data, tmp_path):
    """Trains, resumes and generates on the same folder, with its own BLEU."""
    plain = train_flags(toy_data, tmp_path)
    plain[plain.index("translation_spm")] = "translation"
    run("train", *plain)
    plain[plain.index("--max-update") + 1] = "14"
    done = run("train", *plain)
    assert "Loaded checkpoint" in done.stdout + done.stderr
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == 14
    assert state["cfg"]["checkpoint"]["best_checkpoint_metric"] == "loss"
    made = run(
        "generate",
        toy_data,
        *["--user-dir", ROOT / "fairseq_ext", "--cpu", "--path", tmp_path / "checkpoint_last.pt"],
    )
    assert "BLEU4 = " in made.stdout


@pytest.mark.slow
def test_hydra_and_the_other_direction(toy_data, tmp_path):
    """configs work without command-line flags; -s zh -t en on the same folder."""
    side = "{embed_dim: 16, layers: 1, ffn_embed_dim: 16, attention_heads: 2}"
    (tmp_path / "tiny.yaml").write_text(f"""
hydra: {{job: {{chdir: false}}, run: {{dir: {tmp_path}}}}}
common: {{user_dir: {ROOT}/fairseq_ext, cpu: true, log_format: json}}
task: {{_name: translation_spm, data: {toy_data}, source_lang: zh, valid_sentences: 5}}
model: {{_name: transformer, encoder: {side}, decoder: {side}, share_all_embeddings: true}}
criterion: {{_name: label_smoothed_cross_entropy, label_smoothing: 0.1}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.005], max_update: 5}}
dataset: {{max_tokens: 1000, num_workers: 0}}
checkpoint: {{save_dir: {tmp_path}}}
""")
    done = run("hydra-train", "--config-dir", tmp_path, "--config-name", "tiny")
    (found,) = validations(done.stdout + done.stderr)
    assert "valid_best_bleu" not in found and float(found["valid_bleu"]) >= 0
    made = run("generate", toy_data, *ours("--path", tmp_path / "checkpoint_best.pt"))
    assert "tok:13a" in made.stdout
    english = (toy_data / "text" / "test.en").read_text("utf-8").split("\n")[:-1]
    targets = lines_of(made.stdout)["T"]
    assert [targets[i] for i in range(len(english))] == english


@pytest.mark.slow
def test_lstm(toy_data, tmp_path):
    flags = f"""{toy_data} --task translation_spm --arch lstm --user-dir {ROOT}/fairseq_ext --cpu
        --encoder-embed-dim 16 --encoder-hidden-size 16 --encoder-layers 1 --decoder-layers 1
        --decoder-embed-dim 16 --decoder-hidden-size 16 --decoder-out-embed-dim 16
        --share-all-embeddings --optimizer adam --lr 5e-3 --batch-size 64 --max-update 5
        --log-format json --save-dir {tmp_path}"""
    done = run("train", *flags.split())
    (found,) = validations(done.stdout + done.stderr)
    assert float(found["valid_chrf"]) >= 0


def test_the_next_command_translates_the_test():
    from fairseq_ext.translation.task import translate_command

    line = translate_command("a b:c", "en", "zh", "x/checkpoint_best.pt")
    assert line == (
        "python -m fairseq_ext.translation.translate 'a b/text/test.en' test.zh --path x/checkpoint_best.pt"
    )
