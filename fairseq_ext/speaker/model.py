"""The speaker networks as fairseq models: `--arch conformer_speaker` and its sizes."""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Dict, List, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from omegaconf import II
from torch import Tensor

from ext_common.cli import UserError
from ext_common.muon import mark_hidden
from fairseq_ext.speaker.network import (
    PRESETS,
    NamedNetwork,
    NetworkOptions,
    SpeakerNetwork,
    fitting_head,
    speeds_of,
)


@dataclass
class SpeakerModelConfig(NetworkOptions, FairseqDataclass):
    head: Optional[str] = field(
        default=None,
        metadata={
            "help": "class scores: cosine or linear (default: linear for --criterion softmax, else cosine)"
        },
    )
    init_from: Optional[str] = field(
        default=None,
        metadata={
            "help": "start from the encoder of this checkpoint, of any set of speakers: its sizes are"
            " taken over, the class weights are new"
        },
    )
    init_head: bool = field(
        default=False,
        metadata={
            "help": "take the class weights of speakers that the checkpoint knows over too (with --init-from)"
        },
    )
    freeze_encoder: bool = field(
        default=False, metadata={"help": "train the class weights only (with --init-from)"}
    )
    criterion: str = II("criterion._name")


class SpeakerModelBase(NamedNetwork, BaseFairseqModel):
    """A `SpeakerNetwork` with fairseq's interface; forward returns embedding (B, D) and logits (B, C)."""

    def __init__(self, network: SpeakerNetwork, frozen: bool = False):
        super().__init__(network)
        mark_hidden(network.encoder)
        self.frozen = frozen
        if frozen:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith("head."))

    @classmethod
    def build_model(cls, cfg, task):
        weights = state = None
        if cfg.init_from and not task.from_checkpoint:
            state = read_speaker_checkpoint(cfg.init_from, task)
            weights = encoder_of(state)
        head = cfg.head or fitting_head(cfg.criterion)
        options = NetworkOptions(**{f.name: cfg[f.name] for f in fields(NetworkOptions)})
        try:
            speeds = speeds_of(getattr(task.cfg, "speed_classes", False))
            sizes = task.spec["n_mels"], len(task.speakers)
            network = SpeakerNetwork(options, *sizes, head, speeds)
        except ValueError as error:
            raise UserError(str(error)) from None
        if weights is not None:
            # all but the class weights, which stay as they were drawn
            network.load_state_dict({**weights, **head_of(network)})
            if cfg.init_head and not copy_head(network, state, task.speakers):
                raise UserError(
                    f"--init-head: {cfg.init_from} knows none of the speakers of the data: leave it out"
                )
        else:
            network.feature_mean.copy_(torch.as_tensor(task.feature_mean))
            network.feature_std.copy_(torch.as_tensor(task.feature_std))
        return cls(network, cfg.freeze_encoder)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen and mode:
            self.network.eval()
            self.network.head.train()
        return self

    def max_positions(self):
        return None

    def upgrade_state_dict_named(self, state_dict, name):
        key = f"{name}.network.head.weight".lstrip(".")
        mine = self.network.head.weight.shape
        if key in state_dict and state_dict[key].shape != mine:
            raise UserError(
                f"the checkpoint has class weights {tuple(state_dict[key].shape)} and this data needs"
                f" {tuple(mine)}: to start from it with other speakers, give --init-from CHECKPOINT and"
                " a new --save-dir"
            )


def head_of(network: SpeakerNetwork) -> Dict[str, Tensor]:
    """The part of the state that belongs to the speakers and not to speech."""
    return {k: v for k, v in network.state_dict().items() if k.startswith("head.")}


def copy_head(network: SpeakerNetwork, state: Dict, speakers: List[str]) -> int:
    """Take over the class weights of `speakers` that a checkpoint's state knows; how many these are."""
    theirs = {name: label for label, name in enumerate(state["task_state"]["speakers"])}
    both = [(label, theirs[name]) for label, name in enumerate(speakers) if name in theirs]
    mine, other = (list(labels) for labels in zip(*both, strict=True)) if both else ([], [])
    for key, value in head_of(network).items():
        saved = state["model"].get(f"network.{key}")
        if saved is not None:
            # a row of each, the sub-centres of a speaker side by side, other speeds behind all
            each = network.head.subcenters if key == "head.weight" else 1
            rows, found = (
                x[: each * count].view(count, -1)
                for x, count in ((value, len(speakers)), (saved, len(theirs)))
            )
            rows[mine] = found[other].to(rows.dtype)
    return len(both)


def complete(cfg, task) -> None:
    """Write into the options of a new model what follows from others, so that its checkpoint has it.

    The head fits the criterion; with `init_from` the sizes are those of that checkpoint.
    """
    fitting = fitting_head(cfg.criterion)
    if cfg.head not in (None, fitting):
        raise UserError(f"--criterion {cfg.criterion} needs --head {fitting}: leave --head out")
    cfg.head = fitting
    if cfg.freeze_encoder and not cfg.init_from:
        raise UserError("--freeze-encoder needs --init-from: a random encoder learns nothing")
    if cfg.init_head and not cfg.init_from:
        raise UserError("--init-head needs --init-from: give the checkpoint that has it")
    if cfg.init_from:
        theirs = read_speaker_checkpoint(cfg.init_from, task)["cfg"]["model"]
        own = {"dropout", "embedding_dropout"} | (set() if cfg.init_head else {"subcenters"})
        for f in fields(NetworkOptions):
            if f.name in theirs and f.name not in own:
                cfg[f.name] = theirs[f.name]


def read_speaker_checkpoint(path: str, task) -> Dict:
    """A checkpoint to start from; UserError where its features are not those of the data."""
    from fairseq_ext.speaker.inference import read_checkpoint

    state = read_checkpoint(path)
    if not any(key.startswith("network.") for key in state["model"]):
        name = state["cfg"]["model"].get("_name")
        raise UserError(
            f"--init-from {path} is a {name}, whose encoder is none of ours to start from"
        )
    spec = state["task_state"]["spec"]
    if spec != task.spec:
        raise UserError(
            f"--init-from {path} was trained on features {spec}, this data has {task.spec}:"
            " prepare the recordings again with the options of the checkpoint"
        )
    return state


def encoder_of(state: Dict) -> Dict[str, Tensor]:
    """The weights of a checkpoint's network but those of its speakers."""
    prefix = "network."
    weights = {k[len(prefix) :]: v for k, v in state["model"].items() if k.startswith(prefix)}
    return {k: v for k, v in weights.items() if not k.startswith("head.")}


def _register(name: str, changes: Dict) -> None:
    config = SpeakerModelConfig
    if changes:
        by_name = {f.name: f for f in fields(SpeakerModelConfig)}
        config = make_dataclass(
            f"{name}_config",
            [
                (k, by_name[k].type, field(default=v, metadata=dict(by_name[k].metadata)))
                for k, v in changes.items()
            ],
            bases=(SpeakerModelConfig,),
        )
    register_model(name, dataclass=config)(type(name, (SpeakerModelBase,), {}))


for _name, _changes in PRESETS.items():
    _register(_name, _changes)
