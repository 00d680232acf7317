"""The smaller gaps, in this process; nothing here trains."""

import logging
import os
import re
import sys
import types
import warnings
from argparse import Namespace

import pytest
import torch
from omegaconf import OmegaConf

from ext_common import compat, engine
from ext_common.cli import UsageError, UserError
from ext_common.compat.patching import after, before, replace
from ext_common.parallel import in_order
from fairseq_ext.speaker.features import AudioError
from tests import processes

compat.apply()


def plain(x):
    """doc"""
    return x + 1


# --- replacing ----------------------------------------------------------------------------------


def test_replaces_once_and_keeps_attributes():
    owner = types.SimpleNamespace(__name__="owner", plain=plain)
    plain.state = {"kept"}

    def make(original):
        return lambda x: original(x) * 10

    assert replace(owner, "plain", make, ("return x + 1",))
    assert replace(owner, "plain", make, ("return x + 1",))
    assert owner.plain(1) == 20
    assert owner.plain.state == {"kept"} and owner.plain.__doc__ == "doc"


def test_two_remedies_stack_in_one_place():
    owner = types.SimpleNamespace(__name__="owner", plain=plain)

    def first(original):
        return lambda x: original(x) * 10

    def second(original):
        return lambda x: original(x) + 5

    for make in (first, second, first, second):
        replace(owner, "plain", make, ("return x + 1",))
    assert owner.plain(1) == 25
    assert owner.plain.__wrapped__ is plain


def test_before_and_after_see_the_arguments_and_leave_the_result():
    owner = types.SimpleNamespace(__name__="owner", plain=plain)
    seen = []

    def first(x):
        seen.append(("before", x))

    def last(result, x):
        seen.append(("after", result, x))

    for _ in range(2):
        before(owner, "plain", first, ("return x + 1",))
        after(owner, "plain", last, ("return x + 1",))
    assert owner.plain(1) == 2
    assert seen == [("before", 1), ("after", 2, 1)]


def test_what_both_rooms_say_of_a_function_is_in_one_wrapper():
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    engine.apply()
    for function, says in (
        (Trainer.__init__, ("refuse_fp16", "refuse_apart", "choose")),
        (Trainer.load_checkpoint, ("resume_from_whole_checkpoints", "note_what_is_resumed")),
        (checkpoint_utils.load_checkpoint_to_cpu, ("explain_unreadable", "_ask_the_task")),
    ):
        assert not hasattr(function.__wrapped__, "__wrapped__")
        names = function.__ext_common_compat__.names
        assert all(any(word in name for name in names) for word in says), names


def test_leaves_what_it_does_not_know_with_a_warning():
    owner = types.SimpleNamespace(__name__="owner", plain=plain, missing=None)
    with pytest.warns(RuntimeWarning, match=r"owner\.plain"):
        assert not replace(owner, "plain", lambda original: None, ("return x + 2",))
    assert owner.plain is plain
    with pytest.warns(RuntimeWarning, match=r"owner\.gone"):
        assert not replace(owner, "gone", lambda original: None)


def test_static_methods_stay_static():
    class Owner:
        @staticmethod
        def double(x):
            return x * 2

    replace(Owner, "double", lambda original: lambda x: original(x) + 1, ("x * 2",))
    assert Owner.double(3) == 7 == Owner().double(3)


