"""What the engine adds to a training: a schedule's model, the best metric, the questions of a task."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq import trainer
from omegaconf import OmegaConf

from ext_common import engine
from ext_common.cli import UsageError, UserError

engine.apply()


# --- a schedule may ask for the model ----------------------------------------------------------


def test_no_model_outside_a_trainer():
    assert engine.trained_model() is None


def test_the_model_is_known_while_the_optimizer_is_built(monkeypatch):
    seen = []
    model = torch.nn.Linear(2, 2)
    options = Namespace(encoder_embed_dim=8)
    cfg = SimpleNamespace(
        model=options,
        optimization=SimpleNamespace(debug_param_names=False, use_bmuf=False),
        common=SimpleNamespace(fp16=False, bf16=False, amp=False, fp16_no_flatten_grads=False),
        distributed_training=SimpleNamespace(zero_sharding="none"),
        optimizer=None,
        lr_scheduler=None,
    )
    stub = SimpleNamespace(cfg=cfg, model=model, criterion=model, is_fsdp=False, cuda=False)
    stub.optimizer = object()
    monkeypatch.setattr(trainer.optim, "build_optimizer", lambda *args: None)

    def build(cfg, optimizer):
        seen.append(engine.trained_model())
        raise RuntimeError("half-way")

    monkeypatch.setattr(trainer.lr_scheduler, "build_lr_scheduler", build)
    with pytest.raises(RuntimeError, match="half-way"):
        trainer.Trainer._build_optimizer(stub)
    assert seen[0].options is options and seen[0].model is model
    assert engine.trained_model() is None


# --- the task says what the best checkpoint is ---------------------------------------------------


def config(metric="loss", maximize=False, disable_validation=False):
    cfg = OmegaConf.create(
        {
            "checkpoint": {
                "best_checkpoint_metric": metric,
                "maximize_best_checkpoint_metric": maximize,
            },
            "dataset": {"disable_validation": disable_validation},
        }
    )
    OmegaConf.set_struct(cfg, True)
    return cfg


def chosen(cfg, task):
    before = cfg.checkpoint
    engine.choose_best_metric(cfg, task)
    # fairseq_cli.train holds this very object
    assert cfg.checkpoint is before
    return before.best_checkpoint_metric, before.maximize_best_checkpoint_metric


class Judged:
    best_metric = ("bleu", True)


class Undecided:
    @property
    def best_metric(self):
        return None


@pytest.mark.parametrize(
    "typed, cfg, task, expected",
    [
        ([], config(), Judged(), ("bleu", True)),
        ([], config(), Namespace(best_metric=("eer", False)), ("eer", False)),
        ([], config(), object(), ("loss", False)),
        ([], config(), Undecided(), ("loss", False)),
        ([], config("accuracy", True), Judged(), ("accuracy", True)),
        ([], config(disable_validation=True), Judged(), ("loss", False)),
        (["best_checkpoint_metric"], config(), Judged(), ("loss", False)),
    ],
)
def test_the_best_metric_of_the_task_counts_where_none_was_asked_for(
    typed, cfg, task, expected, monkeypatch
):
    monkeypatch.setattr(engine, "given", lambda: frozenset(typed))
    assert chosen(cfg, task) == expected
    if expected[0] == "bleu":
        assert OmegaConf.is_struct(cfg)


JUDGED = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("toy_parts", {path!r})
sys.modules["toy_parts"] = toy = importlib.util.module_from_spec(spec)
from ext_common import engine
from ext_common.cli import UserError
from tests.trainings import read
engine.apply()
spec.loader.exec_module(toy)
from fairseq.tasks import register_task

@register_task("judged_toy", dataclass=toy.ToyTaskConfig)
class JudgedToy(toy.ToyTask):
    # the loss again, and the highest is kept: the worst epoch, which nothing else would choose
    best_metric = ("npscore", True)
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory, new_toy):
    """Flags of the toy task with a best metric of its own."""
    folder = tmp_path_factory.mktemp("judged") / "judged_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text(JUDGED.format(path=str(new_toy().plugin / "toy.py")))
    return ["--user-dir", folder, "--task", "judged_toy", "--batch-size", 3]


def read(path):
    return torch.load(path, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--distributed-world-size", 2]], ids=["one process", "spawned"]
)
def test_best_checkpoint_and_patience_follow_the_task(new_toy, judged, more):
    """The real program: get_valid_stats, save_checkpoint and should_stop_early all see it."""
    toy = new_toy()
    log = toy.train("ck", *judged, "--max-epoch", 6, "--patience", 2, *more)
    assert log.count("the best checkpoint is the one with the highest npscore") == 1
    assert "early stop" in log and "end of epoch 3" in log and "end of epoch 4" not in log
    best = read(toy.folder / "ck" / "checkpoint_best.pt")
    assert best["extra_state"]["train_iterator"]["epoch"] == 2  # written at the end of the first
    assert best["extra_state"]["best"] == best["extra_state"]["val_loss"]
    last = read(toy.folder / "ck" / "checkpoint_last.pt")
    assert last["extra_state"]["val_loss"] < best["extra_state"]["val_loss"]
    assert last["cfg"]["checkpoint"]["best_checkpoint_metric"] == "npscore"


@pytest.mark.slow
def test_the_loss_that_was_asked_for_is_the_loss(new_toy, judged):
    toy = new_toy()
    log = toy.train("ck", *judged, "--max-epoch", 3, "--best-checkpoint-metric", "loss")
    assert "the best checkpoint is" not in log
    best = read(toy.folder / "ck" / "checkpoint_best.pt")
    assert best["extra_state"]["train_iterator"]["epoch"] == 4


# --- a curve that ends with --max-update ----------------------------------------------------------

COSINE = ["--batch-size", 6, "--lr-scheduler", "cosine", "--lr", 0.1]


def test_another_length_of_a_cosine_is_said_with_both_ways(train_here, caplog):
    """After 4 of 8 updates 0.1 (1 + cos π/2) / 2, of 16 updates 0.1 (1 + cos π/4) / 2."""
    train_here("ck", *COSINE, "--max-update", 8, "--max-epoch", 1)
    train_here("ck", *COSINE, "--max-update", 16, "--max-epoch", 1)
    assert (
        "--max-update was 8 and is 16: the learning rate, which --lr-scheduler cosine had brought to 0.05,"
        " is 0.0854 on the new curve"
    ) in caplog.text
    assert "give --lr-scheduler fixed --lr 0.05 --reset-lr-scheduler in place of" in caplog.text


def test_the_end_of_a_cosine_is_told_from_its_restart(train_here, caplog):
    """fairseq's begins anew behind its end, at a tenth: that is not where the training stood."""
    train_here("ck", *COSINE, "--max-update", 4)
    train_here("ck", *COSINE, "--max-update", 5)
    assert "cosine had brought to its end, is 0.00955 on the new curve" in caplog.text
    assert "fixed --lr RATE" in caplog.text


