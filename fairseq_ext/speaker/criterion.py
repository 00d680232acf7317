"""Speaker criterions for fairseq: `--criterion am_softmax`, `aam_softmax`, `softmax`, and whoever registers.

A criterion computes the loss of the class scores that the model makes; the class weights live in the model,
so that `fairseq-validate` and every loader have them. Accuracies are those of the scores without margin.
Someone's own margin is one decorated function in their `--user-dir`:

    @register_margin("my_margin", options=MyOptions)
    def my_margin(logits, labels, s=30.0, m=0.1, reduction="mean"): ...
"""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Callable, Dict, List

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor
from torch.nn.functional import cross_entropy

from ext_common.cli import UserError
from ext_common.devices import sums
from fairseq_ext.speaker.margins import MARGINS, margin_at
from fairseq_ext.speaker.metrics import SCALES

# What validation sums for `metrics.likeliest_scale`.
SCALED = {f"scaled{k}": float(scale) for k, scale in enumerate(SCALES)}


@dataclass
class SpeakerCriterionConfig(FairseqDataclass):
    pass


@dataclass
class MarginWarmup(SpeakerCriterionConfig):
    margin_start: int = field(
        default=0, metadata={"help": "updates before the margin m starts to grow from 0"}
    )
    margin_end: int = field(
        default=0, metadata={"help": "update from which the margin m has its full size"}
    )


class SpeakerCriterion(FairseqCriterion):
    """Sums of loss and of correct utterances; subclasses are made by `register_margin`."""

    margin: str
    num_updates = 0

    def __init__(self, cfg, task):
        super().__init__(task)
        self.loss = MARGINS.get(self.margin)
        known = MARGINS.options(self.margin)
        self.options = {f.name: cfg[f.name] for f in fields(known)} if known else {}
        try:
            if known:
                type(known)(**self.options)
        except ValueError as error:
            raise UserError(f"--criterion {self.margin}: {error}") from None
        self.warmup = (cfg.margin_start, cfg.margin_end) if "m" in self.options else None

    def set_num_updates(self, num_updates: int) -> None:
        self.num_updates = num_updates

    def current_options(self) -> Dict:
        """The options of the loss, with the margin as it is at this update of training.

        Validation always has the whole margin, so that its losses can be compared through the warm-up
        and `fairseq-validate`, which knows no update count, repeats them.
        """
        if not self.warmup or not self.training:
            return self.options
        sizes = {name: self.options[name] for name in ("m", "inter_m") if name in self.options}
        grown = {k: margin_at(self.num_updates, m, *self.warmup) for k, m in sizes.items()}
        return {**self.options, **grown}

    def forward(self, model, sample, reduce=True):
        """(loss summed over the B utterances, B, sums to log); loss (B,) where `reduce` is False."""
        logits, target = model(**sample["net_input"])["logits"], sample["target"]
        reduction = "sum" if reduce else "none"
        loss = self.loss(logits, target, reduction=reduction, **self.current_options())
        n = len(target)
        top1, top5 = correct_in_top(logits.detach(), target)
        log = {
            "loss": loss.detach().sum(),
            "correct": top1.sum(),
            "correct5": top5.sum(),
            "ntokens": sample["ntokens"],
            "nsentences": n,
            "sample_size": n,
        }
        if "weight" in sample:
            log["speaker_correct"] = (top1 * sample["weight"]).sum()
            log["speaker_weight"] = sample["weight"].sum()
        if not self.training:
            for name, scale in SCALED.items():
                log[name] = cross_entropy(scale * logits.float(), target, reduction="sum").detach()
        if self.warmup and self.training:
            log["margin_sum"] = self.current_options()["m"] * n
        return loss, n, log

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict]) -> None:
        total = sums(logging_outputs)
        n = total["sample_size"]
        if not n:
            return
        # weighted by n, fairseq's running average over batches is sum / count exactly
        metrics.log_scalar("loss", total["loss"] / n, n, round=4)
        metrics.log_scalar("accuracy", 100 * total["correct"] / n, n, round=3)
        metrics.log_scalar("accuracy5", 100 * total["correct5"] / n, n, round=3)
        speakers = total["speaker_weight"] if "speaker_weight" in total else 0
        if speakers:
            # accuracy of each speaker, averaged over the speakers (see UtteranceDataset)
            mean = 100 * total["speaker_correct"] / speakers
            metrics.log_scalar("speaker_accuracy", mean, speakers, round=3)
        if "margin_sum" in total:
            metrics.log_scalar("margin", total["margin_sum"] / n, n, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def register_margin(name: str, options=None) -> Callable:
    """Enter a loss f(logits, labels, reduction, **options) in MARGINS and as `--criterion name`."""

    def enter(function: Callable) -> Callable:
        MARGINS.register(name, options=options)(function)
        _register_criterion(name)
        return function

    return enter


def correct_in_top(logits: Tensor, target: Tensor, k: int = 5):
    """bool (B,), bool (B,): is the target the best score, is it among the k best."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    hits = best == target[:, None]
    return hits[:, 0], hits.any(1)


def _register_criterion(name: str) -> None:
    known = MARGINS.options(name)
    own = [] if known is None else fields(known)
    base = MarginWarmup if any(f.name == "m" for f in own) else SpeakerCriterionConfig
    columns = [
        (
            f.name,
            f.type,
            field(default=f.default, default_factory=f.default_factory, metadata=dict(f.metadata)),
        )
        for f in own
    ]
    config = make_dataclass(f"{name}_config", columns, bases=(base,))
    # fairseq refuses a second criterion class of one name
    cls = type(f"{name}_criterion", (SpeakerCriterion,), {"margin": name})
    register_criterion(name, dataclass=config)(cls)


for _name in MARGINS.names():
    _register_criterion(_name)
