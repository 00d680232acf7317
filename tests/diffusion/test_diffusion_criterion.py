"""The loss by hand, draws that belong to the image, validation on fixed draws and averaged weights."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

pytest.importorskip("fairseq")

from fairseq.distributed import ModuleProxyWrapper
from fairseq.logging import metrics

from diffusion_ext.randomness import training_draws, validation_draws
from diffusion_ext.weightings import PosteriorTables
from ext_common.cli import UserError

T = 100
SHAPE = (3, 8, 8)


class Watched(torch.nn.Module):
    """A model whose output is a function of x_t; it keeps what it was called with."""

    def __init__(self, output=lambda x: 0.3 * x + 0.1, self_condition=False):
        super().__init__()
        self.function, self.self_condition, self.calls = output, self_condition, []

    def forward(self, x, t, label=None, x0=None, condition=None, average=None):
        autocast = torch.is_autocast_enabled("cpu")
        self.calls.append(
            dict(
                x=x,
                t=t,
                label=label,
                x0=x0,
                condition=condition,
                average=average,
                autocast=autocast,
            )
        )
        return self.function(x)


def images(n, seed=0, first_id=0):
    rng = np.random.default_rng(seed)
    return {
        "id": torch.arange(first_id, first_id + n),
        "image": torch.from_numpy(rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8)),
        "label": torch.from_numpy(rng.integers(0, 3, n)),
    }


def some(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def cosine():
    """ᾱ of the cosine schedule over T steps, float64, from the paper: β = min(1 − f(t+1)/f(t), 0.999)."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


def by_hand(batch, t, noise):
    """x_0, noise, √ᾱ and √(1 − ᾱ) of each image in float64, under the cosine schedule."""
    ac = cosine()[t.numpy()][:, None, None, None]
    x0 = batch["image"].numpy() / 255 * 2 - 1
    return x0, noise.numpy().astype(float), ac**0.5, (1 - ac) ** 0.5


def draws(batch, update=0, uniforms=1, seed=1):
    return training_draws(seed, update, batch["id"].tolist(), SHAPE, T, uniforms)


def logged(criterion, *groups):
    """What fairseq shows after several calls of reduce_metrics, each for a list of logs."""
    with metrics.aggregate(new_root=True) as found:
        for group in groups:
            criterion.reduce_metrics(group)
        return {k: float(found[k].avg) for k in found.keys()}


