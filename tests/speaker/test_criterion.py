"""What the criterions report, how the margin grows, and margins and poolings of one's own."""

import argparse
import math

import fairseq  # noqa: F401
import numpy as np
import pytest
import torch
from fairseq import options, tasks
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.utils import import_user_module
from omegaconf import OmegaConf

from ext_common.cli import UserError
from fairseq_ext.speaker import criterion as criterions
from fairseq_ext.speaker import model as models  # noqa: F401
from fairseq_ext.speaker import task as speaker_task  # noqa: F401
from fairseq_ext.speaker.criterion import SCALED
from fairseq_ext.speaker.margins import MARGINS, am_softmax
from fairseq_ext.speaker.pooling import POOLINGS

OWN = ("am_softmax", "aam_softmax", "softmax")


class Scores(torch.nn.Module):
    """A model whose scores are the batch's source."""

    def forward(self, source, padding_mask=None):
        return {"logits": source}


def criterion(name="am_softmax", **changes):
    config = OmegaConf.structured(CRITERION_DATACLASS_REGISTRY[name](**changes))
    return CRITERION_REGISTRY[name](config, task=None)


def sample(n, classes=7, seed=0, logits=None):
    rng = np.random.default_rng(seed)
    source = torch.tensor(rng.uniform(-1, 1, (n, classes)), dtype=torch.float32)
    return {
        "net_input": {"source": source if logits is None else torch.tensor(logits)},
        "target": torch.tensor(rng.integers(0, classes, n)),
        "nsentences": n,
        "ntokens": 10 * n,
    }


def logged(cls, *groups):
    """What fairseq shows after several calls of reduce_metrics, each for a list of logs."""
    with metrics.aggregate(new_root=True) as found:
        for group in groups:
            cls.reduce_metrics(group)
        # the meters themselves: what is shown is rounded
        return {k: found[k].avg for k in found.keys()}


@pytest.mark.parametrize("name", OWN)
def test_sums_over_utterances(name):
    loss_of, batch = MARGINS.get(name), sample(6)
    one = criterion(name).train()
    loss, n, log = one(Scores(), batch)
    # the options' default margin is what --help says, not that of the function
    known = MARGINS.options(name)
    arguments = {} if known is None else vars(known)
    each = loss_of(batch["net_input"]["source"], batch["target"], reduction="none", **arguments)
    torch.testing.assert_close(loss, each.sum())
    assert n == log["sample_size"] == log["nsentences"] == 6 and log["ntokens"] == 60
    torch.testing.assert_close(log["loss"], each.sum())
    unreduced, _, log = one(Scores(), batch, reduce=False)
    torch.testing.assert_close(unreduced, each)
    torch.testing.assert_close(log["loss"], each.sum())


@pytest.mark.parametrize("train", [True, False])
def test_figures_are_sums_over_utterances_not_means_of_batch_means(train):
    """Batches of 1, 10 and 3 report what one batch of 14 reports, however they are grouped."""
    one = criterion(s=10.0, m=0.3).train(train)
    batches = [sample(1, seed=1), sample(10, seed=2), sample(3, seed=3)]
    logs = [one(Scores(), b)[2] for b in batches]
    scores = torch.cat([b["net_input"]["source"] for b in batches])
    target = torch.cat([b["target"] for b in batches])
    place = (scores > scores.gather(1, target[:, None])).sum(1)
    expected = {
        "loss": float(am_softmax(scores, target, s=10.0, m=0.3)),
        "accuracy": 100 * float((place == 0).double().mean()),
        "accuracy5": 100 * float((place < 5).double().mean()),
    }
    if train:
        expected["margin"] = 0.3
    assert 0 < expected["accuracy"] < expected["accuracy5"] < 100
    for groups in ([logs], [[log] for log in logs], [logs[:2], logs[2:]], [logs[::-1]]):
        found = logged(type(one), *groups)
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert float(found[key]) == pytest.approx(value, rel=1e-5), key
    assert type(one).logging_outputs_can_be_summed()


