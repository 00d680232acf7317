"""The Noam schedule: its closed form, where d_model comes from, and real trainings with it."""

import json
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler.inverse_square_root_schedule import (
    InverseSquareRootLRScheduleConfig,
    InverseSquareRootSchedule,
)
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ext_common.cli import UserError
from fairseq_ext.noam import (
    FAIRSEQ_LR,
    NoamConfig,
    NoamSchedule,
    falling,
    get_rate,
    model_dimension,
)
from tests import processes


class Rate(FairseqOptimizer):
    """An optimizer that is nothing but a learning rate."""

    def __init__(self):
        super().__init__(None)
        self.lr = None

    def get_lr(self):
        return self.lr

    def set_lr(self, lr):
        self.lr = lr


def noam(d_model=512, warmup=4000, factor=1.0, lr=(FAIRSEQ_LR,), **options):
    config = NoamConfig(
        noam_d_model=d_model, warmup_updates=warmup, noam_factor=factor, lr=list(lr), **options
    )
    return NoamSchedule(config, Rate())


# --- the pure core ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "d_model, step, warmup, rate",
    [
        # by hand: 1/2 · min(1, 1/8); the peak 1/sqrt(4 · 4); 1/2 · min(1/4, 16/8)
        (4, 1, 4, 0.0625),
        (4, 4, 4, 0.25),
        (4, 16, 4, 0.125),
        (1, 1, 1, 1.0),
    ],
)
def test_rate_by_hand(d_model, step, warmup, rate):
    assert get_rate(d_model, step, warmup) == pytest.approx(rate, rel=1e-15)


@given(
    d=st.integers(1, 10**5),
    w=st.integers(1, 10**6),
    f=st.floats(1e-3, 1e3),
    n=st.integers(0, 10**7),
)
def test_it_is_inverse_sqrt_one_update_earlier(d, w, f, n):
    """noam(n) = inverse_sqrt(n + 1) of fairseq, with --lr factor · (d · w)^-0.5."""
    config = InverseSquareRootLRScheduleConfig(warmup_updates=w, lr=[f * (d * w) ** -0.5])
    other = InverseSquareRootSchedule(config, Rate())
    assert noam(d, w, f).step_update(n) == pytest.approx(other.step_update(n + 1), rel=1e-9)


@given(d=st.integers(1, 10**4), w=st.integers(1, 300))
def test_the_peak_is_at_the_warmup(d, w):
    rates = [get_rate(d, step, w) for step in range(1, 2 * w + 2)]
    top = rates.index(max(rates))
    # (w^-0.5 and w · w^-1.5 differ in the last bit; nothing beside may be higher than that)
    assert top == w - 1
    assert rates[top] == pytest.approx((d * w) ** -0.5, rel=1e-12)
    assert rates[:w] == sorted(rates[:w]) and rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("d_model, peak", [(512, 1.3975e-3), (256, 1.9764e-3)])
def test_peaks_of_the_course(d_model, peak):
    """Warm-up 4000, factor 2."""
    schedule = noam(d_model, 4000, 2.0)
    rates = [schedule.step_update(n) for n in range(8001)]
    assert rates.index(max(rates)) == 3999
    assert max(rates) == pytest.approx(peak, abs=5e-8)


def test_the_last_updates_fall_to_0():
    """By hand: 10 updates, of which the last 4 have 4/5, 3/5, 2/5 and 1/5."""
    shares = [falling(step, 10, 4) for step in range(1, 13)]
    assert shares == pytest.approx([1] * 6 + [0.8, 0.6, 0.4, 0.2, 0, 0])
    schedule = noam(4, 2, noam_cooldown=4, max_update=10)
    rates = [schedule.step_update(n) for n in range(10)]
    closed = [get_rate(4, n + 1, 2) for n in range(10)]
    assert rates == pytest.approx([r * share for r, share in zip(closed, shares[:10], strict=True)])


@pytest.mark.parametrize("updates", [0, 3])
def test_a_cooldown_needs_as_long_a_training(updates):
    with pytest.raises(UserError, match=rf"--noam-cooldown 4 .* --max-update, which is {updates}"):
        noam(4, 2, noam_cooldown=4, max_update=updates)


@pytest.mark.parametrize(
    "arguments, said",
    [((512, 0, 4000), "step_num"), ((512, 1, 0), "warmup_step"), ((0, 1, 4000), "d_model")],
)
def test_rate_refuses(arguments, said):
    with pytest.raises(ValueError, match=f"{said} is .* at least 1"):
        get_rate(*arguments)