COSINE = {"beta_schedule": "cosine"}
TARGETS = {
    "eps": lambda x0, eps, a, s: eps,
    "x0": lambda x0, eps, a, s: x0,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
}
# SNR → weight on the squared error of each output, from the papers
WEIGHTS = {
    ("none", "eps"): lambda snr: 1,
    ("none", "x0"): lambda snr: 1,
    ("none", "v"): lambda snr: 1,
    ("min_snr:gamma=3", "eps"): lambda snr: np.minimum(snr, 3) / snr,
    ("min_snr:gamma=3", "x0"): lambda snr: np.minimum(snr, 3),
    ("min_snr:gamma=3", "v"): lambda snr: np.minimum(snr, 3) / (snr + 1),
    ("p2:k=2,gamma=0.5", "eps"): lambda snr: (2 + snr) ** -0.5,
    ("p2:k=2,gamma=0.5", "x0"): lambda snr: snr * (2 + snr) ** -0.5,
    ("p2:k=2,gamma=0.5", "v"): lambda snr: snr * (2 + snr) ** -0.5 / (snr + 1),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("weighting, objective", WEIGHTS)
def test_loss_is_the_formula(build, weighting, objective, train):
    made = build({"objective": objective, **COSINE}, {"loss_weighting": weighting})
    one, batch = made.criterion.train(train), images(40)
    one.set_num_updates(7)
    if train:
        t, noise, _ = draws(batch, 7)
    else:
        t, noise = validation_draws(batch["id"].tolist(), SHAPE, T)
    x0, eps, a, s = by_hand(batch, t, noise)
    x_t = a * x0 + s * eps
    mse = ((0.3 * x_t + 0.1 - TARGETS[objective](x0, eps, a, s)) ** 2).mean((1, 2, 3))
    snr = ((a / s) ** 2)[:, 0, 0, 0]
    expected = WEIGHTS[weighting, objective](snr) * mse

    model = Watched()
    each, n, log = one(model, batch, reduce=False)
    np.testing.assert_allclose(each.numpy(), expected, rtol=2e-5)
    np.testing.assert_allclose(model.calls[0]["x"].numpy(), x_t, atol=1e-6)
    assert torch.equal(model.calls[0]["t"], t) and model.calls[0]["x"].dtype == torch.float32
    assert len(model.calls) == 1 and model.calls[0]["average"] == (None if train else 0)
    loss, n, log = one(model, batch)
    assert n == log["sample_size"] == log["nsentences"] == log["ntokens"] == 40
    assert float(loss) == pytest.approx(expected.sum(), rel=2e-5)
    assert float(log["loss"]) == pytest.approx(expected.sum(), rel=2e-5)
    assert float(log["mse"]) == pytest.approx(mse.sum(), rel=2e-5)


def test_errors_by_quarter_of_the_timesteps(build):
    """The weighted loss is not among them; grouping and summing over processes change nothing."""
    one = build({"objective": "x0", **COSINE}, {"loss_weighting": "min_snr"}).criterion.train()
    batches = [images(n, seed=n, first_id=100 * n) for n in (1, 30, 9)]
    logs = [one(Watched(), batch)[2] for batch in batches]
    mse, quarter = [], []
    for batch in batches:
        t, noise, _ = draws(batch)
        x0, eps, a, s = by_hand(batch, t, noise)
        mse += list(((0.3 * (a * x0 + s * eps) + 0.1 - x0) ** 2).mean((1, 2, 3)))
        quarter += [1 + int(k >= 25) + int(k >= 50) + int(k >= 75) for k in t]
    mse, quarter = np.array(mse), np.array(quarter)
    assert set(quarter) == {1, 2, 3, 4}
    expected = {f"mse_q{q}": mse[quarter == q].mean() for q in (1, 2, 3, 4)}
    expected |= {"mse": mse.mean(), "loss": sum(float(log["loss"]) for log in logs) / 40}
    added = {key: sum(log[key] for log in logs) for key in logs[0]}
    for groups in ([logs], [[log] for log in logs], [logs[::-1]], [[added]]):
        found = logged(one, *groups)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4), key
    assert one.logging_outputs_can_be_summed() and logged(one, []) == logged(one, [{}]) == {}
    # a quarter that no image was in is not shown as 0
    alone = logged(one, [logs[0]])
    assert set(alone) == {"loss", "mse", f"mse_q{quarter[0]}"}


FULL = dict(
    task={"class_labels": True, "hflip": 0.5, "color_jitter": [0.5, 0.5, 0.5, 0.1]},
    model={"self_condition": True, "learned_variance": True},
    criterion={"loss_weighting": "min_snr", "label_dropout": 0.3},
)


