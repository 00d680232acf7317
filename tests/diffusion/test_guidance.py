"""Guidance from the command: by a worse checkpoint, in an interval, and a picture of strengths."""

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq")

from diffusion_ext.inference import DiffusionModel, read_checkpoint
from diffusion_ext.sample.__main__ import SampleOptions, sample
from ext_common.cli import UserError


@pytest.fixture(scope="module")
def worse(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with smaller weights, as an earlier one."""
    state = read_checkpoint(tiny_checkpoint)
    state["model"] = {name: value * 0.5 for name, value in state["model"].items()}
    path = tmp_path_factory.mktemp("worse") / "checkpoint_1.pt"
    torch.save(state, path)
    return path


def changed(path, out, **task):
    state = read_checkpoint(path)
    state["cfg"]["task"].update(task)
    torch.save(state, out)
    return DiffusionModel.from_checkpoint(out, "cpu")


def test_a_worse_checkpoint_guides_a_model_without_classes(tiny_checkpoint, worse):
    model = DiffusionModel.from_checkpoint(tiny_checkpoint, "cpu")
    guide = DiffusionModel.from_checkpoint(worse, "cpu")
    plain = model.sample(2, steps=3)
    same = model.sample(2, steps=3, guide=guide, guidance=1.0)
    np.testing.assert_array_equal(same, plain)
    # the weight 0 is the guide itself
    np.testing.assert_array_equal(
        model.sample(2, steps=3, guide=guide, guidance=0.0), guide.sample(2, steps=3)
    )
    assert (model.sample(2, steps=3, guide=guide, guidance=3.0) != plain).any()
    with pytest.raises(UserError, match="or a worse one of the same images as --guide"):
        model.sample(2, steps=3, guidance=2.0)


@pytest.mark.parametrize(
    "task, said",
    [({"objective": "eps"}, "the objective eps, the model v"), ({"timesteps": 40}, "")],
)
def test_a_guide_of_something_else_is_refused(tiny_checkpoint, tmp_path, task, said):
    model = DiffusionModel.from_checkpoint(tiny_checkpoint, "cpu")
    guide = changed(tiny_checkpoint, tmp_path / "other.pt", **task)
    with pytest.raises(UserError, match=f"--guide has {said or 'other noise levels'}"):
        model.sample(1, steps=2, guide=guide, guidance=2.0)


def test_the_command_guides_and_shows_the_strengths(tiny_checkpoint, worse, tmp_path, capsys):
    common = dict(path=str(tiny_checkpoint), num=2, steps=2, device="cpu")
    options = SampleOptions(
        **common,
        guide=str(worse),
        guidance=2.0,
        guidance_sweep=[1.0, 2.0],
        guidance_interval=[0, 5],
    )
    sample(str(tmp_path / "guided"), options)
    assert "sweep.png the strengths" in capsys.readouterr().out
    assert (tmp_path / "guided.sweep.png").exists()
    # other images than without: the folder is not gone on with
    with pytest.raises(UserError, match="another model or other options"):
        sample(str(tmp_path / "guided"), SampleOptions(**common, guidance=1.0))
    with pytest.raises(ValueError, match="two numbers from 0"):
        SampleOptions(path="x", guidance_interval=[3, 1])
    with pytest.raises(ValueError, match="and --guidance-sweep draw out of noise, not --inpaint"):
        SampleOptions(path="x", guide="y", inpaint="a", mask="b")


def test_what_earlier_folders_noted_is_what_is_noted_now(tiny_checkpoint, tmp_path):
    """A folder begun before these options were there is continued."""
    import json

    sample(str(tmp_path / "plain"), SampleOptions(path=str(tiny_checkpoint), num=1, device="cpu"))
    plan = json.loads((tmp_path / "plain" / ".plan.json").read_text())
    assert (plan["sampler"], plan["steps"]) == ("dpmpp_2m", 20)
    assert not {"guide", "guidance_interval", "guidance_sweep", "compile"} & plan.keys()
