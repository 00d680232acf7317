"""Training and translation as the translation quickstart does them, for either direction."""

from steps import ROOT, relative
from training import train_shown

from fairseq_ext.translation.corpus import Corpus

# 4 + 4 layers: the size for 10,000 to 30,000 pairs. Norms before the layers: no other kind learns
# within a few hundred updates.
SIZE = """--encoder-layers 4 --decoder-layers 4 --encoder-embed-dim 128 --decoder-embed-dim 128
    --encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-attention-heads 4 --encoder-normalize-before --decoder-normalize-before"""


def train(steps, data, options, updates=None, folder=None, direction=(), name=None):
    """The best checkpoint of a training in `folder`, else the one of the steps.

    direction: (source, target), else that of the data; name: of the step.
    """
    folder, updates = folder or steps.folder, updates or options.updates
    folder.mkdir(exist_ok=True)
    best = folder / "checkpoints" / "checkpoint_best.pt"
    command = (
        f"fairseq-train {{}} --user-dir {{}} --task translation_spm --arch transformer_iwslt_de_en "
        f"{SIZE} --share-all-embeddings --dropout {0.3 if options.data else 0.1} --optimizer adam "
        f"--lr-scheduler noam --warmup-updates 300 --noam-factor 0.5 "
        f"--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 2000 "
        f"--max-update {updates} --save-dir {{}} --no-epoch-checkpoints --save-interval-updates 200 "
        f"--keep-interval-updates 1 --validate-interval 1000 --save-interval 1000 --num-workers 0 "
        f"--log-interval 10 --log-format simple"
    ).split()
    places = iter([data, relative(ROOT / "fairseq_ext"), folder / "checkpoints"])
    at = command.index("--optimizer") + 2
    command = [*command[:at], "--adam-betas", "(0.9, 0.98)", *command[at:]]
    command = [next(places) if part == "{}" else part for part in command]
    for flag, lang in zip(("--source-lang", "--target-lang"), direction, strict=False):
        command += [flag, lang]

    train_shown(
        steps,
        data,
        command,
        updates,
        best,
        name=name,
        log=(folder / "train.log").relative_to(steps.folder),
        inputs=[data / "manifest.json"] if name else [],
        metric="bleu",
        unit="",
    )
    return best


def translate(steps, data, checkpoint, options):
    """test.out and scores.json."""
    source, reference = (data / "text" / f"test.{lang}" for lang in Corpus.open(data).languages)
    output, scores = steps.folder / "test.out", steps.folder / "scores.json"
    command = ["python", "-m", "fairseq_ext.translation.translate", source, output]
    command += ["--path", checkpoint]
    steps.do("translate test", command, inputs=[source, checkpoint], outputs=[output])
    command = ["python", "-m", "fairseq_ext.translation.score", output, "--ref", reference]
    command += ["--lang", options.target_lang, "--source", source, "--json", scores]
    steps.do("score the translations", command, inputs=[output, reference], outputs=[scores])