@pytest.mark.parametrize("update, looks", [(0, 1), (3, 2)])
def test_cut_and_company_change_nothing(build, update, looks):
    """Accumulated batches have the loss and the gradient of a whole one: pitfall 16."""
    made = build(**FULL)
    one, model, batch = made.criterion.train(), made.model.eval(), images(5)
    one.set_num_updates(update)
    watched = Watched(lambda x: torch.cat([x, x], 1), self_condition=True)
    one(watched, batch)
    assert len(watched.calls) == looks, "with and without a guess of its own"
    parameters = list(model.net.parameters())

    def gradient(*parts):
        model.zero_grad()
        losses = [one(model, some(batch, part), reduce=False)[0] for part in parts]
        sum(loss.sum() for loss in losses).backward()
        return torch.cat(losses), torch.cat([p.grad.flatten() for p in parameters])

    whole, together = gradient(range(5))
    for parts in ([[0], [1, 2, 3], [4]], [[k] for k in range(5)]):
        loss, summed = gradient(*parts)
        torch.testing.assert_close(loss, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(summed, together, rtol=1e-3, atol=1e-4 * together.abs().max())
    backwards, _ = gradient([4, 3, 2, 1, 0])
    torch.testing.assert_close(backwards.flip(0), whole, rtol=1e-4, atol=1e-5)
    # other pixels and labels around image 2, not its own
    others = {**images(5, seed=9), "id": batch["id"]}
    others["image"][2], others["label"][2] = batch["image"][2], batch["label"][2]
    mixed = one(model, others, reduce=False)[0]
    torch.testing.assert_close(mixed[2], whole[2], rtol=1e-4, atol=1e-5)
    assert not torch.isclose(mixed[3], whole[3], rtol=1e-3)


def test_draws_are_of_seed_update_and_image(build):
    one, batch = build().criterion.train(), images(5)

    def seen(update, ids=batch["id"], one=one):
        model = Watched()
        one.set_num_updates(update)
        one(model, {**batch, "id": ids})
        return model.calls[0]

    first = seen(3)
    torch.manual_seed(99)
    again = seen(3)
    assert torch.equal(first["x"], again["x"]) and torch.equal(first["t"], again["t"])
    others = [seen(4), seen(3, batch["id"] + 5), seen(3, one=build({"seed": 2}).criterion.train())]
    for other in others:
        assert (other["x"] != first["x"]).all(1).any((1, 2)).all()


class TestValidation:
    def test_draws_do_not_change_with_update_or_seed(self, build):
        batch, losses = images(6), []
        for seed in (1, 2):
            one = build({"seed": seed}).criterion.eval()
            for update in (0, 50):
                one.set_num_updates(update)
                losses.append(one(Watched(), batch, reduce=False)[0])
        assert all(torch.equal(loss, losses[0]) for loss in losses)

    def test_is_of_the_averaged_weights(self, build):
        made = build()
        one, model, batch = made.criterion.eval(), made.model.eval(), images(6)
        before = one(model, batch)[0].detach()
        as_net = one.train()(model, batch)[0].detach()
        with torch.no_grad():
            for weight in model.net.parameters():
                weight.mul_(1.5)
        assert torch.equal(one.eval()(model, batch)[0], before)
        assert not torch.isclose(one.train()(model, batch)[0], as_net)
        with torch.no_grad():
            model.ema.weights.mul_(1.5)
        assert not torch.isclose(one.eval()(model, batch)[0], before)
        # the average of weights that never moved is the weights
        model.ema.update(model.net, 100, math.inf)
        for name, weight in model.net.named_parameters():
            torch.testing.assert_close(model.ema.of(0)[name], weight, rtol=0, atol=0)
        mean = one(model, batch)[0]
        one.output = lambda model, batch, guess: model(
            batch["x_t"], batch["t"], batch["label"], guess, batch["condition"]
        )
        torch.testing.assert_close(one(model, batch)[0], mean)

    def test_sees_images_as_they_are_with_their_labels(self, build):
        made = build({**FULL["task"]}, {"label_dropout": 1.0})
        model, batch = Watched(), images(6)
        made.criterion.eval()(model, batch)
        (call,) = model.calls
        assert call["condition"] is None and torch.equal(call["label"], batch["label"])
        t, noise = validation_draws(batch["id"].tolist(), SHAPE, T)
        a, s = (
            table[t].view(-1, 1, 1, 1)
            for table in (made.task.schedule.alpha, made.task.schedule.sigma)
        )
        torch.testing.assert_close(
            call["x"], (a * (batch["image"] / 127.5 - 1) + s * noise).float(), rtol=0, atol=1e-6
        )

    def test_always_has_its_own_guess(self, build):
        made = build(model={"self_condition": True})
        for update in range(6):
            model = Watched(self_condition=True)
            made.criterion.eval().set_num_updates(update)
            made.criterion(model, images(2))
            assert [call["x0"] is None for call in model.calls] == [True, False]
            assert all(call["average"] == 0 for call in model.calls)


class TestLabels:
    @pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
    def test_dropout_hides_its_share_behind_the_null_label(self, build, share):
        one = build(
            {"class_labels": True, "timesteps": 2}, {"label_dropout": share}
        ).criterion.train()
        n, hidden = 1500, 0
        model, batch = Watched(), images(n)
        one(model, batch)
        label = model.calls[0]["label"]
        hidden = int((label == 3).sum())
        assert abs(hidden - share * n) <= 4 * math.sqrt(share * (1 - share) * n)
        kept = label != 3
        assert torch.equal(label[kept], batch["label"][kept])
        # drawn anew for the next update, alone like in company
        one.set_num_updates(1)
        one(model, batch)
        assert torch.equal(model.calls[1]["label"], label) == (share in (0.0, 1.0))
        one(model, some(batch, [7, 8]))
        assert torch.equal(model.calls[2]["label"], model.calls[1]["label"][7:9])

    def test_hiding_has_nothing_to_do_with_mirroring(self, build):
        task = {"class_labels": True, "hflip": 0.5, "timesteps": 2}
        one = build(task, {"label_dropout": 0.5}).criterion.train()
        model, n = Watched(), 1500
        one(model, images(n))
        hidden = model.calls[0]["label"] == 3
        mirrored = model.calls[0]["condition"][:, 0] == 1
        # covariance of two independent fair coins: 0 ± 1/4 / √n
        both = float(
            (hidden & mirrored).float().mean() - hidden.float().mean() * mirrored.float().mean()
        )
        assert abs(both) < 4 * 0.25 / math.sqrt(n)

    def test_without_classes_there_is_none(self, build):
        for train in (True, False):
            model = Watched()
            build().criterion.train(train)(model, images(2))
            assert model.calls[0]["label"] is None

    @pytest.mark.parametrize("share", [-0.1, 10])
    def test_what_is_no_share_is_refused(self, build, share):
        with pytest.raises(UserError, match=rf"--label-dropout {share:.1f}.*0 to 1"):
            build(criterion={"label_dropout": share})


class TestSelfConditioning:
    @pytest.mark.parametrize("objective", ["eps", "x0", "v"])
    def test_the_guess_is_clipped_as_in_sampling(self, build, objective):
        """Pitfall 17. A net whose x_0 is mostly outside of [−1, 1]."""
        made = build({"objective": objective}, model={"self_condition": True})
        weight = torch.tensor(5.0, requires_grad=True)
        model = Watched(lambda x: weight * x, self_condition=True)
        one = made.criterion.eval()
        batch = one.batch(images(20))
        one(model, images(20))
        looked, used = model.calls
        assert looked["x0"] is None and not used["x0"].requires_grad
        t, x_t = batch["t"], batch["x_t"].double()
        a, s = (
            table[t].view(-1, 1, 1, 1)
            for table in (made.task.schedule.alpha, made.task.schedule.sigma)
        )
        out = 5 * x_t
        x0 = {"eps": (x_t - s * out) / a, "x0": out, "v": a * x_t - s * out}[objective]
        assert (x0.abs() > 1).float().mean() > 0.3 and (x0.abs() < 1).float().mean() > 0.02
        torch.testing.assert_close(used["x0"].double(), x0.clamp(-1, 1), rtol=1e-4, atol=1e-4)

    def test_the_coin_is_the_same_for_all_processes(self, build):
        one, tosses = build(model={"self_condition": True}).criterion.train(), []
        for update in range(20):
            one.set_num_updates(update)
            looks = []
            for rank, size in ((0, 2), (1, 1)):
                model = Watched(self_condition=True)
                one(model, images(size, first_id=10 * rank))
                looks.append(len(model.calls))
                assert (model.calls[-1]["x0"] is None) == (len(model.calls) == 1)
            assert len(set(looks)) == 1
            tosses.append(looks[0])
        assert set(tosses) == {1, 2}

    def test_the_coin_is_fair(self, build):
        one, tosses = build(model={"self_condition": True}).criterion.train(), []
        batch = one.batch(images(1))
        for update in range(500):
            one.set_num_updates(update)
            tosses.append(one.own_guess(Watched(), batch) is not None)
        assert abs(sum(tosses) - 250) < 4 * math.sqrt(500) / 2
        turns = sum(a != b for a, b in zip(tosses, tosses[1:], strict=False))
        assert abs(turns - 249.5) < 4 * math.sqrt(499) / 2

    def test_also_inside_of_what_wraps_a_model_for_several_processes(self, build):
        class Wrapper(torch.nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, *args, **kwargs):
                return self.module(*args, **kwargs)

        one, model = build().criterion.eval(), Watched(self_condition=True)
        one(ModuleProxyWrapper(Wrapper(model)), images(1))
        assert len(model.calls) == 2

    def test_a_net_without_it_is_asked_once(self, build):
        one = build().criterion.train()
        for update in range(8):
            model = Watched()
            one.set_num_updates(update)
            one(model, images(2))
            assert len(model.calls) == 1


class TestLearnedVariance:
    def bound(self, ac, x0, x_t, t, guess, fraction):
        """The bound in float64 from Ho et al. 2020, equations 5 to 7, and torch's own divergence."""
        terms = []
        for k in range(len(t)):
            i = int(t[k])
            before = ac[i - 1] if i else 1.0
            beta = 1 - ac[i] / before
            on_x0 = math.sqrt(before) * beta / (1 - ac[i])
            on_x = math.sqrt(1 - beta) * (1 - before) / (1 - ac[i])
            first = (1 - ac[1] / ac[0]) * (1 - ac[0]) / (1 - ac[1])
            small = beta * (1 - before) / (1 - ac[i]) if i else first
            log_variance = fraction[k] * math.log(beta) + (1 - fraction[k]) * math.log(small)
            ours = Normal(on_x0 * guess[k] + on_x * x_t[k], (log_variance / 2).exp())
            if i:
                truth = Normal(on_x0 * x0[k] + on_x * x_t[k], math.sqrt(small))
                terms.append(kl_divergence(truth, ours).mean())
            else:
                up = torch.where(x0[k] > 0.999, 1.0, ours.cdf(x0[k] + 1 / 255))
                down = torch.where(x0[k] < -0.999, 0.0, ours.cdf(x0[k] - 1 / 255))
                terms.append(-(up - down).clamp(min=1e-12).log().mean())
        return torch.stack(terms)

    @pytest.mark.parametrize("objective", ["eps", "x0", "v"])
    def test_adds_the_bound_that_trains_the_variance_alone(self, build, objective):
        options = {"loss_weighting": "p2:k=2,gamma=0.5", "vlb_weight": 0.02}
        one = build({"objective": objective, **COSINE}, options).criterion.train()
        batch = images(60, first_id=20)
        t, noise, _ = draws(batch)
        assert 0 in t.tolist()
        torch.manual_seed(3)
        said = torch.randn(60, 3, 8, 8, requires_grad=True)
        sure = torch.randn(60, 3, 8, 8, requires_grad=True)
        loss, _, log = one(Watched(lambda x: torch.cat([said, sure], 1)), batch, reduce=False)
        loss.sum().backward()

        ac = torch.tensor(cosine())
        x0, eps, a, s = (torch.tensor(part) for part in by_hand(batch, t, noise))
        x_t = a * x0 + s * eps
        out, fraction = said.detach().double(), (sure.detach().double() + 1) / 2
        fraction.requires_grad_()
        guess = {"eps": (x_t - s * out) / a, "x0": out, "v": a * x_t - s * out}[objective]
        terms = self.bound(ac.tolist(), x0, x_t, t, guess.clamp(-1, 1), fraction)
        target = torch.tensor(TARGETS[objective](*(part.numpy() for part in (x0, eps, a, s))))
        snr = (a / s)[:, 0, 0, 0] ** 2
        weight = torch.as_tensor(WEIGHTS["p2:k=2,gamma=0.5", objective](snr.numpy()))
        mse = ((out - target) ** 2).mean((1, 2, 3))
        expected = weight * mse + 0.02 * T * terms
        loss, expected = loss.detach().double(), expected.detach()
        torch.testing.assert_close(loss[t > 0], expected[t > 0], rtol=1e-4, atol=1e-5)
        # the tails of a Gaussian, as differences of float32
        torch.testing.assert_close(loss[t == 0], expected[t == 0], rtol=0.03, atol=1e-3)
        assert float(log["mse"]) == pytest.approx(float(mse.sum()), rel=1e-4)
        # the mean is trained by the squared error alone
        alone = 2 * weight[:, None, None, None] * (out - target) / (3 * 8 * 8)
        torch.testing.assert_close(said.grad.double(), alone, rtol=1e-4, atol=1e-7)
        (slope,) = torch.autograd.grad(0.02 * T * terms.sum(), fraction)
        # d fraction / d output is ½; float32 leaves little of the tails of the first timestep
        torch.testing.assert_close(
            sure.grad[t > 0].double(),
            slope[t > 0] / 2,
            rtol=1e-2,
            atol=1e-5 * float(slope.abs().max()),
        )
        assert sure.grad[t == 0].abs().max() > 0

    def test_without_its_weight_there_is_only_the_error(self, build):
        made = build(criterion={"vlb_weight": 0.0})
        double = Watched(lambda x: torch.cat([0.3 * x + 0.1, x], 1))
        one, batch = made.criterion.train(), images(9)
        assert torch.equal(one(double, batch)[0], one(Watched(), batch)[0])

    def test_tables_follow_the_device_of_the_timesteps(self, build):
        tables = PosteriorTables(build().task.schedule).to("meta")
        assert {table.device.type for table in vars(tables).values()} == {"meta"}


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_models_keep_tables_and_averages_in_float32(self, build, dtype):
        """What fairseq does for --fp16 and --bf16: model and criterion are cast whole."""
        made, batch = build(), images(6)
        one, model = made.criterion.eval(), made.model.eval()
        whole = one(model, batch, reduce=False)[0]
        kept = model.ema.weights.clone()
        one, model = one.to(dtype), model.to(dtype)
        assert {p.dtype for p in model.net.parameters()} == {dtype}
        assert model.ema.weights.dtype == torch.float32 and torch.equal(model.ema.weights, kept)
        assert {one.table(name, torch.device("cpu")).dtype for name in one.tables} == {
            torch.float32
        }
        assert torch.equal(one(model, batch, reduce=False)[0], whole)
        loss = one.train()(model, batch, reduce=False)[0]
        assert loss.dtype == torch.float32
        exact = one(build().model.eval(), batch, reduce=False)[0]
        torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.01)
        # an update that is smaller than the type's last digit still moves the average
        with torch.no_grad():
            for weight in model.net.parameters():
                weight.mul_(2)
        model.ema.update(model.net, 1e9, 64.0)
        now = torch.cat([p.detach().float().flatten() for p in model.net.parameters()])
        share = 1 - 0.5 ** (64 / 500_000)
        assert share < torch.finfo(dtype).eps / 2
        torch.testing.assert_close(
            model.ema.weights[0] - kept[0], share * (now - kept[0]), rtol=0.05, atol=1e-7
        )

    def test_autocast_is_around_the_network_alone(self, build):
        for precision, inside in (("bf16", True), ("fp32", False)):
            model = Watched(lambda x: x @ torch.eye(8))
            loss, _, _ = build(criterion={"autocast": precision}).criterion.train()(
                model, images(5)
            )
            assert (
                model.calls[0]["autocast"] == inside and model.calls[0]["x"].dtype == torch.float32
            )
            assert loss.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")

    def test_auto_follows_the_processor(self, build, monkeypatch):
        for can in (True, False):
            monkeypatch.setattr(
                "diffusion_ext.criterion.computes_bf16", lambda device, can=can: can
            )
            model = Watched()
            build(criterion={"autocast": "auto"}).criterion.train()(model, images(2))
            assert model.calls[0]["autocast"] == can

    def test_unknown(self, build):
        with pytest.raises(
            UserError, match="--autocast fp8 is unknown: known are auto, bf16, fp32"
        ):
            build(criterion={"autocast": "fp8"})