# --- the scheduler --------------------------------------------------------------------------------


def test_rate_depends_on_the_update_count_alone():
    one, two = noam(16, 5), noam(16, 5)
    assert one.optimizer.lr == get_rate(16, 1, 5)  # set before anybody asks
    for n in (7, 7, 0, 3, 12, 7):
        assert one.step_update(n) == one.optimizer.lr == get_rate(16, n + 1, 5)
    one.step(1, 3.0)
    one.step_begin_epoch(2)
    assert one.optimizer.lr == get_rate(16, 8, 5)
    assert one.step(2, 2.0) == get_rate(16, 8, 5) and one.best == 2.0
    two.step_update(7)
    assert two.optimizer.lr == one.optimizer.lr


def test_state_cannot_override_the_options():
    old = noam(16, 5)
    old.step_update(9)
    old.step(1, 3.0)
    new = noam(16, 7, factor=3)
    new.load_state_dict(old.state_dict())
    assert old.state_dict() == {"best": 3.0} and new.best == 3.0
    assert new.step_update(9) == 3 * get_rate(16, 10, 7)
    # of a run that had another scheduler
    new.load_state_dict({"best": None, "last_epoch": 4, "lr": 17.0})
    new.load_state_dict({})
    assert new.step_update(9) == 3 * get_rate(16, 10, 7)


@given(lr=st.floats(1e-9, 1e3).filter(lambda lr: lr != FAIRSEQ_LR))
def test_another_lr_is_refused_with_the_factor_that_gives_it(lr):
    with pytest.raises(UserError, match="--noam-factor") as caught:
        noam(512, 4000, lr=[lr])
    factor = float(re.search(r"--noam-factor ([\d.e+-]+)", str(caught.value)).group(1))
    assert noam(512, 4000, factor).step_update(3999) == pytest.approx(lr, rel=1e-5)


@pytest.mark.parametrize(
    "kwargs, said",
    [
        (dict(lr=[0.25, 0.1]), "--lr 0.25,0.1 is a list"),
        (dict(warmup=0), "--warmup-updates 0 must be at least 1"),
        (dict(warmup=-5), "--warmup-updates -5 must be at least 1"),
        (dict(factor=0.0), "--noam-factor 0 must be"),
        (dict(factor=-1.0), "--noam-factor -1 must be"),
        (dict(factor=math.nan), "--noam-factor nan must be"),
        (dict(factor=math.inf), "--noam-factor inf must be"),
        (dict(d_model=None), "give --noam-d-model"),
        (dict(d_model=0), "--noam-d-model 0 must be at least 1"),
    ],
)
def test_refused_in_words(kwargs, said):
    with pytest.raises(UserError, match=re.escape(said)):
        noam(**kwargs)


@pytest.mark.parametrize(
    "options, dimension",
    [
        (Namespace(arch="transformer", encoder_embed_dim=512, d_model=3), 512),
        (OmegaConf.create({"encoder": {"embed_dim": 64}, "decoder": {"embed_dim": 32}}), 64),
        (OmegaConf.create({"encoder": "conformer", "d_model": 144}), 144),
        (OmegaConf.create({"encoder": "conformer"}), None),
        (OmegaConf.create({"d_model": "???", "encoder_embed_dim": 8}), 8),
        (OmegaConf.create({"d_model": "???"}), None),
        (OmegaConf.create({"d_model": "${nowhere.at_all}"}), None),
        (Namespace(decoder_embed_dim=7), None),
        (Namespace(d_model=True), None),
        (None, None),
    ],
)
def test_dimension_of_a_model(options, dimension):
    assert model_dimension(options) == dimension
    if isinstance(options, Namespace) or options is None:
        return
    OmegaConf.set_struct(options, True)
    assert model_dimension(options) == dimension


def test_dimension_of_a_model_that_was_built_from_other_options():
    """fairseq-hydra-train fills what an arch leaves open in a copy, which the model keeps."""
    model = Namespace(cfg=Namespace(encoder=Namespace(embed_dim=48)))
    assert model_dimension(Namespace(), model) == 48
    assert model_dimension(Namespace(d_model=8), model) == 8


# --- trainings: several in one process, as importing fairseq takes longest -----------------------

