"""What can be said about a reverse model: which backend opens it, how, and how long its outputs may be."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq_ext.translation.text.languages import check_code


@dataclass
class ModelOptions:
    """How to open the reverse model and how long its outputs may be."""

    backend: str = field(
        default="auto",
        metadata={
            "help": "auto (by what --model is), fairseq, huggingface, ctranslate2 (converted where "
            "needed; the fastest on a CPU), or one of your --user-dir"
        },
    )
    compute_type: Optional[str] = field(
        default=None,
        metadata={
            "help": "float32, float16, bfloat16, and int8 with ctranslate2; none: float32, with "
            "ctranslate2 int8 on a CPU and float16 on a GPU"
        },
    )
    device: str = field(
        default="auto",
        metadata={"help": "cpu, cuda, cuda:1; auto: CUDA where there is one (torchrun: its own)"},
    )
    threads: Optional[int] = field(
        default=None, metadata={"help": "threads on the CPU; none: one for each CPU"}
    )
    max_tokens: Optional[int] = field(
        default=None,
        metadata={"help": "pieces of padded source in a batch; none: what is fastest"},
    )
    max_len_a: float = field(
        default=2.0,
        metadata={"help": "output ends at the latest after A · pieces of the source + B pieces: A"},
    )
    max_len_b: int = field(default=50, metadata={"help": "B of the same, in pieces"})
    shortlist: Optional[str] = field(
        default=None,
        metadata={
            "help": "prepared bitext of the same languages: a beam takes only pieces that the batch's have "
            "been translated by there; for --backend ctranslate2, where it is half as fast again"
        },
    )
    split: bool = field(
        default=True,
        metadata={
            "help": "translate the sentences of a line one by one, where the training of a checkpoint had "
            "one in a line or the line is longer than nearly all of its lines"
        },
    )
    prefix: Optional[str] = field(
        default=None,
        metadata={"help": "put before each line for a Hugging Face model, such as >>eng<<"},
    )
    tokenizer: Optional[str] = field(
        default=None,
        metadata={"help": "folder with the tokenizer of a CTranslate2 model that lacks it"},
    )
    model_source: Optional[str] = field(
        default=None, metadata={"help": "language the model reads, where it does not say so: zh"}
    )
    model_target: Optional[str] = field(
        default=None, metadata={"help": "language the model writes, where it does not say so: en"}
    )
    user_dir: Optional[str] = field(
        default=None, metadata={"help": "folder whose modules register models, modes or backends"}
    )

    def __post_init__(self) -> None:
        for name in ("threads", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("max_len_a", "max_len_b"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ValueError(
                    f"--{name.replace('_', '-')} must lie between 0 and 1,000,000, got "
                    f"{getattr(self, name)}"
                )
        for name in ("model_source", "model_target"):
            if getattr(self, name) is not None:
                check_code(getattr(self, name), f"--{name.replace('_', '-')}")

    def lengths(self) -> dict[str, Any]:
        """Fields of `DecodeOptions`."""
        names = ("max_tokens", "max_len_a", "max_len_b")
        return {name: getattr(self, name) for name in names}