class TestAugmentation:
    def seen(self, made, batch, train=True):
        one = made.criterion.train(train)
        model = Watched()
        one(model, batch)
        return one.batch(batch), model.calls[0]["condition"]

    def test_the_net_is_told_what_was_done(self, build):
        batch = images(60)
        pixels = batch["image"] / 127.5 - 1
        found, condition = self.seen(build({"hflip": 0.5}), batch)
        mirrored = condition[:, 0] == 1
        assert condition.shape == (60, 1) and 15 < mirrored.sum() < 45
        torch.testing.assert_close(found["x0"][mirrored], pixels[mirrored].flip(-1))
        torch.testing.assert_close(found["x0"][~mirrored], pixels[~mirrored])
        # noise is laid over what was augmented, and the target is made of it
        a, s = build().criterion.levels(found["t"])
        torch.testing.assert_close(found["x_t"], a * found["x0"] + s * found["noise"])

    def test_leaky_changes_the_images_and_tells_nothing(self, build):
        batch = images(60)
        task = {"hflip": 0.5, "color_jitter": [0.5, 0.5, 0.5, 0.1]}
        told, condition = self.seen(build(task), batch)
        leaky, silence = self.seen(build({**task, "leaky_augment": True}), batch)
        assert torch.equal(told["x0"], leaky["x0"]) and torch.equal(told["x_t"], leaky["x_t"])
        assert not torch.allclose(leaky["x0"], batch["image"] / 127.5 - 1, atol=0.05)
        assert silence is None and condition.shape == (60, 5) and condition.abs().sum() > 1
        assert build({**task, "leaky_augment": True}).model.net.condition is None
        assert build(task).model.net.condition.in_features == 5

    def test_without_augmentation_there_is_nothing_to_tell(self, build):
        made, batch = build(), images(6)
        found, condition = self.seen(made, batch)
        assert condition is None and made.model.net.condition is None
        torch.testing.assert_close(found["x0"], batch["image"] / 127.5 - 1)

    def test_no_condition_is_the_condition_zero(self, build):
        """What validation and samples have is what the net was shown for an image left alone."""
        model = build({"hflip": 0.5}).model.eval()
        x, t = (
            torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)),
            torch.tensor([3, 70]),
        )
        none = model(x, t)
        assert torch.equal(model(x, t, condition=torch.zeros(2, 1)), none)
        assert not torch.allclose(model(x, t, condition=torch.ones(2, 1)), none)


