"""What a GPU would have shown, shown without one.

Tensors on "meta" hold no numbers, so that whoever asks a device for one fails; and what is asked is counted.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("fairseq")

from types import SimpleNamespace

from fairseq import trainer
from fairseq.logging import metrics

from diffusion_ext.augment import build_augmentations
from diffusion_ext.evaluate import extractors
from ext_common import devices, engine
from ext_common.cli import UserError
from ext_common.registry import Registry
from fairseq_ext.speaker.criterion import SpeakerCriterion
from fairseq_ext.speaker.kernels import DepthwiseConv
from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork

ASKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


class Counted(TorchDispatchMode):
    """Notes the operations that a device is waited for, and the inputs of convolutions."""

    def __init__(self):
        super().__init__()
        self.asked, self.convolved = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name in ASKS:
            self.asked.append(name)
        if name == "aten::convolution":
            self.convolved.append(args[0])
        return func(*args, **(kwargs or {}))


class Half(torch.nn.Module):
    self_condition = True

    def forward(self, x, t, label=None, x0=None, condition=None, average=None):
        return x / 2


def test_the_diffusion_criterion_asks_its_device_for_nothing(build):
    """No id, no timestep, no loss: a step's kernels are queued while the one before still computes."""
    jitter = [0.5, 0.5, 0.5, 0.1]
    made = build({"class_labels": True, "hflip": 0.5, "color_jitter": jitter})
    sample = {
        "id": torch.arange(4, device="meta"),
        "image": torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta"),
        "label": torch.zeros(4, dtype=torch.int64, device="meta"),
    }
    for training in (True, False):
        for update in range(4):  # with and without a guess of its own
            made.criterion.train(training).set_num_updates(update)
            loss, _, log = made.criterion(Half(), sample)
            assert loss.is_meta and log["mse"].is_meta


def test_the_jitter_picks_no_rows():
    x, steps = torch.rand(5, 3, 4, 4) * 2 - 1, build_augmentations("color_jitter")
    with Counted() as counted:
        steps(x, torch.rand(5, 6))
    assert not counted.asked


@pytest.mark.parametrize("job", ["diffusion", "speaker"])
def test_what_is_logged_of_an_update_is_fetched_at_once(build, job):
    keys = ["loss", "mse", *(f"{kind}_{q}" for kind in ("sum", "count") for q in range(1, 5))]
    keys += ["correct", "correct5", "margin_sum"]
    logs = [
        {key: torch.tensor(n + 0.1) for n, key in enumerate(keys, k)} | {"sample_size": 3 * k}
        for k in (1, 2)
    ]
    criterion = build().criterion if job == "diffusion" else SpeakerCriterion
    with metrics.aggregate(new_root=True) as found, Counted() as counted:
        criterion.reduce_metrics(logs)
    assert not counted.asked
    assert float(found["loss"].avg) == pytest.approx((1.1 + 2.1) / 9, rel=1e-6)


def test_sums_are_those_of_each_key():
    logs = [{"a": torch.tensor(0.1), "n": 2}, {"a": torch.tensor(0.2), "n": 3, "b": 1.5}]
    found = devices.sums(logs)
    assert found == {"a": float(torch.tensor(0.1) + torch.tensor(0.2)), "n": 5, "b": 1.5}
    assert found["no such key"] == 0 and devices.sums([]) == {}


