"""Samples of a model that was told of the augmentation are like the raw images; of one that was not, less.

Pitfall 14: a toy set of two plain colours under strong jitter, both models trained alike in this process.
"""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fairseq")

from diffusion_ext.inference import DiffusionModel

COLORS = np.array([[190, 80, 60], [70, 90, 180]], dtype=np.uint8)
JITTER = "color_jitter:brightness=0.6,contrast=0.5,saturation=0.6,hue=0.2,p=0.8"
UPDATES, BATCH = 400, 32


@pytest.fixture
def sampled(build, tmp_path):
    """sampled(leaky): mean colours (128, 3) of samples, in 8 bits, after a short training."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(8):
        plain = np.broadcast_to(COLORS[k % 2], (8, 8, 3)).copy()
        Image.fromarray(plain).save(folder / f"{k}.png")

    def sampled(leaky):
        made = build(
            {
                "data": str(folder),
                "image_store": str(tmp_path / "store"),
                "timesteps": 200,
                "augment": JITTER,
                "leaky_augment": leaky,
            },
            model={
                "base_channels": 16,
                "attention_resolutions": [0],
                "ema_half_life": [1500.0],
            },
        )
        net, one = made.model.net, made.criterion.train()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, betas=(0.9, 0.99))
        ids = torch.arange(BATCH)
        colors = torch.from_numpy(COLORS)[ids % 2]
        batch = {
            "id": ids,
            "image": colors[:, :, None, None].expand(-1, -1, 8, 8),
            "label": torch.full((BATCH,), -1),
        }
        for update in range(UPDATES):
            one.set_num_updates(update)
            loss, n, _ = one(made.model, batch)
            optimizer.zero_grad()
            (loss / n).backward()
            optimizer.step()
            made.model.ema.update(net, (update + 1) * BATCH, BATCH)
        model = DiffusionModel(made.model, made.task.cfg, made.task.spec)
        return model.sample(128, steps=20).astype(float).mean((2, 3))

    return sampled


@pytest.mark.slow
def test_told_of_the_jitter_a_model_draws_the_raw_colours(sampled):
    told, leaky = sampled(False), sampled(True)

    def off(means):
        """Root mean squared distance to the nearer of the two colours."""
        squared = ((means[:, None] - COLORS) ** 2).mean(2).min(1)
        return np.sqrt(squared.mean())

    # 0.62 to 0.64 with three seeds, and 1 where the condition does nothing
    assert off(told) < 0.75 * off(leaky)
    # green hardly varies in the raw images: what it varies more by is jitter
    raw = COLORS[:, 1].std()
    assert told[:, 1].std() - raw < 0.75 * (leaky[:, 1].std() - raw)
    # both have learned the two colours, and not one between them
    for means in (told, leaky):
        assert means[:, 0].std() > 40 and np.abs(means.mean(0) - COLORS.mean(0)).max() < 20