class TestNotFinite:
    def model(self, rows, value=math.nan):
        def output(x):
            x = x.clone()
            x[rows] = value
            return x

        return Watched(output)

    def test_stops_with_timesteps_update_and_what_is_left(self, build, tmp_path):
        made = build({"save_dir": str(tmp_path)})
        one, batch = made.criterion.train(), images(8)
        one.set_num_updates(41)
        t, _, _ = draws(batch, 41)
        one(self.model([2, 5]), batch)
        said = one.why_stop()
        assert "loss of 2 of 8 images is not finite at update 42" in said and "\n" not in said
        assert f"(nan at t = {t[2]}, nan at t = {t[5]})" in said
        assert "no checkpoint was written yet" in said and "lower --lr" in said
        (tmp_path / "checkpoint_last.pt").touch()
        assert str(tmp_path / "checkpoint_last.pt") in one.why_stop()
        # of the batches of an update all are looked at, of another update none
        one(self.model([]), batch)
        assert "of 2 of 16 images" in one.why_stop()
        one.set_num_updates(42)
        one(self.model([]), batch)
        assert one.why_stop() is None

    def test_many_are_summed_up(self, build):
        one = build().criterion.train()
        one(self.model(range(30), math.inf), images(30))
        assert "30 of 30" in one.why_stop() and one.why_stop().count("at t =") == 5

    def test_validation_goes_on(self, build):
        _, _, log = build().criterion.eval()(self.model([0]), images(3))
        assert math.isnan(log["loss"])