DRIVER = r"""
import json, sys
# first, as in fairseq-train: whoever comes first sets how log lines look
from fairseq_cli import train
import torch
from fairseq import checkpoint_utils, options, trainer
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import FairseqOptimizer

applied = []
def step(self, *args, _step=FairseqOptimizer.step, **kwargs):
    applied.append(self.get_lr())
    return _step(self, *args, **kwargs)
FairseqOptimizer.step = step
# Only a GPU's loss scaler finds overflows, and fairseq makes the zero it then logs on a GPU.
torch.Tensor.cuda = lambda self, *args: self

attempts = 0
def clip(self, *args, _clip=trainer.Trainer.clip_grad_norm, **kwargs):
    global attempts
    attempts += 1
    if attempts in overflows:
        raise OverflowError("made by the test")
    return _clip(self, *args, **kwargs)
trainer.Trainer.clip_grad_norm = clip

results = {}
for name, (arguments, overflows) in json.load(open(sys.argv[1])).items():
    print("=====", name, flush=True)
    applied.clear()
    attempts, refused = 0, None
    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        vars(function).pop("best", None)
    arguments = [str(argument) for argument in arguments]
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
    try:
        train.main(convert_namespace_to_omegaconf(args))
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    results[name] = {"applied": list(applied), "attempts": attempts, "refused": refused}
json.dump(results, open(sys.argv[2], "w"))
"""
ROOT = Path(__file__).resolve().parent.parent
SIZES = (
    "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 16"
    " --decoder-ffn-embed-dim 16 --encoder-layers 1 --decoder-layers 1"
    " --encoder-attention-heads 2 --decoder-attention-heads 2"
)
LSTM = "--arch lstm --encoder-embed-dim 12 --decoder-embed-dim 8 --encoder-hidden-size 8 "
LSTM += "--decoder-hidden-size 8 --decoder-out-embed-dim 8 --decoder-attention 0"
SPEAKER = "--d-model 24 --nhead 2 --d-ffn 16 --layers 1 --kernel-size 7 --embedding-dim 8"
UPDATES, WARMUP, FACTOR, DIM = 12, 5, 2.0, 16


def run_python(*arguments, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = processes.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def bitext(tmp_path_factory):
    """24 sentences of fairseq's own translation task, as text."""
    folder = tmp_path_factory.mktemp("bitext")
    for lang in "ab":
        lines = [" ".join(f"w{(i * k) % 7}" for k in range(1, 4 + i % 3)) for i in range(24)]
        (folder / f"dict.{lang}.txt").write_text("".join(f"w{i} 1\n" for i in range(7)))
        for split, count in (("train", 24), ("valid", 4)):
            text = "\n".join(lines[:count]) + "\n"
            (folder / f"{split}.a-b.{lang}").write_text(text)
    return folder


@pytest.fixture(scope="session")
def speakers(tmp_path_factory):
    """Two voices, prepared for --task speaker_id."""
    import numpy as np

    from fairseq_ext.speaker.prepare.__main__ import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(1)
    for name in ("anna", "ben"):
        (folder / "wav" / name).mkdir(parents=True)
        for i in range(5):
            write_wav(folder / "wav" / name / f"{i}.wav", rng.standard_normal(16000) * 3000)
    prepare(
        folder / "wav",
        folder / "data",
        PrepareOptions(workers=1, valid_fraction=0.2, test_fraction=0.2),
    )
    return folder / "data"


def write_wav(path, samples):
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.astype("<i2").tobytes())


def common(data, save_dir, updates=UPDATES):
    return (
        f"{data} --user-dir {ROOT / 'fairseq_ext'} --cpu --optimizer adam --lr-scheduler noam"
        f" --save-dir {save_dir} --max-update {updates} --log-format json --log-interval 1"
        " --num-workers 0 --data-buffer-size 0 --disable-validation --no-epoch-checkpoints"
    )


