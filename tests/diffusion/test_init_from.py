"""A training that begins with another's weights: what the new network says at its first look."""

import pytest
import torch

pytest.importorskip("fairseq")

from diffusion_ext.network import AveragedUNet, NetworkOptions, flags_of, initialise
from ext_common.cli import UserError

SPEC = dict(height=8, width=8, channels=1, condition_size=0)
SMALL = dict(base_channels=8, channel_mults=[1, 2], blocks=1, attention_resolutions=[0])


def network(classes, seed, **options):
    torch.manual_seed(seed)
    made = AveragedUNet(
        NetworkOptions(**{**SMALL, "head_channels": 8, **options}), {**SPEC, "classes": classes}
    )
    with torch.no_grad():
        for weight in made.net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    made.ema.weights.add_(0.1 * torch.randn(made.ema.weights.shape))
    return made.eval()


def state_of(made, classes):
    return {"model": made.state_dict(), "task_state": {"spec": {**SPEC, "classes": classes}}}


def said(made, label=None, average=0):
    x = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    label = None if label is None else torch.full((3,), label)
    with torch.no_grad():
        return made(x, torch.tensor([1, 50, 99]), label, average=average)


@pytest.mark.parametrize("before", [[], ["ant", "bee", "cat"]])
@pytest.mark.parametrize("now", [[], ["cat", "dog", "ant"]])
def test_the_new_network_begins_where_the_old_one_ended(before, now):
    """Without a class as without one, a class of the same name as that class, another as without."""
    old, new = network(before, 1), network(now, 2)
    with torch.random.fork_rng():
        initialise(new, {**SPEC, "classes": now}, state_of(old, before), "old.pt")
    close = dict(rtol=1e-4, atol=1e-5)
    for average in (0, None):
        torch.testing.assert_close(said(new, None, average), said(old), **close)
        for number, name in enumerate(now):
            label = before.index(name) if name in before else None
            torch.testing.assert_close(said(new, number, average), said(old, label), **close)


def test_another_network_is_refused_and_the_flags_of_the_old_one_are_known():
    old = network([], 1)
    state = state_of(old, [])
    with pytest.raises(UserError, match="--init-from old.pt has another network"):
        initialise(network([], 2, base_channels=16), {**SPEC, "classes": []}, state, "old.pt")
    task = dict(objective="edm", beta_schedule="sigmoid", timesteps=100, zero_terminal_snr=False)
    model = {**SMALL, "head_channels": 8, "scale_shift": True, "ema_snapshots": 5}
    flags = flags_of({**state, "cfg": {"model": model, "task": task}})
    assert flags["--channel-mults"] == "1,2" and flags["--objective"] == "edm"
    assert flags["--scale-shift"] is None
    assert not {"--ema-snapshots", "--zero-terminal-snr", "--self-condition"} & flags.keys()