def test_every_gap_finds_fairseq_as_expected_and_applying_again_changes_nothing(monkeypatch):
    from fairseq import checkpoint_utils, trainer, utils
    from fairseq.distributed import utils as distributed_utils

    def patched():
        return (
            checkpoint_utils.load_checkpoint_to_cpu,
            checkpoint_utils.save_checkpoint,
            distributed_utils.call_main,
            trainer.Trainer.__init__,
            utils.import_user_module,
            sys.excepthook,
        )

    before = patched()
    monkeypatch.setattr(compat, "_applied", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compat.apply()
    assert patched() == before


def gaps():
    """(name, function) of every gap there is."""
    from ext_common.compat import checkpoints, launchers, messages, processes, resume, training

    rooms = (messages, checkpoints, launchers, processes, resume, training)
    return [gap for room in rooms for gap in room.GAPS]


# What is not fairseq's: torch's list of safe globals, Python's warnings and its excepthook.
OUTSIDE = {
    "allow_what_checkpoints_hold",
    "leave_out_harmless_warnings",
    "tell_mistakes_in_one_sentence",
}


@pytest.mark.parametrize("gap", gaps(), ids=lambda gap: gap.__name__)
def test_every_gap_states_symptom_thread_and_guard(gap, monkeypatch):
    from ext_common.compat import patching

    text = " ".join(gap.__doc__.split())
    assert text.startswith("Symptom: ") and re.search(r" Thread: \S", text), gap.__name__
    looked_for = []
    monkeypatch.setattr(
        patching, "_looks_like", lambda function, expects: bool(looked_for.append(expects))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        undo_marks(monkeypatch)
        gap()
    assert bool(looked_for and all(looked_for)) == (gap.__name__ not in OUTSIDE)


def undo_marks(monkeypatch):
    """Make fairseq look as if nothing were replaced yet, so that a gap asks for its guard again."""
    import argparse

    from fairseq import options
    from fairseq.models import distributed_fairseq_model
    from hydra.core.utils import JobReturn
    from torch.nn.parallel import DistributedDataParallel

    from ext_common.compat import patching

    monkeypatch.setattr(patching, "_LAYERS", "__nothing__")
    monkeypatch.setattr(options, "argparse", argparse)
    monkeypatch.setattr(
        distributed_fairseq_model, "DistributedDataParallel", DistributedDataParallel
    )
    plain = property(lambda self: None, JobReturn.return_value.fset)
    monkeypatch.setattr(JobReturn, "return_value", plain)


def test_importing_says_nothing():
    code = "import ext_common.compat, ext_common.compat.messages"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code"), [("UserError('no x in y')", 1), ("UsageError('no x in y')", 2)]
)
def test_mistakes_are_one_sentence(raised, code):
    done = _raise(raised)
    assert (done.returncode, done.stderr) == (code, "error: no x in y\n")


def test_bugs_keep_their_traceback():
    done = _raise("ZeroDivisionError('bug')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError: bug" in done.stderr


class _Failing(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (UserError("no x in y: give z"), UserError),
        (UsageError("no x in y: give z"), UsageError),
        (AudioError("empty", "no x in y: give z"), UserError),
    ],
)
def test_mistakes_of_workers_are_one_sentence(raised, kind):
    with pytest.raises(UserError) as caught:
        next(iter(torch.utils.data.DataLoader(_Failing(raised), num_workers=1)))
    assert str(caught.value) == "no x in y: give z" and type(caught.value) is kind
    with pytest.raises(ZeroDivisionError, match="(?s)Original Traceback.*in __getitem__"):
        next(iter(torch.utils.data.DataLoader(_Failing(ZeroDivisionError()), num_workers=1)))


def _fail(error):
    raise error


@pytest.mark.parametrize(
    "raised", [UsageError("no x: give z"), AudioError("empty", "no x: give z")]
)
def test_mistakes_of_pools_are_one_sentence(raised):
    with pytest.raises(type(raised)) as caught:
        list(in_order(_fail, [raised], workers=2))
    assert str(caught.value) == "no x: give z" and vars(caught.value) == vars(raised)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--max-updat 3", "unknown argument '--max-updat': did you mean '--max-update'?"),
        ("--seed one", "argument --seed: invalid int value: 'one'"),
        ("--task spaeker_id", "argument --task: invalid choice: 'spaeker_id'"),
    ],
)
def test_mistyped_flags_are_one_sentence(flags, words, monkeypatch, capsys):
    from fairseq import options

    compat.apply()
    arguments = ["fairseq-train", "data", "--arch", "transformer", *flags.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        options.parse_args_and_arch(options.get_training_parser())
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert said.err.startswith(f"error: {words}") and said.err.count("\n") == 1
    assert isinstance(options.get_training_parser(), options.argparse.ArgumentParser)


def _raise(what):
    code = (
        "from ext_common.cli import UserError, UsageError\n"
        "from ext_common.compat.messages import tell_mistakes_in_one_sentence as tell\n"
        f"tell(); tell(); raise {what}"
    )
    return processes.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_only_known_warnings_are_left_out():
    from ext_common.compat.messages import leave_out_harmless_warnings

    known = "`torch.cuda.amp.autocast(args...)` is deprecated. Please use `torch.amp.autocast('cpu"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        leave_out_harmless_warnings()
        warnings.warn(known, FutureWarning, stacklevel=1)
        warnings.warn(known, UserWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [(w.category, str(w.message)[:5]) for w in seen] == [
        (UserWarning, known[:5]),
        (FutureWarning, "somet"),
    ]


def test_only_known_log_lines_are_left_out(caplog):
    logger = logging.getLogger("fairseq.tasks.fairseq_task")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("reuse_dataloader = True")
        logger.info("creating new batches for epoch 1")
    assert caplog.messages == ["creating new batches for epoch 1"]


def test_a_missing_package_is_said_once(caplog):
    logger = logging.getLogger("fairseq.logging.progress_bar")
    for _ in range(3):
        logger.warning("tensorboard not found, please install with: pip install tensorboard")
        logger.warning("other")
    assert sum("tensorboard" in text for text in caplog.messages) <= 1
    assert caplog.messages.count("other") == 3


# --- training -----------------------------------------------------------------------------------


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inversion = torch.nn.Linear(2, 2, bias=False)
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("version", torch.tensor([3.0]))


@pytest.mark.parametrize("fp32", [False, True])
def test_ema_is_the_closed_form_for_every_parameter(fp32):
    from fairseq.models.ema.ema import EMA

    model = Odd()
    config = Namespace(
        ema_decay=0.75, ema_seed_model=None, ema_fp32=fp32, ema_start_update=0, ema_update_freq=1
    )
    averaged = EMA(model, config)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 4):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(step)
        averaged.step(model, step)
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name != "version":
                expected[name] = 0.75 * expected[name] + 0.25 * value
    expected["norm.num_batches_tracked"] = model.norm.num_batches_tracked
    for name, value in averaged.get_model().state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(("flags", "tpu"), [(["--bf16"], False), (["--bf16", "--tpu"], True)])
def test_bf16_means_a_tpu_only_when_asked(toy_registered, tmp_path, flags, tpu, monkeypatch):
    from fairseq import options

    from ext_common.compat import training

    typed = frozenset(flag.lstrip("-") for flag in flags)
    monkeypatch.setattr(training, "given", lambda: typed)
    argv = [str(tmp_path), "--task", "toy", "--arch", "toy_model", "--criterion", "toy_mse"]
    args = options.parse_args_and_arch(
        options.get_training_parser(), [*argv, "--optimizer", "adam", *flags]
    )
    assert (args.bf16, args.tpu) == (True, tpu)


def test_amp_divides_gradients_by_the_loss_scale_once():
    """With fairseq's own SGD and torch's scaler, on CPU: w − lr g, whatever the scale."""
    from fairseq.optim.amp_optimizer import AMPOptimizer
    from fairseq.optim.sgd import SGD

    weight = torch.nn.Parameter(torch.ones(3))
    sgd = SGD(Namespace(lr=[0.5], momentum=0.0, weight_decay=0.0), [weight])
    common = {"fp16_init_scale": 128, "min_loss_scale": 1e-4}
    optimizer = AMPOptimizer(OmegaConf.create({"common": common, "optimizer": {}}), [weight], sgd)
    optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    optimizer.backward((weight * torch.tensor([1.0, 2.0, 0.5])).sum())
    optimizer.clip_grad_norm(0.0)
    optimizer.step()
    assert weight.tolist() == [0.5, 0.0, 0.75]


def test_fairseqs_own_average_takes_the_retry_of_an_overflow(train_here, monkeypatch):
    """--amp --store-ema: it has not the fault of averaging the attempt that was skipped."""
    from fairseq.models.ema.ema import EMA
    from fairseq.optim.amp_optimizer import AMPOptimizer

    init, clip, step = AMPOptimizer.__init__, AMPOptimizer.clip_grad_norm, EMA.step
    attempts, averaged = [], []

    def with_a_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128.0)

    def overflow_once(self, *args, **kwargs):
        attempts.append(1)
        if len(attempts) == 2:
            self.optimizer.param_groups[0]["params"][0].grad[0] = torch.inf
        return clip(self, *args, **kwargs)

    def recorded(self, model, updates=None):
        before = model.last.bias.item()
        step(self, model, updates)
        averaged.append((updates, before))

    monkeypatch.setattr(AMPOptimizer, "__init__", with_a_scaler)
    monkeypatch.setattr(AMPOptimizer, "clip_grad_norm", overflow_once)
    monkeypatch.setattr(EMA, "step", recorded)
    train_here("ck", "--batch-size", 3, "--max-update", 3, "--amp", "--store-ema")
    assert len(attempts) == 4 and [updates for updates, _ in averaged] == [1, 2, 3]
    assert len({weight for _, weight in averaged}) == 3