@pytest.fixture(scope="session")
def runs(bitext, speakers, tmp_path_factory):
    """Name -> {applied: the rate of each update that was made, attempts, refused, log}."""
    folder = tmp_path_factory.mktemp("noam")
    translation = "--task translation -s a -t b --dataset-impl raw --batch-size 4"
    translation += " --required-batch-size-multiple 1"

    def fresh(name, more="", arch=f"--arch transformer {SIZES}", overflows=(), updates=UPDATES):
        flags = f"{common(bitext, folder / name.replace(' ', '_'), updates)} {translation} {arch}"
        flags += f" --warmup-updates {WARMUP} --noam-factor {FACTOR} {more}"
        return name, (flags.split(), overflows)

    middle = folder / "whole" / "checkpoint_1_4.pt"
    on = f"--restore-file {middle}"
    speaker = f"{common(speakers, folder / 'speaker')} --task speaker_id --arch conformer_speaker"
    speaker += (
        f" {SPEAKER} --criterion am_softmax --batch-size 2 --crop-frames 30 --epoch-updates 4"
    )
    speaker += f" --warmup-updates {WARMUP}"
    plan = dict(
        [
            fresh("whole", "--save-interval-updates 4 --stop-min-lr 1e-9"),
            fresh("resumed", on),
            fresh("reset scheduler", f"{on} --reset-lr-scheduler"),
            fresh("other factor", f"{on} --noam-factor 6 --warmup-updates 3"),
            fresh(
                "reset optimizer",
                f"{on} --reset-optimizer --reset-meters --reset-dataloader",
                updates=6,
            ),
            fresh("fine-tuned", f"--finetune-from-model {middle}", updates=6),
            fresh("update-freq", "--update-freq 2", updates=8),
            fresh("overflow", overflows=(1, 4, 5)),
            fresh("ema and bf16", "--store-ema --bf16", updates=6),
            fresh("cooldown", "--noam-cooldown 4"),
            fresh("lstm", arch=LSTM, updates=6),
            fresh("agrees", "--noam-d-model 16", updates=2),
            fresh("contradicts", "--noam-d-model 512"),
            fresh("lr", "--lr 0.001"),
            fresh("lrs", "--lr 0.25,0.1"),
            fresh("no warm-up", "--warmup-updates 0"),
            fresh("stopped", "--stop-min-lr 10"),
            ("speaker", (speaker.split(), ())),
        ]
    )
    (folder / "driver.py").write_text(DRIVER)
    (folder / "plan.json").write_text(json.dumps(plan))
    log = run_python("driver.py", "plan.json", "results.json", cwd=folder)
    results = json.loads((folder / "results.json").read_text())
    for part in log.split("===== ")[1:]:
        name, _, text = part.partition("\n")
        results[name]["log"] = text
    return results


def closed_form(first, last, dim=DIM, warmup=WARMUP, factor=FACTOR):
    """Rates of the updates `first` … `last`."""
    return [
        factor * dim**-0.5 * min(step**-0.5, step * warmup**-1.5) for step in range(first, last + 1)
    ]


def done(run):
    assert run["refused"] is None, run["refused"]
    return run["applied"]


@pytest.mark.slow
def test_a_training_follows_the_closed_form(runs):
    """Both what the optimizer was given for each update and what fairseq logs."""
    assert UPDATES >= 2 * WARMUP
    assert done(runs["whole"]) == pytest.approx(closed_form(1, UPDATES), rel=1e-12)
    rows = [
        json.loads(row) for row in re.findall(r"\| train_inner \| (\{.*\})", runs["whole"]["log"])
    ]
    logged = {int(row["num_updates"]): float(row["lr"]) for row in rows}
    assert sorted(logged) == list(range(1, UPDATES + 1))
    # After update n fairseq logs the rate of the next one.
    expected = closed_form(2, UPDATES + 1)
    assert list(logged.values()) == pytest.approx(expected, rel=1e-5)
    assert logged[WARMUP - 1] == max(logged.values())
    assert logged[WARMUP - 1] == pytest.approx(FACTOR * (DIM * WARMUP) ** -0.5, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "reset scheduler"])
def test_a_resumed_run_goes_on_where_it_was(runs, name):
    assert done(runs[name]) == pytest.approx(runs["whole"]["applied"][4:], rel=1e-12)