def test_the_other_way_trains_on_at_that_rate(train_here, caplog):
    folder = train_here("ck", *COSINE, "--max-update", 8, "--max-epoch", 1)
    caplog.clear()
    flags = ["--lr-scheduler", "fixed", "--lr", 0.05, "--reset-lr-scheduler", "--max-update", 6]
    train_here("ck", "--batch-size", 6, *flags)
    assert "--max-update was" not in caplog.text
    state = read(folder / "checkpoint_last.pt")
    assert state["last_optimizer_state"]["param_groups"][0]["lr"] == 0.05


@pytest.mark.parametrize("schedule", ["fixed", "inverse_sqrt"])
def test_a_schedule_without_an_end_says_nothing(train_here, caplog, schedule):
    flags = ["--batch-size", 6, "--lr-scheduler", schedule, "--lr", 0.1, "--warmup-updates", 2]
    train_here("ck", *flags, "--max-update", 3)
    train_here("ck", *flags, "--max-update", 4)
    assert "--max-update was" not in caplog.text


def test_a_best_metric_that_means_nothing_any_more_is_forgotten(train_here, monkeypatch, caplog):
    """Without: the best of another unit may never be reached, and checkpoint_best.pt stays an old one."""
    import toy_plugin.toy as toy

    flags = ("--batch-size", 3, "--no-epoch-checkpoints")
    folder = train_here("here", *flags, "--max-epoch", 1)
    first = read(folder / "checkpoint_best.pt")["extra_state"]["best"]
    # a loss that no later one reaches
    state = read(folder / "checkpoint_last.pt")
    state["extra_state"]["best"] = first / 1000
    torch.save(state, folder / "checkpoint_last.pt")
    train_here("here", *flags, "--max-epoch", 2)
    assert read(folder / "checkpoint_best.pt")["extra_state"]["best"] == first
    monkeypatch.setattr(toy.ToyTask, "compare_anew", "losses are of another unit", raising=False)
    train_here("here", *flags, "--max-epoch", 3)
    best = read(folder / "checkpoint_best.pt")
    assert best["optimizer_history"][-1]["num_updates"] == 24
    assert "losses are of another unit: the best checkpoint is chosen anew" in caplog.text


# --- the checkpoint says what it was trained for --------------------------------------------------


def generation(*words):
    from fairseq import options

    return options.parse_args_and_arch(options.get_generation_parser(), list(map(str, words)))


@pytest.fixture
def trained(tmp_path):
    """A file that says it is of translation_spm, with longer sentences than fairseq's 1024."""
    import fairseq_ext.translation.task  # noqa: F401

    task = {"_name": "translation_spm", "max_source_positions": 2048, "max_target_positions": 512}
    path = tmp_path / "checkpoint.pt"
    torch.save({"cfg": {"task": task}, "model": {}}, path)
    return path


def test_a_forgotten_task_is_that_of_the_checkpoint(trained, tmp_path):
    args = generation(tmp_path, "--path", trained)
    assert args.task == "translation_spm" and args.valid_beam == 1
    assert (args.max_source_positions, args.max_target_positions) == (2048, 512)
    args = generation(tmp_path, f"--path={trained}:b.pt", "--max-source-positions", 9)
    assert (args.max_source_positions, args.max_target_positions) == (9, 512)


def test_another_task_than_that_of_the_checkpoint_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match="--task translation is not what .* give --task transl"):
        generation(tmp_path, "--path", trained, "--task", "translation")
    assert generation(tmp_path, "--path", tmp_path / "none.pt").task == "translation"


@pytest.mark.parametrize(
    "theirs, ours, refused",
    [
        (
            "speaker_id",
            "diffusion",
            True,
        ),  # of a plugin that is not loaded here, or of another wing
        ("diffusion", "diffusion", False),
        ("translation", "translation_spm", False),  # fairseq's own, which ours is made from
        (None, "diffusion", False),
    ],
)
def test_a_checkpoint_of_another_wing_is_told_by_its_task(theirs, ours, refused):
    """And not by lists of weights that do not fit."""
    import fairseq_ext.speaker.task  # noqa: F401
    from ext_common.checkpoints import refuse_other_wing

    state = {"cfg": {"task": {"_name": theirs}}}
    if not refused:
        return refuse_other_wing(state, "x.pt", ours, "give another")
    with pytest.raises(
        UserError, match="x.pt is of a training with --task speaker_id, not diffusion"
    ):
        refuse_other_wing(state, "x.pt", ours, "give another")