OPTIONS = NetworkOptions(
    d_model=8, nhead=2, d_ffn=8, layers=1, kernel_size=3, embedding_dim=4, front_end="linear"
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_and_their_statistics_are_not_rounded(dtype):
    """-11.3 ± 0.3 is -11.3125 ± 0.25 in bfloat16: four fifths of a deviation of a quiet band."""
    network = SpeakerNetwork(OPTIONS, 5, 3)
    network.feature_mean.fill_(-11.3)
    network.feature_std.fill_(0.3)
    x = -11.3 + 0.3 * torch.linspace(-2, 2, 35).view(1, 7, 5)
    exact = (x - network.feature_mean) / network.feature_std
    seen = []
    network.to(dtype).input.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert network.feature_mean.dtype == network.feature_std.dtype == torch.float32
    assert float(network.feature_std[0]) == float(torch.tensor(0.3))
    network.eval()(x)
    assert torch.equal(seen[0], exact.to(dtype))
    # other moves are as ever
    assert network.double().feature_mean.dtype == torch.float64
    assert SpeakerNetwork(OPTIONS, 5, 3).to("meta").half().feature_mean.is_meta


def test_a_task_says_that_its_inputs_stay_exact():
    """fairseq rounds every float32 tensor of a sample under --bf16."""
    engine.apply()
    common, sample = SimpleNamespace(fp16=False, bf16=True), {"x": torch.tensor([0.3])}
    for exact, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        fake = SimpleNamespace(
            task=SimpleNamespace(exact_inputs=exact), cfg=SimpleNamespace(common=common)
        )
        assert trainer.Trainer._fp_convert_sample(fake, sample)["x"].dtype == dtype


def test_the_layout_of_cpus_is_that_of_cpus():
    """C innermost and a height of 1 are quick there; a GPU gets (B, C, T) with time innermost."""
    convolution = DepthwiseConv(4, 3)
    shapes = {}
    for device in ("cpu", "meta"):
        frames = torch.ones(2, 9, 4, device=device)
        with torch.no_grad(), Counted() as counted:
            found = convolution.eval().to(device)(frames.transpose(1, 2).unsqueeze(2))
        assert found.shape == (2, 4, 1, 9)
        (shapes[device],) = counted.convolved
    assert shapes["cpu"].shape == (2, 4, 1, 9) and shapes["cpu"].stride()[1] == 1
    assert shapes["meta"].shape == (2, 4, 9) and shapes["meta"].is_contiguous()


class TestOneStopsAll:
    def trainer(self, said, ranks=1, rank=0):
        criterion = SimpleNamespace(why_stop=lambda: said)
        return SimpleNamespace(
            get_criterion=lambda: criterion,
            data_parallel_world_size=ranks,
            is_data_parallel_master=rank == 0,
            optimizer=SimpleNamespace(clip_grad_norm=lambda *_, **__: torch.tensor(torch.nan)),
            is_fsdp=False,
        )

    def test_alone_it_is_an_error_in_words(self):
        engine.apply()
        with pytest.raises(UserError, match="^a loss$"):
            trainer.Trainer.clip_grad_norm(self.trainer("a loss"), 1.0)
        assert trainer.Trainer.clip_grad_norm(self.trainer(None), 1.0).isnan()

    def test_nothing_is_asked_where_the_gradients_are_numbers(self):
        engine.apply()
        fine = self.trainer("a loss")
        fine.optimizer.clip_grad_norm = lambda *_, **__: torch.tensor(2.0)
        assert trainer.Trainer.clip_grad_norm(fine, 1.0) == 2

    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_others_say_nothing_and_end_too(self, monkeypatch, capsys, rank):
        """Whichever saw it; the first has spoken before any is gone."""
        order = []

        def gather(every, own):
            assert own is None
            every[:] = [None, "a loss"]

        monkeypatch.setattr(devices.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(devices.dist, "all_gather_object", gather)
        monkeypatch.setattr(devices.dist, "barrier", lambda: order.append(capsys.readouterr().err))
        with pytest.raises(SystemExit) as ended:
            devices.stop_together(self.trainer(None, 2, rank))
        assert ended.value.code == 1
        assert order == (["error: a loss\n"] if rank == 0 else [""])


class TestSettled:
    def settle(self, **task):
        model = torch.nn.Linear(2, 2)
        names, x = list(model.state_dict()), torch.ones(1, 2)
        before = model(x)
        devices.settle(None, SimpleNamespace(task=SimpleNamespace(**task)), None, model)
        assert list(model.state_dict()) == names and torch.equal(model(x), before)
        return model

    def test_compiled_it_keeps_the_names_of_its_weights(self):
        assert self.settle(compile="eager")._compiled_call_impl is not None
        assert self.settle()._compiled_call_impl is None
        with pytest.raises(UserError, match="--compile inductr is unknown: known are .*inductor"):
            self.settle(compile="inductr")

    def test_deterministic(self, monkeypatch):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        try:
            self.settle(deterministic=True)
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        finally:
            torch.use_deterministic_algorithms(False)
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_extractors_compute_where_they_are_told():
    """Those that say that they can; a network of one's own entry need not."""
    seen = []

    def without(reals, cache):
        seen.append(None)

    def with_one(reals, cache, device="cpu"):
        seen.append(device)

    fresh = Registry("feature extractor")
    fresh.register("without")(without)
    fresh.register("with")(with_one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "EXTRACTORS", fresh)
        for name in ("without", "with"):
            extractors.build_extractor(name, None, None, "meta")
    assert seen == [None, "meta"]