@pytest.mark.slow
def test_other_options_count_from_the_first_update_of_a_resumed_run(runs):
    expected = closed_form(5, UPDATES, warmup=3, factor=6.0)
    assert done(runs["other factor"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reset optimizer", "fine-tuned"])
def test_a_run_that_counts_anew_warms_up_anew(runs, name):
    assert done(runs[name]) == pytest.approx(closed_form(1, 6), rel=1e-12)


@pytest.mark.slow
def test_update_freq_counts_updates_not_batches(runs):
    assert done(runs["update-freq"]) == pytest.approx(closed_form(1, 8), rel=1e-12)


@pytest.mark.slow
def test_a_skipped_update_does_not_count(runs):
    assert done(runs["overflow"]) == pytest.approx(closed_form(1, UPDATES), rel=1e-12)
    assert runs["overflow"]["attempts"] == UPDATES + 3
    assert runs["overflow"]["log"].count("gradient overflow detected") == 3


@pytest.mark.slow
def test_with_ema_and_bf16(runs):
    assert done(runs["ema and bf16"]) == pytest.approx(closed_form(1, 6), rel=1e-12)


@pytest.mark.slow
def test_a_cooldown_ends_with_the_training(runs):
    expected = closed_form(1, UPDATES)
    expected[-4:] = [
        rate * share for rate, share in zip(expected[-4:], (0.8, 0.6, 0.4, 0.2), strict=True)
    ]
    assert done(runs["cooldown"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_lstm_has_an_encoder_embedding_too(runs):
    assert done(runs["lstm"]) == pytest.approx(closed_form(1, 6, dim=12), rel=1e-12)


@pytest.mark.slow
def test_speaker_task_has_a_d_model(runs):
    expected = closed_form(1, UPDATES, dim=24, factor=1.0)
    assert done(runs["speaker"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_a_flag_may_repeat_the_dimension_but_not_contradict_it(runs):
    assert done(runs["agrees"]) == pytest.approx(closed_form(1, 2), rel=1e-12)
    assert runs["contradicts"]["refused"].startswith("UserError: --noam-d-model 512 contradicts")
    assert "16" in runs["contradicts"]["refused"] and not runs["contradicts"]["applied"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, said",
    [
        ("lr", f"--noam-factor {0.001 * math.sqrt(DIM * WARMUP):.6g}"),
        ("lrs", "leave --lr out"),
        ("no warm-up", "--warmup-updates 0 must be at least 1"),
    ],
)
def test_refused_by_the_training(runs, name, said):
    assert runs[name]["refused"].startswith("UserError: ") and said in runs[name]["refused"]


@pytest.mark.slow
def test_stop_min_lr_sees_the_rate_of_the_first_update(runs):
    """A schedule that gave 0 before the first update would end any run that sets --stop-min-lr."""
    assert done(runs["stopped"]) == []
    (rate,) = re.findall(r"current learning rate \(([\d.e+-]+)\)", runs["stopped"]["log"])
    assert float(rate) == pytest.approx(closed_form(1, 1)[0], rel=1e-12)
    assert "stopping training because current learning" not in runs["whole"]["log"]


@pytest.mark.slow
def test_with_hydra_and_in_words(bitext, tmp_path):
    """fairseq-hydra-train with `lr_scheduler: {_name: noam}`; a mistake is one sentence there too."""
    (tmp_path / "noam.yaml").write_text(
        json.dumps(
            {
                "common": {
                    "user_dir": str(ROOT / "fairseq_ext"),
                    "cpu": True,
                    "log_format": "json",
                    "log_interval": 1,
                },
                "task": {
                    "_name": "translation",
                    "data": str(bitext),
                    "source_lang": "a",
                    "target_lang": "b",
                    "dataset_impl": "raw",
                },
                "model": {"_name": "transformer_iwslt_de_en", "encoder_embed_dim": 16},
                "criterion": {"_name": "cross_entropy"},
                "dataset": {"batch_size": 4, "num_workers": 0, "disable_validation": True},
                "optimizer": {"_name": "adam"},
                "optimization": {"max_update": 3},
                "lr_scheduler": {"_name": "noam", "warmup_updates": 5},
                "checkpoint": {"no_save": True},
            }
        )
    )
    command = [sys.executable, Path(sys.executable).with_name("fairseq-hydra-train")]
    command += ["--config-dir", tmp_path, "--config-name", "noam", "hydra.run.dir=."]

    def run(*more):
        return processes.run(
            [*map(str, command), *more],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    trained = run()
    assert trained.returncode == 0, trained.stderr[-3000:]
    log = (tmp_path / "hydra_train.log").read_text()
    rates = [float(rate) for rate in re.findall(r'train_inner.*"lr": "([^"]+)"', log)]
    assert rates == pytest.approx(closed_form(2, 4, factor=1.0), rel=1e-5)
    refused = run("optimization.lr=[0.001]")
    assert refused.returncode == 1
    assert "--noam-factor" in refused.stderr and "Traceback" not in refused.stderr