def test_the_mean_over_speakers_does_not_ask_how_many_utterances_there_are_of_each():
    """Two of three of one speaker are right, none of one of another: 33.3 %, not 50 %."""
    one = criterion().eval()
    right, wrong = [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]
    batches = [sample(2, logits=[right, right]), sample(2, logits=[wrong, right])]
    batches[0]["target"][:] = 0
    batches[1]["target"][:] = torch.tensor([0, 1])
    batches[0]["weight"], batches[1]["weight"] = torch.full((2,), 1 / 3), torch.tensor([1 / 3, 1])
    logs = [one(Scores(), batch)[2] for batch in batches]
    for groups in ([logs], [[log] for log in logs]):
        found = logged(type(one), *groups)
        assert float(found["speaker_accuracy"]) == pytest.approx(100 / 3, abs=1e-3)
        assert float(found["accuracy"]) == 50


def test_summed_over_processes_it_is_the_same():
    """fairseq adds the logs of processes key by key; an empty shard adds none."""
    one = criterion(s=10.0).eval()
    logs = [one(Scores(), sample(n, seed=n))[2] for n in (2, 7)]
    added = {k: logs[0][k] + logs[1][k] for k in logs[0]}
    for key, value in logged(type(one), logs).items():
        assert float(logged(type(one), [added])[key]) == pytest.approx(float(value), rel=1e-6)
    assert logged(type(one), []) == {}
    assert logged(type(one), [{}]) == {}


def test_validation_tries_scales_of_the_scores():
    one, batch = criterion(), sample(6)
    assert not SCALED.keys() & one.train()(Scores(), batch)[2].keys()
    log = one.eval()(Scores(), batch)[2]
    scores = batch["net_input"]["source"].double()
    for name, scale in SCALED.items():
        shares = (scale * scores).softmax(1).gather(1, batch["target"][:, None])
        assert float(log[name]) == pytest.approx(-float(shares.log().sum()), rel=1e-4)


def test_accuracy_is_without_margin():
    """Target 0.5 against 0.4: right, though behind by 0.1 once the margin is taken off."""
    batch = sample(1, logits=[[0.4, 0.5, 0.0]])
    batch["target"][:] = 1
    for train in (True, False):
        one = criterion(s=30.0, m=0.2).train(train)
        loss, _, log = one(Scores(), batch)
        assert int(log["correct"]) == 1
        expected = math.log(1 + math.exp(30 * 0.1) + math.exp(-30 * 0.3))
        assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 5, 6])
def test_five_best_of_few_speakers(classes):
    batch = sample(40, classes)
    _, _, log = criterion("softmax").eval()(Scores(), batch)
    scores, target = batch["net_input"]["source"], batch["target"]
    place = (scores > scores.gather(1, target[:, None])).sum(1)
    assert int(log["correct"]) == int((place == 0).sum())
    assert int(log["correct5"]) == int((place < 5).sum())
    assert (int(log["correct5"]) == 40) == (classes <= 5)


def test_margin_grows_with_the_updates():
    one = criterion(s=10.0, m=0.4, margin_start=10, margin_end=30).train()
    batch = sample(5)
    scores, target = batch["net_input"]["source"], batch["target"]
    for update, m in ((0, 0.0), (10, 0.0), (20, 0.2), (25, 0.3), (30, 0.4), (1000, 0.4)):
        one.set_num_updates(update)
        loss, _, log = one(Scores(), batch)
        expected = am_softmax(scores, target, s=10.0, m=m, reduction="sum")
        torch.testing.assert_close(loss, expected)
        assert logged(type(one), [log])["margin"] == pytest.approx(m)
    # nothing is remembered: a resumed run, or another process, has the margin of its update
    one.set_num_updates(20)
    torch.testing.assert_close(
        one(Scores(), batch)[0], am_softmax(scores, target, s=10.0, m=0.2, reduction="sum")
    )
    assert not list(one.state_dict())


def test_validation_always_has_the_whole_margin():
    """Losses stay comparable, and fairseq-validate, which knows no update, repeats them."""
    one = criterion(s=10.0, m=0.4, margin_start=10, margin_end=30).eval()
    batch = sample(5)
    scores, target = batch["net_input"]["source"], batch["target"]
    expected = am_softmax(scores, target, s=10.0, m=0.4, reduction="sum")
    for update in (0, 20, 50):
        one.set_num_updates(update)
        loss, _, log = one(Scores(), batch)
        torch.testing.assert_close(loss, expected)
        assert "margin_sum" not in log


