"""What fairseq-train itself writes for fairseq's own tasks is read, resumed and averaged."""

from pathlib import Path

import pytest
import torch

from ext_common import engine
from ext_common.checkpoints import name_of, read_state

engine.apply()
pytestmark = pytest.mark.slow

PLUGIN = Path(__file__).resolve().parents[2] / "fairseq_ext"
LINES = [" ".join("abcdefgh"[(i * k) % 8] for k in range(1, 3 + i % 5)) for i in range(24)]
SMALL = "--{0}-layers 1 --{0}-embed-dim 8 --{0}-ffn-embed-dim 8 --{0}-attention-heads 2"
SEQ2SEQ = f"{SMALL.format('encoder')} {SMALL.format('decoder')}"
TASKS = {
    "translation": f"-s en -t de --arch transformer {SEQ2SEQ} --eval-bleu --eval-bleu-args {{}} "
    "--eval-bleu-remove-bpe --best-checkpoint-metric bleu --maximize-best-checkpoint-metric",
    "language_modeling": "--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 8 "
    "--decoder-ffn-embed-dim 8 --decoder-attention-heads 2 --tokens-per-sample 16",
    "masked_lm": f"--arch masked_lm {SMALL.format('encoder')} --criterion masked_lm "
    "--tokens-per-sample 16",
    "sentence_prediction": f"--arch roberta_base {SMALL.format('encoder')} --num-classes 2 "
    "--criterion sentence_prediction --max-positions 16",
    "multilingual_translation": f"--lang-pairs en-de,de-en --arch multilingual_transformer {SEQ2SEQ}",
    "translation_from_pretrained_bart": f"-s en -t de --langs en,de --arch mbart_base {SEQ2SEQ}",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same lines as a bitext, as running text, and as sentences with two classes."""
    from fairseq.data import Dictionary, indexed_dataset

    folder = tmp_path_factory.mktemp("stock")
    words, labels = Dictionary(), Dictionary()
    for line in LINES:
        words.encode_line(line, append_eos=False)
    for label in "01":
        labels.add_symbol(label)

    def write(stem, lines, dictionary, append_eos=True):
        stem.parent.mkdir(exist_ok=True)
        builder = indexed_dataset.make_builder(f"{stem}.bin", "mmap", len(dictionary))
        for line in lines:
            builder.add_item(
                dictionary.encode_line(line, add_if_not_exist=False, append_eos=append_eos)
            )
        builder.finalize(f"{stem}.idx")

    for split in ("train", "valid"):
        for lang in ("en", "de"):
            write(folder / f"{split}.en-de.{lang}", LINES, words)
        write(folder / split, LINES, words)
        write(folder / "input0" / split, LINES, words)
        write(folder / "label" / split, [str(i % 2) for i in range(len(LINES))], labels, False)
    for name in ("dict.en.txt", "dict.de.txt", "dict.txt", "input0/dict.txt"):
        words.save(str(folder / name))
    labels.save(str(folder / "label" / "dict.txt"))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_stock_task_is_trained_resumed_and_read(task, data, tmp_path, monkeypatch):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.distributed import utils as distributed_utils
    from fairseq_cli import train

    def run(updates):
        words = f"""{data} --user-dir {PLUGIN} --task {task} {TASKS[task]} --optimizer adam --lr 0.01
            --max-tokens 64 --cpu --num-workers 0 --no-progress-bar --save-dir {tmp_path}
            --max-update {updates} --no-epoch-checkpoints""".split()
        monkeypatch.setattr("sys.argv", ["fairseq-train", *words])
        args = options.parse_args_and_arch(options.get_training_parser(), words)
        torch.set_num_threads(1)
        distributed_utils.call_main(convert_namespace_to_omegaconf(args), train.main)
        return read_state(tmp_path / "checkpoint_last.pt")

    first = run(2)
    assert name_of(first, "task") == task
    resumed = run(4)
    assert resumed["optimizer_history"][-1]["num_updates"] == 4
    assert any(not torch.equal(first["model"][k], resumed["model"][k]) for k in first["model"])
    assert read_state(tmp_path / "checkpoint_best.pt")["model"].keys() == first["model"].keys()

    from fairseq_ext.average import main

    out = tmp_path / "average.pt"
    main(
        [str(tmp_path / f"checkpoint_{name}.pt") for name in ("best", "last")]
        + ["--output", str(out)]
    )
    assert read_state(out)["model"].keys() == first["model"].keys()
