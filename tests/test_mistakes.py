"""What goes wrong at a keyboard ends in one sentence, whichever command it is: no traceback, code 1 or 2.

Each command runs in a fork of this process, which has imported fairseq once, by its own entry point and with
the hooks of a real process; a few run as real processes too.
"""

import importlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ext_common import cli
from tests.speaker.conftest import RATE, SPEAKERS, voice
from tests.translation.conftest import toy_pairs, train_flags, write_data

NETWORK = (
    *("--d-model", "--nhead", "--d-ffn", "--layers", "--kernel-size", "--embedding-dim"),
    *("--base-channels", "--head-channels", "--channel-mults"),
)
ROOT = Path(__file__).resolve().parent.parent
SPEAKER = (
    "--user-dir {root}/fairseq_ext --task speaker_id --arch conformer_speaker --criterion am_softmax"
    " --optimizer adam --lr 1e-3 --batch-size 4 --max-update 1 --epoch-updates 1 --crop-frames 20 --cpu"
    " --d-model 16 --nhead 2 --d-ffn 32 --layers 1 --kernel-size 7 --embedding-dim 8 --num-workers 0"
)
DIFFUSION = (
    "--user-dir {root}/diffusion_ext --task diffusion --arch ddpm_unet --criterion ddpm --optimizer adam"
    " --lr 1e-3 --batch-size 4 --max-update 1 --epoch-updates 1 --sample-interval 0 --cpu --image-size 8"
    " --base-channels 8 --head-channels 8 --channel-mults 1,2 --num-workers 0"
)
TRANSLATION = (
    "--user-dir {root}/fairseq_ext --task translation_spm --arch transformer --optimizer adam --lr 1e-3"
    " --criterion label_smoothed_cross_entropy --max-tokens 1000 --max-update 1 --cpu --num-workers 0"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a checkpoint of every wing, and with what is none."""
    soundfile = pytest.importorskip("soundfile")
    import fairseq_cli.train  # noqa: F401

    import diffusion_ext
    import fairseq_ext

    # another test may have imported them before fairseq
    diffusion_ext.register()
    fairseq_ext.register()
    folder = tmp_path_factory.mktemp("mistakes")
    for speaker in SPEAKERS:
        (folder / "rec" / speaker).mkdir(parents=True)
        for n in range(4):
            samples = voice(speaker, 0.3 + 0.1 * n, n)
            soundfile.write(folder / "rec" / speaker / f"{n}.wav", samples, RATE, subtype="FLOAT")
    from PIL import Image

    for k in range(16):
        path = folder / "images" / f"{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (16 * k, 3 * k, 90)).save(path)
    for name in ("single", "broken"):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes((folder / "images" / "0" / "0.png").read_bytes())
    (folder / "broken" / "b.png").write_text("no picture")
    write_data(folder / "text", toy_pairs(700))
    (folder / "file").write_text("x\n")
    (folder / "nothing").write_text("")
    (folder / "line.en").write_text("I like red apples.\n")
    (folder / "latin").write_bytes(b"caf\xe9\n")
    (folder / "empty").mkdir()
    prepare = "{p}/rec {p}/speakers --workers 1 --valid-fraction 0.25 --test-fraction 0.25"
    for command, line in (
        ("fairseq_ext.speaker.prepare", prepare),
        ("fairseq-train", "{p}/speakers --save-dir {p}/speaker " + SPEAKER),
        ("fairseq-train", "{p}/images --save-dir {p}/diffusion " + DIFFUSION),
    ):
        code, said = outcome(folder, command, line)
        assert code == 0, said
    flags = train_flags(folder / "text", folder / "translation", "--max-update", 1)
    code, said = outcome(folder, "fairseq-train", shlex.join(flags))
    assert code == 0, said
    whole = (folder / "speaker" / "checkpoint_last.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    return folder


def outcome(folder, command, line):
    """(exit code, standard error) of a command line; {p} is the folder, {root} the repository."""
    words = shlex.split(line.format(p=folder, root=ROOT))
    _program(command)  # once here, not in each fork
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _run(folder, command, words, said.fileno())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")


def _program(command):
    """The module that a command is."""
    if command.startswith("fairseq-"):
        return importlib.import_module(
            f"fairseq_cli.{command.removeprefix('fairseq-').replace('-', '_')}"
        )
    module = importlib.import_module(command)
    return importlib.import_module(f"{command}.__main__") if hasattr(module, "__path__") else module


def _run(folder, command, words, said):
    """In the fork: what a fresh process does with the command."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(said, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rw"[n > 0], closefd=False) for n in range(3))
    os.chdir(folder / "empty")
    torch.set_num_threads(1)
    sys.excepthook = sys.__excepthook__
    from ext_common.compat.messages import tell_mistakes_in_one_sentence

    try:
        sys.argv = [command, *words]
        if command.startswith("fairseq-"):
            # as the plugin does when fairseq imports it
            tell_mistakes_in_one_sentence()
            _program(command).cli_main()
        else:
            cli.run(_program(command).main, words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as error:
            code = error.code
    else:
        code = 0
    sys.stderr.flush()
    return code


def changed(line, **flags):
    """A line with flags replaced, or taken out where their value is None."""
    words = line.split()
    if "arch" in flags:
        # the flags of a network are known with that network only
        for name in NETWORK:
            if name in words:
                del words[words.index(name) : words.index(name) + 2]
    for name, value in flags.items():
        at = words.index(f"--{name.replace('_', '-')}")
        words[at : at + 2] = [] if value is None else [words[at], value]
    return " ".join(words)


def train(data, line, more="", **flags):
    return f"{{p}}/{data} --save-dir {{p}}/new {changed(line, **flags)} {more}"


def speakers(more="", data="speakers", **flags):
    return "fairseq-train", train(data, SPEAKER, more, **flags)


def text(more="", data="text", **flags):
    return "fairseq-train", train(data, TRANSLATION, more, **flags)


def images(more="", data="images", **flags):
    return "fairseq-train", train(data, DIFFUSION, more, **flags)


def recipe(overrides):
    line = "--config-dir {root}/configs/speaker_id --config-name fsdd common.user_dir={root}/fairseq_ext"
    line += " checkpoint.save_dir={p}/new hydra.run.dir={p}/hydra common.cpu=true"
    return "fairseq-hydra-train", f"{line} optimization.max_update=1 {overrides}"


GENERATE = "{p}/text --user-dir {root}/fairseq_ext --task translation_spm --max-tokens 1000 --cpu"
MODEL = " --path {p}/translation/checkpoint_last.pt"
IDENTIFY = "{p}/rec/anna/0.wav --path {p}/speaker/checkpoint_last.pt"
SAMPLE = "{p}/samples --path {p}/diffusion/checkpoint_last.pt --num 1 --steps 1"
PAIRS = "--source-lang en --target-lang zh"
# (command, line), exit code, words of the sentence
MISTAKES = [
    # names
    (speakers(arch="conformer_speeker"), 2, "did you mean 'conformer_speaker'"),
    (speakers(task="speaker_ide"), 2, "did you mean 'speaker_id'"),
    (speakers(criterion="am_softmx"), 2, "did you mean 'am_softmax'"),
    (speakers(optimizer="adamm"), 2, "did you mean 'adam'"),
    (speakers("--max-updat 3"), 2, "did you mean '--max-update'"),
    (speakers("--lr-scheduler cosin"), 2, "did you mean 'cosine'"),
    (images("--beta-schedule sigmod"), 1, "did you mean 'sigmoid'"),
    # what is missing
    (speakers(arch=None), 2, "--arch, the name of the network, is missing"),
    (text(arch=None), 2, "--arch, the name of the network, is missing"),
    (images(arch=None), 2, "--arch, the name of the network, is missing"),
    (speakers(criterion=None), 1, "--criterion cross_entropy does not belong to this --task"),
    (images(criterion=None), 1, "--criterion cross_entropy does not belong to this --task"),
    (speakers(batch_size=None), 2, "--batch-size or --max-tokens, the size of a batch, is missing"),
    (text(max_tokens=None), 2, "--batch-size or --max-tokens, the size of a batch, is missing"),
    (text(optimizer=None), 2, "--optimizer is missing"),
    (images(image_size=None), 1, "give --image-size"),
    (("fairseq-train", SPEAKER), 2, "required: data"),
    (text("--lr-scheduler polynomial_decay"), 1, "--total-num-update is missing"),
    (text("--lr-scheduler triangular"), 2, "--max-lr: is missing"),
    (text("--lr-scheduler tri_stage"), 1, "please specify steps or phase_ratio"),
    # parts that do not belong together
    (speakers(arch="transformer"), 1, "give conformer_speaker"),
    (text(arch="conformer_speaker"), 1, "does not belong to this --task: give transformer"),
    (text(arch="wav2vec2"), 1, "does not belong to this --task: give transformer"),
    (text(arch="transformer_lm"), 1, "do not belong together"),
    (text(criterion="am_softmax"), 1, "--criterion am_softmax does not belong to this --task"),
    (images(arch="transformer"), 1, "does not belong to this --task: give ddpm_unet"),
    # DATA
    (speakers(data="file"), 1, "is not a folder"),
    (speakers(data="gone"), 1, "is not a folder"),
    (speakers(data="empty"), 1, "is not a prepared folder"),
    (text(data="speakers"), 1, "no bitext"),
    (text(data="file"), 1, "is a file: give the folder"),
    (images(data="file"), 1, "is a file: give the folder"),
    (images(data="empty"), 1, "holds no images"),
    (images(data="gone"), 1, "does not exist"),
    (images(data="single"), 1, "holds a single image"),
    (images(data="broken"), 1, "b.png"),
    (images("--save-dir {p}/images/new"), 1, "lies in the folder of images"),
    (speakers("--valid-subset dev"), 1, "has no split 'dev'"),
    (text("--valid-subset dev"), 1, "has no split 'dev'"),
    (images("--valid-subset dev"), 1, "has no split 'dev': it has train and valid"),
    (images("--train-subset dev"), 1, "has no split 'dev'"),
    (text("-s xx"), 1, "-s xx does not fit: there are en and zh"),
    # values
    (speakers(lr="fast"), 2, "--lr: invalid value: 'fast'"),
    (speakers(batch_size="-3"), 2, "--batch-size -3 is too small"),
    (speakers(num_workers="-1"), 2, "--num-workers -1 is too small"),
    (text("--log-interval 0"), 2, "--log-interval 0 is too small"),
    (text("--update-freq 0"), 2, "--update-freq 0 is too small"),
    (text("--seed -1"), 2, "--seed -1 is too small"),
    (speakers("--distributed-world-size 0"), 2, "--distributed-world-size 0 is too small"),
    (speakers("--adam-betas x"), 2, "--adam-betas x are no two numbers"),
    (speakers("--augment codec:kinds=mp4"), 1, "unknown codec 'mp4': known are mp3, ogg, ulaw"),
    (speakers("--nhead 3"), 1, "d_model 16 is not a multiple of nhead 3"),
    (text("--encoder-attention-heads 3"), 1, "must be divisible by num_heads"),
    (text("--lr-scheduler inverse_sqrt --lr 1,2"), 1, "Consider --lr-scheduler=fixed instead"),
    (speakers("--tpu"), 2, "--tpu needs the package torch_xla"),
    (speakers("--fp16"), 1, "--fp16 needs a GPU"),
    (images("--color-jitter 1,2"), 1, "--color-jitter takes four numbers"),
    # checkpoints and places
    (speakers("--restore-file {p}/gone.pt"), 2, "gone.pt is no file"),
    (speakers("--finetune-from-model {p}/gone.pt"), 1, "gone.pt does not exist"),
    (speakers("--restore-file {p}/half.pt"), 1, "half.pt is truncated"),
    (speakers("--save-dir {p}/file"), 1, "file/dummy: Not a directory"),
    (speakers("--log-file {p}/gone/log"), 1, "gone/log: No such file or directory"),
    # fairseq's other commands
    (("fairseq-generate", GENERATE), 2, "--path is missing"),
    (("fairseq-interactive", GENERATE), 2, "--path is missing"),
    (("fairseq-validate", GENERATE), 2, "--path is missing"),
    (("fairseq-generate", GENERATE + " --path {p}/gone.pt"), 1, "gone.pt does not exist"),
    (("fairseq-generate", GENERATE + " --path {p}/half.pt"), 1, "half.pt is truncated"),
    (
        ("fairseq-generate", GENERATE + " --path {p}/speaker/checkpoint_last.pt"),
        2,
        "give --task speaker_id, or a checkpoint of translation_spm",
    ),
    (("fairseq-generate", GENERATE + MODEL + " --gen-subset dev"), 1, "has no split 'dev'"),
    (("fairseq-generate", GENERATE + MODEL + " --sampling-topk 3"), 1, "requires --sampling"),
    (("fairseq-generate", GENERATE + MODEL + " --beam 0"), 2, "--beam 0 is too small"),
    (("fairseq-generate", GENERATE + MODEL + " --model-overrides x"), 2, "is no dictionary"),
    (("fairseq-generate", GENERATE + MODEL + " --results-path {p}/file"), 1, "file: File exists"),
    (("fairseq-interactive", GENERATE + MODEL + " --input {p}/gone"), 1, "gone: No such file"),
    (("fairseq-validate", GENERATE + MODEL + " --valid-subset dev"), 1, "has no split 'dev'"),
    # recipes
    (recipe("task.data={p}/gone"), 1, "is not a folder"),
    (recipe(""), 1, "data is missing: give it a value"),
    (
        recipe("task.data={p}/speakers dataset.batch_size=null"),
        2,
        "the size of a batch, is missing",
    ),
    (recipe("task.data={p}/speakers dataset.valid_subset=dev"), 1, "has no split 'dev'"),
    (recipe("task.data={p}/speakers model._name=transformer"), 1, "give conformer_speaker"),
    (recipe("task.data={p}/speakers task.augment=nois"), 1, "did you mean 'noise'"),
    # our own commands
    (("fairseq_ext.speaker.prepare", "{p}/gone {p}/new"), 1, "is not a folder"),
    (("fairseq_ext.speaker.prepare", "{p}/rec {p}/file/x"), 1, "Not a directory"),
    (("fairseq_ext.speaker.prepare", "{p}/rec {p}/new --n-mels x"), 2, "expected int"),
    (("fairseq_ext.speaker.identify", "{p}/rec/anna/0.wav --path {p}/half.pt"), 1, "truncated"),
    (("fairseq_ext.speaker.identify", IDENTIFY + " --output {p}/file/x.csv"), 2, "file is a file"),
    (("fairseq_ext.speaker.identify", IDENTIFY + " --outptu x"), 2, "did you mean '--output'"),
    (("fairseq_ext.speaker.embed", IDENTIFY + " --plot {p}/file/x.png"), 2, "file is a file"),
    (("fairseq_ext.speaker.embed", IDENTIFY + " --batch-size 0"), 2, "must be at least 1"),
    (
        ("fairseq_ext.average", "{p}/speaker/ --output {p}/a.pt --best 2"),
        1,
        "--keep-best-checkpoints",
    ),
    (("fairseq_ext.average", "{p}/half.pt --output {p}/half.pt"), 2, "would replace an input"),
    (("fairseq_ext.translation.prepare", "{p}/nothing {p}/new " + PAIRS), 1, "is empty"),
    (("fairseq_ext.translation.prepare", "{p}/latin {p}/new " + PAIRS), 1, "is not UTF-8"),
    (("fairseq_ext.translation.translate", "{p}/gone {p}/x" + MODEL), 1, "does not exist"),
    (("fairseq_ext.translation.translate", "{p}/line.en {p}/file/x" + MODEL), 2, "file is a file"),
    (
        (
            "fairseq_ext.translation.translate",
            "{p}/line.en x --path {p}/speaker/checkpoint_last.pt",
        ),
        *(1, "is of another task (speaker_id)"),
    ),
    (
        ("fairseq_ext.translation.score", "{p}/file --ref {p}/gone --lang zh"),
        1,
        "gone cannot be read",
    ),
    (
        ("fairseq_ext.translation.score", "{p}/file --ref {p}/file --lang zh --json {p}"),
        2,
        "is a folder",
    ),
    (
        ("fairseq_ext.translation.score", "{p}/file --ref {p}/file --lang zh --seed -1"),
        2,
        "negative",
    ),
    (("fairseq_ext.translation.attention", "{p}/a.xyz --source x" + MODEL), 2, "must end in .png"),
    (("fairseq_ext.backtranslation.generate", "{p}/file {p}/new"), 2, "--model"),
    (
        (
            "fairseq_ext.backtranslation.generate",
            "{p}/file {p}/new --model x --mode topp --mode-options p=7",
        ),
        *(1, "must lie in (0, 1]"),
    ),
    (("fairseq_ext.backtranslation.assemble", "{p}/text {p}/empty {p}/new"), 1, "is not finished"),
    (("diffusion_ext.train", "{p}/images --image-size eight"), 2, "'eight' is no size"),
    (("diffusion_ext.train", ""), 2, "IMAGES, the folder of images, is missing"),
    (
        ("diffusion_ext.train", "{p}/images --image-size 8 --imagesize 4"),
        2,
        "did you mean '--image-size'",
    ),
    (("diffusion_ext.prepare", "{p}/images {p}/file --image-size 8"), 1, "is a file"),
    (("diffusion_ext.sample", SAMPLE + " --sampler heum"), 1, "did you mean 'heun'"),
    (("diffusion_ext.sample", "{p}/file --path {p}/diffusion/checkpoint_last.pt"), 1, "file"),
    (("diffusion_ext.evaluate", "--real {p}/images --fake {p}/gone --extractor pixels"), 1, "gone"),
    (
        ("diffusion_ext.evaluate", "--real {p}/images --fake {p}/images --output {p}/file/x"),
        2,
        "is a file",
    ),
    (("diffusion_ext.export", "{p}/half.pt {p}/export --format diffusers"), 1, "truncated"),
    (("fairseq_ext.draw_rates", "{p}/file/x.png"), 1, "cannot be written"),
    (("fairseq_ext.draw_rates", "{p}/empty"), 1, "is a folder"),
    (("ext_common.plots", "{p}/file {p}/x.png"), 1, "holds no training line"),
    (("ext_common.doctor", "--loud"), 2, "unknown argument '--loud'"),
]


@pytest.mark.parametrize(
    "command, code, words", MISTAKES, ids=[f"{n}-{m[0][0]}" for n, m in enumerate(MISTAKES)]
)
def test_a_mistake_is_one_sentence(place, command, code, words):
    found, said = outcome(place, *command)
    assert "Traceback" not in said, said[-3000:]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], said[-3000:]
    assert found == code
    assert not (place / "new").exists() or not list((place / "new").glob("*.pt"))


def test_bugs_keep_their_traceback():
    """Also an error of fairseq's that is no refusal, and ours of the kinds that fairseq refuses with."""
    from fairseq.data import data_utils

    from ext_common.compat.messages import sentence_of

    for function, argument in ((data_utils.collate_tokens, []), (int, "x"), (os.stat, "/no/such")):
        with pytest.raises((ValueError, OSError, IndexError)) as caught:
            function(argument, 1) if function is data_utils.collate_tokens else function(argument)
        assert sentence_of(caught.value) is None


@pytest.mark.slow
@pytest.mark.parametrize("command, code, words", [MISTAKES[n] for n in (0, 7, 12, 20, 26)])
def test_a_mistake_in_a_real_process(place, command, code, words):
    program, line = command
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *shlex.split(line.format(p=place, root=ROOT))],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert words in done.stderr.splitlines()[-1]
