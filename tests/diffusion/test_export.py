import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from diffusion_ext.denoiser import Denoiser
from diffusion_ext.export import counterpart
from diffusion_ext.export.__main__ import (
    FORMATS,
    TOLERANCE,
    Probe,
    largest_difference,
    main,
    probe_of,
)
from diffusion_ext.export.exported import load_exported, read_config, write_exported
from diffusion_ext.samplers import ddpm, trajectory
from diffusion_ext.schedules import NoiseSchedule, build_schedule
from diffusion_ext.unet import UNet, UNetOptions, divisor
from ext_common import cli
from ext_common.cli import UserError
from tests import processes

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

LINEAR = build_schedule("linear", 1000)


def randomised(net, seed=1):
    """Every weight moved, also those that begin at 0 and would hide what stands before them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            scale = 0.5 / math.sqrt(weight[0].numel())
            weight.add_(torch.randn(weight.shape, generator=draw) * scale)
    return net.eval().requires_grad_(False)


def tiny(channels=1, height=8, n_classes=0, condition_size=0, out=1, ins=1, **options):
    options = {
        "base_channels": 8,
        "channel_mults": [1, 2],
        "blocks": 1,
        "head_channels": 8,
    } | options
    sizes = (channels * ins, channels * out, height, n_classes, condition_size)
    return randomised(UNet(UNetOptions(**options), *sizes))


def probe(net, height, width, schedule=LINEAR):
    return probe_of(net, SimpleNamespace(shape=(None, height, width), schedule=schedule))


def unet2d(net, height, width):
    """UNet2DModel with the weights of ours, as a function of x, t and label."""
    made = diffusers.UNet2DModel(**counterpart.unet2d_options(net, height, width))
    made.load_state_dict(counterpart.unet2d_weights(net.state_dict()))
    return lambda x, t, label: made.eval()(x, t, label).sample


class TestParity:
    """Our U-Net and UNet2DModel with the same weights are the same function."""

    @given(
        base=st.sampled_from([4, 8, 12, 32]),
        mults=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
        blocks=st.integers(1, 2),
        attends=st.sets(st.integers(0, 3)),
        one_head=st.booleans(),
        scale_shift=st.booleans(),
        n_classes=st.sampled_from([0, 1, 5]),
        condition_size=st.sampled_from([0, 9]),
        channels=st.sampled_from([1, 3]),
        cells=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    )
    @example(32, [1, 2, 2], 2, {1}, False, False, 0, 0, 3, (1, 1))
    @example(8, [2, 1, 3], 1, {0, 1, 2}, False, True, 5, 9, 1, (1, 2))
    @example(12, [1, 3], 2, set(), True, True, 1, 0, 3, (2, 1))
    @hypothesis_settings(max_examples=25)
    def test_any_architecture(
        self,
        base,
        mults,
        blocks,
        attends,
        one_head,
        scale_shift,
        n_classes,
        condition_size,
        channels,
        cells,
    ):
        options = UNetOptions(
            base_channels=base,
            channel_mults=mults,
            blocks=blocks,
            head_channels=10_000 if one_head else base // 2,
            scale_shift=scale_shift,
        )
        height, width = (n * divisor(options) for n in cells)
        options.attention_resolutions = [height >> level for level in attends]
        net = randomised(UNet(options, channels, channels, height, n_classes, condition_size))
        assert not counterpart.unsupported(net, channels, "v")
        inputs = probe(net, height, width)
        assert net(*inputs).abs().max() > 0.01
        assert largest_difference(net, unet2d(net, height, width), inputs) < 1e-5

    def test_no_condition_is_condition_zero(self):
        net = tiny(condition_size=9)
        x, t, label = probe(net, 8, 8)
        assert torch.equal(net(x, t, label), net(x, t, label, torch.zeros(len(x), 9)))
        assert not torch.equal(net(x, t, label), net(x, t, label, torch.ones(len(x), 9)))

    def test_probe_sees_every_weight(self):
        net = tiny(n_classes=3)
        theirs, inputs = unet2d(net, 8, 8), probe(net, 8, 8)
        expected = theirs(*inputs)
        assert largest_difference(net, theirs, inputs) < TOLERANCE
        for name, weight in net.named_parameters():
            # softmax does not change by what all keys have in common
            if not name.endswith("key.bias"):
                weight.mul_(1.5)
                assert largest_difference(net, lambda *_: expected, inputs) > TOLERANCE, name
                weight.div_(1.5)

    def test_difference(self):
        def constant(value):
            return lambda x, t, label: x * value

        inputs = Probe(torch.tensor([1.0, -2.0]), torch.zeros(2), None)
        assert largest_difference(constant(1), constant(1.25), inputs) == 0.25
        assert largest_difference(constant(0), constant(0), inputs) == 0
        assert largest_difference(constant(0), constant(1), inputs) == math.inf
        assert math.isnan(largest_difference(constant(1), constant(math.nan), inputs))

    @pytest.mark.parametrize(
        "options, reason",
        [
            (dict(ins=2), "--self-condition"),
            (dict(out=2), "--learned-variance"),
            (
                dict(channel_mults=[1, 4], head_channels=16, attention_resolutions=[8]),
                "are 8 and 16 channels wide",
            ),
        ],
    )
    def test_unsupported(self, options, reason):
        (found,) = counterpart.unsupported(tiny(**options), 1, "v")
        assert reason in found

    def test_unknown_objective(self):
        (found,) = counterpart.unsupported(tiny(), 1, "score")
        assert "'score'" in found


class TestScheduler:
    """DDPMPipeline, read from disk, draws what our sampler ddpm draws from the same noise."""

    @pytest.mark.parametrize("steps", [5, 20])
    @pytest.mark.parametrize(
        "schedule, objective, zero",
        [
            ("linear", "eps", False),
            ("cosine", "x0", False),
            ("sigmoid", "v", False),
            ("sigmoid", "v", True),
            ("cosine", "x0", True),
        ],
    )
    def test_same_images(self, tmp_path, schedule, objective, zero, steps):
        table = build_schedule(schedule, 20, zero)
        net = tiny(channels=3)
        net.conv_out.weight.mul_(5)
        counterpart.write_pipeline(tmp_path, net, (8, 16), table, objective)
        pipeline = counterpart.read_pipeline(tmp_path)
        pipeline.set_progress_bar_config(disable=True)
        counterpart.check_table(table, pipeline.scheduler.alphas_cumprod)
        theirs = pipeline(
            batch_size=2,
            generator=torch.Generator().manual_seed(3),
            num_inference_steps=steps,
            output_type="np",
        ).images

        draw = torch.Generator().manual_seed(3)
        path = trajectory(table, steps)
        assert pipeline.scheduler.timesteps.tolist() == [now.timestep for _, now, _ in path.steps]
        shape = (2, 3, 8, 16)
        start = torch.randn(shape, generator=draw)
        denoise = Denoiser(lambda x, t, label, x0: net(x, t, label), table, objective)
        ours = ddpm(denoise, start, path, lambda i: torch.randn(shape, generator=draw))
        ours = (ours / 2 + 0.5).clamp(0, 1)
        assert 0.1 < float(ours.std())
        theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)

    def test_schedule_beyond_float32(self):
        betas = torch.tensor([1e-9, 0.1, 0.5], dtype=torch.float64)
        schedule = NoiseSchedule.from_betas(betas)
        options = counterpart.scheduler_options(schedule, "v")
        scheduler = diffusers.DDPMScheduler(**options)
        with pytest.raises(UserError, match="at timestep 0 are off by 100%.*--format safetensors"):
            counterpart.check_table(schedule, scheduler.alphas_cumprod)

    @pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
    @pytest.mark.parametrize("timesteps", [10, 100, 1000, 4000])
    @pytest.mark.parametrize("zero", [False, True])
    def test_schedules_survive(self, name, timesteps, zero):
        schedule = build_schedule(name, timesteps, zero)
        options = counterpart.scheduler_options(schedule, "v")
        counterpart.check_table(schedule, diffusers.DDPMScheduler(**options).alphas_cumprod)


SPEC = {"height": 8, "width": 16, "channels": 1, "classes": ["a", "b"]}


class TestSafetensors:
    @pytest.fixture
    def written(self, tmp_path):
        net = tiny(n_classes=2, condition_size=9, ins=2, out=2, scale_shift=True)
        write_exported(tmp_path, net, SPEC, build_schedule("cosine", 50, True), "v")
        return tmp_path, net

    def test_network(self, written):
        folder, net = written
        read = load_exported(folder)
        assert not read.training
        for name, weight in net.state_dict().items():
            assert torch.equal(read.state_dict()[name], weight), name
        assert largest_difference(net, read, probe(net, 8, 16)) == 0
        x, t, label = probe(net, 8, 16)
        condition = torch.ones(len(x), 9)
        assert torch.equal(read(x, t, label, condition), net(x, t, label, condition))

    def test_config(self, written):
        config = read_config(written[0])
        assert config.items() >= SPEC.items()
        assert config["objective"] == "v" and config["timesteps"] == 50
        assert config["self_condition"] and config["learned_variance"]
        schedule = NoiseSchedule.from_betas(torch.tensor(config["betas"], dtype=torch.float64))
        expected = build_schedule("cosine", 50, True).alphas_cumprod
        torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-12, atol=0)
        assert schedule.ends_in_noise

    def test_damage(self, written, tmp_path):
        folder, _ = written
        with pytest.raises(UserError, match="config.json does not exist: give a folder"):
            load_exported(tmp_path / "nothing")
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:1000])
        with pytest.raises(UserError, match="does not hold the weights"):
            load_exported(folder)
        weights.unlink()
        with pytest.raises(UserError, match="model.safetensors does not exist"):
            load_exported(folder)
        config = read_config(folder)
        config["network"]["blocks"] = 2
        (folder / "config.json").write_text(json.dumps(config))
        weights.write_bytes(whole)
        with pytest.raises(UserError, match="does not hold the weights"):
            load_exported(folder)
        for text, reason in (("{", "damaged"), ("[]", "not written by"), ("{}", "not written by")):
            (folder / "config.json").write_text(text)
            with pytest.raises(UserError, match=reason):
                load_exported(folder)


@pytest.fixture
def variant(tiny_checkpoint, tmp_path):
    """make(classes=[…], condition_size=9, self_condition=True, …) → checkpoint of such a model."""

    def make(classes=(), condition_size=0, **options):
        from omegaconf import OmegaConf

        from diffusion_ext.inference import read_checkpoint
        from diffusion_ext.model import DdpmUNet

        state = read_checkpoint(tiny_checkpoint)
        state["task_state"]["spec"] |= {"classes": list(classes), "condition_size": condition_size}
        state["cfg"]["model"] |= options
        cfg = OmegaConf.create(state["cfg"]["model"])
        task = SimpleNamespace(spec=state["task_state"]["spec"])
        model = randomised(DdpmUNet.build_model(cfg, task))
        # an average that is not the weights themselves
        model.ema.weights.copy_(torch.cat([p.flatten() for p in model.net.parameters()]) * 1.1)
        state["model"] = model.state_dict()
        path = tmp_path / "variant.pt"
        torch.save(state, path)
        return path

    return make


def run(*args):
    command = [sys.executable, "-m", "diffusion_ext.export", *map(str, args)]
    return processes.run(command, capture_output=True, text=True)


def export(*args):
    main(list(map(str, args)))


def weights_of(checkpoint, average):
    from diffusion_ext.inference import DiffusionModel

    model = DiffusionModel.from_checkpoint(checkpoint, "cpu").model
    weights = dict(model.net.named_parameters()) if average is None else model.ema.of(average)
    return {name: weight.detach().clone() for name, weight in weights.items()}


class TestCommand:
    @pytest.mark.slow
    def test_diffusers(self, tiny_checkpoint, tmp_path):
        out = tmp_path / "new" / "digits"
        done = run(tiny_checkpoint, out, "--format", "diffusers")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout.startswith(
            f"{out}: read back, its outputs differ from the model's by at most "
        )
        assert [path.name for path in out.parent.iterdir()] == ["digits"]
        pipeline = counterpart.read_pipeline(out)
        assert pipeline.unet.config.sample_size == 16
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
        assert len(pipeline.scheduler.betas) == 1000
        expected = counterpart.unet2d_weights(weights_of(tiny_checkpoint, 0))
        for name, weight in pipeline.unet.state_dict().items():
            assert torch.equal(weight, expected[name]), name
        manifest = json.loads((out / "manifest.json").read_text())
        assert 0 <= manifest["parity"]["difference"] < 1e-5
        assert manifest["counts"]["weights"] == manifest["counts"]["written"] == 71033
        assert manifest["packages"].keys() == {"diffusers", "safetensors"}

    def test_safetensors_of_the_weights_themselves(self, tiny_checkpoint, tmp_path, capsys):
        export(tiny_checkpoint, tmp_path / "out", "--format", "safetensors", "--ema", "-1")
        assert "differ from the model's by at most 0.0e+00" in capsys.readouterr().out
        read = load_exported(tmp_path / "out").state_dict()
        expected, averages = weights_of(tiny_checkpoint, None), weights_of(tiny_checkpoint, 0)
        assert all(torch.equal(read[name], expected[name]) for name in expected)
        assert not all(torch.equal(read[name], averages[name]) for name in expected)

    def test_classes_and_condition(self, variant, tmp_path, capsys):
        path = variant(["cat", "dog"], 9)
        export(path, tmp_path / "out", "--format", "diffusers")
        assert "0 to 1 for a class, 2 for none" in capsys.readouterr().out
        counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
        assert counts["left out"] == {"condition.weight": 9 * 32}
        assert counts["weights"] - counts["written"] == 9 * 32
        unet = counterpart.read_pipeline(tmp_path / "out").unet
        assert unet.config.num_class_embeds == 3

    def test_a_pipeline_comes_back_as_a_checkpoint(self, variant, tmp_path, capsys):
        """With its classes; it draws the same."""
        from diffusion_ext.inference import DiffusionModel

        path = variant(["cat", "dog"])
        export(path, tmp_path / "out", "--format", "diffusers")
        export(tmp_path / "out", tmp_path / "back.pt", "--format", "checkpoint")
        assert "differ from the pipeline's by at most" in capsys.readouterr().out
        ours, back = (
            DiffusionModel.from_checkpoint(p, "cpu") for p in (path, tmp_path / "back.pt")
        )
        assert back.classes == ["cat", "dog"] and back.shape == ours.shape
        options = dict(steps=3, labels=[0, 1], guidance=2.0)
        a, b = (model.sample(2, **options).astype(int) for model in (ours, back))
        assert np.abs(a - b).max() <= 1
        (tmp_path / "out" / "classes.json").unlink()
        with pytest.raises(UserError, match="classes.json does not name the 2 classes"):
            export(tmp_path / "out", tmp_path / "again.pt", "--format", "checkpoint")
        assert not (tmp_path / "again.pt").exists()

    def test_pipelines_of_others(self, tmp_path):
        """As the example of diffusers trains them, but smaller; and one that pads in another way."""
        unet = diffusers.UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(32, 32, 64),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "theirs")
        export(tmp_path / "theirs", tmp_path / "x.pt", "--format", "checkpoint")
        state = torch.load(tmp_path / "x.pt", weights_only=True)
        said = state["cfg"]["task"]
        assert (said["objective"], said["beta_schedule"], said["timesteps"]) == (
            "eps",
            "linear",
            1000,
        )
        assert state["cfg"]["model"]["attention_resolutions"] == [8]
        unet.register_to_config(downsample_padding=0, freq_shift=1)
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "odd")
        with pytest.raises(
            UserError, match="freq_shift is 1, here 0; downsample_padding is 0, here 1"
        ):
            export(tmp_path / "odd", tmp_path / "y.pt", "--format", "checkpoint")

    def test_a_size_that_the_network_pads_is_refused_with_the_nearest(self, variant, tmp_path):
        path = variant()
        state = torch.load(path, weights_only=True)
        state["task_state"]["spec"].update(height=15, width=18)
        torch.save(state, path)
        with pytest.raises(UserError, match="pads its images of 15 × 18 .* fits is 16 × 20"):
            export(path, tmp_path / "out", "--format", "diffusers")
        export(path, tmp_path / "safe", "--format", "safetensors")

    @pytest.mark.parametrize("option", ["self_condition", "learned_variance"])
    def test_no_counterpart(self, variant, tmp_path, option):
        path, out = variant(**{option: True}), tmp_path / "new" / "out"
        flag = f"--{option.replace('_', '-')}"
        with pytest.raises(UserError, match=f"{flag}.*: use --format safetensors"):
            export(path, out, "--format", "diffusers")
        assert not out.parent.exists()
        export(path, out, "--format", "safetensors")
        assert read_config(out)[option]

    def test_existing_output(self, variant, tmp_path):
        path, out = variant(), tmp_path / "out"
        export(path, out, "--format", "safetensors")
        with pytest.raises(UserError, match="out exists: use --overwrite"):
            export(path, out, "--format", "diffusers")
        export(path, out, "--format", "diffusers", "--overwrite")
        names = {"manifest.json", "model_index.json", "scheduler", "unet"}
        assert {entry.name for entry in out.iterdir()} == names
        (out / "letter.txt").write_text("dear")
        with pytest.raises(UserError, match="holds other files .letter.txt."):
            export(path, out, "--format", "safetensors", "--overwrite")
        with pytest.raises(UserError, match="variant.pt is a file"):
            export(path, path, "--format", "safetensors", "--overwrite")
        with pytest.raises(UserError, match="variant.pt is a file"):
            export(path, path / "out", "--format", "safetensors")
        assert {entry.name for entry in tmp_path.iterdir()} == {"out", "variant.pt"}

    @pytest.mark.parametrize(
        "format, part", [("diffusers", "unet2d_weights"), ("safetensors", None)]
    )
    def test_parity_fails(self, variant, tmp_path, monkeypatch, format, part):
        path = variant()
        if part:
            wrong = counterpart.unet2d_weights

            def halved(weights):
                return {k: v / 2 if "to_q" in k else v for k, v in wrong(weights).items()}

            monkeypatch.setattr(counterpart, part, halved)
        else:
            monkeypatch.setattr(
                "diffusion_ext.export.__main__.load_exported", lambda f: tiny(height=16)
            )
        with pytest.raises(UserError, match="read back, its outputs differ .* 1e-04 is accepted"):
            export(path, tmp_path / "out", "--format", format)
        assert [entry.name for entry in tmp_path.iterdir()] == ["variant.pt"]

    def test_package_does_not_fit_others(self, tmp_path, monkeypatch):
        class Broken:
            __version__ = "0.1"

            def __getattr__(self, name):
                raise RuntimeError("Failed to import\nsomething else")

        monkeypatch.setitem(sys.modules, "diffusers", Broken())
        sentence = "diffusers 0.1 cannot be used .Failed to import.: pip install --upgrade"
        with pytest.raises(UserError, match=sentence):
            export("no.pt", tmp_path / "out", "--format", "diffusers")

    @pytest.mark.parametrize("format", FORMATS)
    def test_package_missing(self, tmp_path, monkeypatch, format):
        monkeypatch.setitem(sys.modules, format, None)
        sentence = (
            f"--format {format} needs the package {format}: pip install 'fairseq-ext.diffusers.'"
        )
        with pytest.raises(UserError, match=sentence):
            export("no.pt", tmp_path / "out", "--format", format)

    def test_checkpoints_of_no_use(self, tiny_checkpoint, tmp_path):
        def refused(path, reason):
            with pytest.raises(UserError, match=reason) as caught:
                export(path, tmp_path / "out", "--format", "safetensors")
            assert "\n" not in str(caught.value)

        refused(tmp_path / "none.pt", "none.pt does not exist")
        cut = tmp_path / "cut.pt"
        cut.write_bytes(tiny_checkpoint.read_bytes()[:5000])
        refused(cut, "cut.pt")
        other = tmp_path / "other.pt"
        torch.save({"model": {}, "cfg": {"task": {"_name": "speaker_id"}, "model": {}}}, other)
        refused(other, r"of another task \(speaker_id\), not of diffusion")
        with pytest.raises(UserError, match="--ema 7 is not there"):
            export(tiny_checkpoint, tmp_path / "out", "--format", "safetensors", "--ema", 7)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "flags, reason",
        [
            (["--format", "difusers"], "did you mean 'diffusers'"),
            ([], "--format"),
            (["--format", "diffusers", "--ema", "-2"], "count from 0"),
        ],
    )
    def test_usage(self, tmp_path, capsys, flags, reason):
        with pytest.raises(SystemExit) as stopped:
            cli.run(main, ["no.pt", str(tmp_path / "out"), *flags])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        assert reason in error
