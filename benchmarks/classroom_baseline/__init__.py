"""The model that the course starts from, as a `--user-dir` plugin: what the project is measured against.

Linear 40→80, one post-norm `nn.TransformerEncoderLayer` (d 80, 2 heads, ffn 256), mean over time, Linear
80→80, sigmoid, Linear → classes. It stands on `fairseq_ext` for task and criterion and adds one architecture.
"""

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import nn

import fairseq_ext  # noqa: F401
from fairseq_ext.speaker.pooling import MeanPooling


@dataclass
class ClassroomBaselineConfig(FairseqDataclass):
    pass


@register_model("classroom_baseline", dataclass=ClassroomBaselineConfig)
class ClassroomBaseline(BaseFairseqModel):
    def __init__(self, n_mels: int, speakers: int):
        super().__init__()
        self.input = nn.Linear(n_mels, 80)
        self.layer = nn.TransformerEncoderLayer(80, 2, 256, batch_first=True)
        self.pooling = MeanPooling(80)
        self.hidden = nn.Sequential(nn.Linear(80, 80), nn.Sigmoid())
        self.output = nn.Linear(80, speakers)

    @classmethod
    def build_model(cls, cfg, task):
        return cls(task.spec["n_mels"], len(task.speakers))

    def forward(self, source, padding_mask=None):
        x = self.layer(self.input(source), src_key_padding_mask=padding_mask)
        embedding = self.hidden(self.pooling(x, padding_mask))
        return {"embedding": embedding, "logits": self.output(embedding)}

    def max_positions(self):
        return None