def test_fp16_on_cpu_is_refused_in_words():
    from fairseq.trainer import Trainer

    cfg = OmegaConf.create({"common": {"fp16": True, "cpu": True, "tpu": False}})
    with pytest.raises(UserError, match="--fp16 needs a GPU: use --bf16"):
        Trainer(cfg, None, None, None)


def test_a_fork_leaves_its_parents_loader_workers_alone():
    loader = torch.utils.data.DataLoader([1, 2, 3], num_workers=1)
    iterator = iter(loader)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # What the garbage collector of a worker does with what it inherited.
            iterator.__del__()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [int(batch) for batch in iterator] == [1, 2, 3]


def test_log_file_gets_each_line_once(tmp_path):
    from fairseq.logging import progress_bar

    path = tmp_path / "log"
    before = list(progress_bar.logger.handlers)
    try:
        for epoch in (1, 2, 3):
            progress_bar.progress_bar([], log_format="none", log_file=str(path), epoch=epoch)
        progress_bar.progress_bar([], log_format="none", log_file=str(tmp_path / "other"))
        progress_bar.logger.error("a line")
    finally:
        for handler in set(progress_bar.logger.handlers) - set(before):
            progress_bar.logger.removeHandler(handler)
            handler.close()
    assert path.read_text() == "a line\n" == (tmp_path / "other").read_text()