def test_class_weights_live_in_the_model():
    for name in OWN:
        assert not list(criterion(name).parameters())


def test_softmax_has_no_margin_options():
    names = set(CRITERION_DATACLASS_REGISTRY["softmax"].__dataclass_fields__)
    assert not {"m", "s", "margin_start", "margin_end"} & names
    names = set(CRITERION_DATACLASS_REGISTRY["aam_softmax"].__dataclass_fields__)
    assert {"m", "s", "margin_start", "margin_end"} <= names


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="'am_softmx': did you mean 'am_softmax'.*aam_softmax"):
        MARGINS.get("am_softmx")
    with pytest.raises(UserError, match="did you mean 'statistics'"):
        POOLINGS.get("statistic")


PLUGIN = '''
"""Someone's own parts: this folder is all there is."""
from dataclasses import dataclass, field
from typing import List

import torch
from torch import nn

from fairseq_ext.speaker.criterion import register_margin
from fairseq_ext.speaker.pooling import POOLINGS


@dataclass
class Options:
    s: float = field(default=20.0, metadata={"help": "scale"})
    m: float = field(default=0.5, metadata={"help": "margin"})
    weights: List[float] = field(default_factory=lambda: [1.0], metadata={"help": "of losses"})


@register_margin("squared_margin", options=Options)
def squared_margin(logits, labels, s=20.0, m=0.5, weights=(1.0,), reduction="mean"):
    target = logits.gather(1, labels[:, None]) - m * m
    loss = nn.functional.cross_entropy(
        s * logits.scatter(1, labels[:, None], target), labels, reduction=reduction)
    return sum(weights) * loss


@dataclass
class PowerOptions:
    power: float = field(default=2.0, metadata={"help": "exponent"})


@POOLINGS.register("power_mean", options=PowerOptions)
class PowerMean(nn.Module):
    """Mean of |x|^power."""

    def __init__(self, d_model, power=2.0):
        super().__init__()
        self.output_dim, self.power = d_model, power

    def forward(self, x, padding_mask=None):
        return x.abs().pow(self.power).mean(1)
'''


def test_margin_and_pooling_of_ones_own_user_dir(tmp_path, tiny_data):
    """One decorator each in another --user-dir; the command line, task and model are fairseq's."""
    folder = tmp_path / "someones_speech_parts"
    folder.mkdir()
    (folder / "__init__.py").write_text(PLUGIN)
    import_user_module(argparse.Namespace(user_dir=str(folder)))
    line = (
        f"{tiny_data} --user-dir {folder} --task speaker_id --arch conformer_speaker --d-model 8"
        " --nhead 2 --d-ffn 8 --layers 1 --criterion squared_margin --s 10 --margin-end 4 --m 0.6"
        " --pooling power_mean --pooling-options power=3 --optimizer adam --lr 0.001 --batch-size 4"
    )
    args = options.parse_args_and_arch(options.get_training_parser(), line.split())
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    model, one = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    assert model.network.pooling.power == 3.0
    assert model.network.head.kind == "cosine"
    assert one.options == {"s": 10.0, "m": 0.6, "weights": [1.0]} and one.warmup == (0, 4)
    task.load_dataset("valid")
    batch = task.dataset("valid").collater([task.dataset("valid")[i] for i in range(3)])
    one.train(), model.train()
    one.set_num_updates(2)
    assert one.current_options()["m"] == pytest.approx(0.3)
    loss, n, log = one(model, batch)
    loss.backward()
    assert n == 3 and loss.isfinite() and model.network.head.weight.grad.abs().sum() > 0
    # who mistypes it is told
    cfg.model.pooling = "power_meen"
    with pytest.raises(UserError, match="did you mean 'power_mean'"):
        task.build_model(cfg.model)
    cfg.model.pooling = "power_mean"
    cfg.model.nhead = 3
    with pytest.raises(UserError, match="d_model 8 is not a multiple of nhead 3"):
        task.build_model(cfg.model)
    # a name taken is a mistake of the plugin, told at once
    with pytest.raises(ValueError, match="already registered"):
        criterions.register_margin("squared_margin")(am_softmax)
