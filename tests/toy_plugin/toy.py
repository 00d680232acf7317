"""Task, models and criterions of the toy plugin; nothing is read but the existence of a folder."""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.data import FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from fairseq.tasks import FairseqTask, register_task
from omegaconf import MISSING

SIZES = {"train": 22, "valid": 7}


@dataclass
class ToyTaskConfig(FairseqDataclass):
    data: str = field(default=MISSING, metadata={"help": "an existing folder; not read"})
    toy_dim: int = field(default=3, metadata={"help": "number of inputs"})
    reuse_dataloader: bool = field(default=False, metadata={"help": "keep the loader's workers"})
    toy_numpy_state: bool = field(
        default=False, metadata={"help": "keep a numpy scalar in the task's state"}
    )


class ToyDataset(FairseqDataset):
    def __init__(self, split, dim):
        rng = np.random.default_rng(7 if split == "train" else 8)
        self.x = torch.from_numpy(rng.standard_normal((SIZES[split], dim))).float()
        self.y = self.x.sum(1, keepdim=True)
        self.sizes = np.ones(len(self.x), dtype=np.int64)

    def __getitem__(self, index):
        return index, self.x[index], self.y[index]

    def __len__(self):
        return len(self.x)

    def num_tokens(self, index):
        return 1

    def num_tokens_vec(self, indices):
        return np.ones(len(indices), dtype=np.int64)

    def size(self, index):
        return 1

    def ordered_indices(self):
        return np.arange(len(self))

    def collater(self, samples):
        if not samples:
            return {}
        ids, x, y = zip(*samples, strict=True)
        return {
            "id": torch.tensor(ids),
            "nsentences": len(ids),
            "ntokens": len(ids),
            "net_input": {"source": torch.stack(x)},
            "target": torch.stack(y),
        }


@register_task("toy", dataclass=ToyTaskConfig)
class ToyTask(FairseqTask):
    def __init__(self, cfg, **kwargs):
        super().__init__(cfg, **kwargs)
        self.state.add_factory("names", lambda: ["a", "b"])
        if cfg.toy_numpy_state:
            self.state.add_factory("scale", lambda: np.float64(2.5))
            _ = self.state.scale
        _ = self.state.names

    def load_dataset(self, split, combine=False, **kwargs):
        self.datasets[split] = ToyDataset(split, self.cfg.toy_dim)

    def max_positions(self):
        return None

    @property
    def target_dictionary(self):
        return None


@dataclass
class ToyModelConfig(FairseqDataclass):
    toy_hidden: int = field(default=4, metadata={"help": "hidden units"})
    toy_norm: bool = field(default=False, metadata={"help": "with batch normalisation"})
    toy_tied: bool = field(default=False, metadata={"help": "with two layers of one weight"})
    toy_note: Optional[str] = field(default=None, metadata={"help": "any text"})


@register_model("toy_model", dataclass=ToyModelConfig)
class ToyModel(BaseFairseqModel):
    def __init__(self, cfg, dim):
        super().__init__()
        self.first = torch.nn.Linear(dim, cfg.toy_hidden)
        self.norm = torch.nn.BatchNorm1d(cfg.toy_hidden) if cfg.toy_norm else None
        if cfg.toy_tied:
            self.inversion = torch.nn.Linear(cfg.toy_hidden, cfg.toy_hidden, bias=False)
            self.again = torch.nn.Linear(cfg.toy_hidden, cfg.toy_hidden, bias=False)
            self.again.weight = self.inversion.weight
        else:
            self.inversion = self.again = None
        self.last = torch.nn.Linear(cfg.toy_hidden, 1)

    @classmethod
    def build_model(cls, cfg, task):
        return cls(cfg, task.cfg.toy_dim)

    def forward(self, source):
        hidden = torch.tanh(self.first(source))
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.inversion is not None:
            hidden = self.again(self.inversion(hidden))
        return self.last(hidden)

    def max_positions(self):
        return None


@dataclass
class ToyCriterionConfig(FairseqDataclass):
    toy_summed: bool = field(default=True, metadata={"help": "outputs are summed; flag: gathered"})


@register_criterion("toy_mse", dataclass=ToyCriterionConfig)
class ToyCriterion(FairseqCriterion):
    summed = True

    def __init__(self, task, toy_summed):
        super().__init__(task)
        type(self).summed = toy_summed

    def forward(self, model, sample, reduce=True):
        output = model(**sample["net_input"])
        loss = (output.float() - sample["target"].float()).square().sum()
        n = sample["nsentences"]
        return loss, n, {"loss": loss.detach(), "ntokens": n, "nsentences": n, "sample_size": n}

    @classmethod
    def reduce_metrics(cls, logging_outputs):
        loss = sum(float(log["loss"]) for log in logging_outputs)
        n = sum(log["nsentences"] for log in logging_outputs)
        metrics.log_scalar("loss", loss / n, n, round=6)
        metrics.log_scalar("npscore", np.float64(loss / n), n, round=6)

    @classmethod
    def logging_outputs_can_be_summed(cls):
        return cls.summed