def test_missing_data_folder_is_named(tmp_path):
    from fairseq.data import data_utils

    dataset = {
        "ignore_unused_valid_subsets": False,
        "combine_valid_subsets": False,
        "disable_validation": False,
        "valid_subset": "valid",
    }
    missing = tmp_path / "nowhere"
    cfg = OmegaConf.create({"dataset": dataset, "task": {"data": str(missing)}})
    with pytest.raises(UserError, match=str(missing)):
        data_utils.raise_if_valid_subsets_unintentionally_ignored(cfg)
    missing.mkdir()
    data_utils.raise_if_valid_subsets_unintentionally_ignored(cfg)


def test_unknown_best_metric_names_the_known_ones(monkeypatch):
    from fairseq import checkpoint_utils
    from fairseq_cli import train

    from ext_common.compat import training

    training.name_the_metrics_there_are()
    cfg = OmegaConf.create(
        {
            "checkpoint": {
                "best_checkpoint_metric": "eer",
                "maximize_best_checkpoint_metric": False,
            }
        }
    )
    trainer = Namespace(get_num_updates=lambda: 7)
    monkeypatch.setattr(checkpoint_utils.save_checkpoint, "best", 0.5, raising=False)
    stats = train.get_valid_stats(cfg, trainer, {"loss": 1.0, "accuracy": 2.0, "wps": 0}, True)
    with pytest.raises(UserError, match=r"eer .*: choose one of accuracy, loss$"):
        stats["eer"]
    # Added by a task's post_validate: known from then on.
    stats["eer"] = 0.1
    assert stats["eer"] == 0.1
    cfg.checkpoint.best_checkpoint_metric = "loss"
    assert train.get_valid_stats(cfg, trainer, {"loss": 1.0}, True)["best_loss"] == 0.5


def test_state_of_a_run_does_not_reach_the_next():
    from fairseq import checkpoint_utils
    from fairseq_cli import train

    checkpoint_utils.save_checkpoint.best = train.should_stop_early.best = 0.5
    with pytest.raises(AttributeError):
        checkpoint_utils.load_checkpoint(None, None)
    assert not hasattr(checkpoint_utils.save_checkpoint, "best")
    assert not hasattr(train.should_stop_early, "best")
