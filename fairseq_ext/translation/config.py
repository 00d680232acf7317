"""The options of `--task translation_spm`."""

from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.translation import TranslationConfig
from omegaconf import II

from ext_common.cli import UserError
from ext_common.presets import PresetOptions


@dataclass
class TranslationSpmConfig(PresetOptions, TranslationConfig):
    upsample_primary: int = field(
        default=1, metadata={"help": "times the pairs of train are used beside those of train1, …"}
    )
    select_by: ChoiceEnum(["bleu", "chrf", "loss"]) = field(
        default="bleu",
        metadata={
            "help": "what chooses checkpoint_best.pt and counts for --patience, unless"
            " --best-checkpoint-metric says otherwise"
        },
    )
    no_valid_text: bool = field(
        default=False,
        metadata={
            "help": "translate nothing in validation: measure the loss only, and select by it, which on "
            "little data takes a checkpoint far too early: BLEU still rises where the loss does"
        },
    )
    valid_beam: int = field(
        default=1, metadata={"help": "beam in validation (1: greedy, 3 to 5 times as fast as 5)"}
    )
    valid_sentences: int = field(
        default=2000,
        metadata={"help": "translate the first so many sentences of a validation subset (0: all)"},
    )
    subword_sampling: float = field(
        default=0.0,
        metadata={
            "help": "cut training text into other pieces every epoch: of a unigram model, the power α of the"
            " probability (0.2 is usual, less is wilder); of BPE, the share of merges left out (0.1 is"
            " usual, more is wilder); 0: off"
        },
    )
    subword_sampling_sides: ChoiceEnum(["source", "target", "both"]) = field(
        default="source", metadata={"help": "the sides that --subword-sampling cuts"}
    )
    seed: int = II("common.seed")


def check_options(cfg: TranslationSpmConfig) -> None:
    """UserError for options that contradict this task."""
    if cfg.eval_bleu:
        raise UserError(
            "--eval-bleu is BLEU for European languages: leave it out, --task translation_spm measures"
            " BLEU and chrF with the tokenizer of the target language by itself"
        )
    if cfg.subword_sampling < 0:
        raise UserError("--subword-sampling is at least 0")
    if cfg.valid_beam < 1 or cfg.valid_sentences < 0:
        raise UserError("--valid-beam is at least 1 and --valid-sentences at least 0")