@pytest.mark.parametrize(
    "task, criterion, words",
    [
        ({"zero_terminal_snr": True, "objective": "eps"}, {}, "--objective eps cannot work"),
        ({"zero_terminal_snr": True}, {"loss_weighting": "min_snr"}, "use --loss-weighting none"),
        ({}, {"loss_weighting": "minsnr"}, "'minsnr': did you mean 'min_snr'"),
        ({}, {"loss_weighting": "min_snr:gamma=0"}, "gamma must be above 0"),
        ({"objective": "epsilon"}, {}, "unknown objective 'epsilon'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(build, task, criterion, words):
    with pytest.raises(UserError, match=words):
        build(task, criterion)


def test_pure_noise_is_trained_on(build):
    """ᾱ_T = 0 with v: the loss at the last timestep is that of −x_0, and finite."""
    one = build({"zero_terminal_snr": True, "timesteps": 2}).criterion.train()
    batch = images(20)
    model = Watched(lambda x: 0 * x)
    loss, _, _ = one(model, batch, reduce=False)
    t, noise, _ = training_draws(1, 0, batch["id"].tolist(), SHAPE, 2, 1)
    last = t == 1
    assert 0 < last.sum() < 20
    torch.testing.assert_close(model.calls[0]["x"][last], noise[last])
    x0 = (batch["image"][last] / 127.5 - 1) ** 2
    torch.testing.assert_close(loss[last], x0.mean((1, 2, 3)))
