import io
import json
import logging
import sys

import matplotlib.image
import numpy as np
import pytest

from ext_common import plots
from ext_common.cli import UserError
from ext_common.trainlog import Point, collect_curves, parse_log
from tests import processes


def fairseq_log(kind):
    """Two epochs of three updates as fairseq itself prints them; the format is its, not ours."""
    from fairseq.logging import progress_bar

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d")
    )
    logger = progress_bar.logger
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)  # by its method, which forgets what was found disabled before
    make = {
        "json": progress_bar.JsonProgressBar,
        "simple": progress_bar.SimpleProgressBar,
    }[kind]
    try:
        for epoch in (1, 2):
            bar = make([0, 1, 2], epoch, None, log_interval=1)
            for i, _ in enumerate(bar):
                update = (epoch - 1) * 3 + i + 1
                stats = {"loss": 6.0 - update, "accuracy": 10.0 * update, "num_updates": update}
                bar.log({**stats, "lr": 1e-3 / update}, tag="train_inner", step=update)
            bar.print({"loss": 9.5, "num_updates": 3 * epoch, "lr": 1e-3}, tag="train")
            valid = make([0], epoch, "valid on 'valid' subset", log_interval=1)
            stats = {"loss": 7.0 - epoch, "accuracy": 20.0 * epoch, "num_updates": 3 * epoch}
            valid.print({**stats, "best_accuracy": 20.0 * epoch}, tag="valid")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return stream.getvalue().splitlines()


EXPECTED = {
    "loss": {
        "train": [(u, 6.0 - u) for u in range(1, 7)],
        "valid": [(3, 6.0), (6, 5.0)],
    },
    "accuracy": {
        "train": [(u, 10.0 * u) for u in range(1, 7)],
        "valid": [(3, 20.0), (6, 40.0)],
    },
}


@pytest.mark.parametrize("kind", ["json", "simple"])
@pytest.mark.parametrize("bare", [False, True], ids=["stdout", "log-file"])
def test_curves_from_fairseqs_own_log(kind, bare):
    lines = fairseq_log(kind)
    assert len(lines) == 10
    if bare:  # --log-file has no time, level and name in front
        lines = [line.split(" | ", 3)[-1] for line in lines]
    noise = ["2026 | INFO | fairseq_cli.train | begin training epoch 1", '{"epoch": broken}', ""]
    curves = collect_curves(parse_log(noise + lines))
    assert {key: curves[key] for key in EXPECTED} == EXPECTED
    rates = dict(curves["lr"]["train"])
    assert rates == {u: pytest.approx(1e-3 / u, rel=1e-5) for u in range(1, 7)}


def test_curves_from_a_tqdm_bar():
    bar = (
        "epoch 002:  25%|##5       | 50/200 [00:10<00:30,  5.00it/s, loss=4.9, accuracy=12.5,"
        " num_updates=250, lr=0.001]"
    )
    still = "epoch 001 | valid on 'valid' subset:  50%|#####     | 5/10 [00:01<00:01,  5.00it/s]"
    assert list(parse_log([bar, still])) == [
        Point("train_inner", 2, 250, {"loss": 4.9, "accuracy": 12.5, "lr": 0.001})
    ]


def test_last_of_an_update_logged_twice_counts_and_nan_is_left_out():
    def line(update, loss):
        text = json.dumps({"epoch": 1, "update": 0.1, "loss": loss, "num_updates": str(update)})
        return f"x | INFO | train_inner | {text}"

    lines = [line(10, "5"), line(20, "4"), line(30, "nan"), line(20, "3.5")]
    assert collect_curves(parse_log(lines))["loss"] == {"train": [(10, 5.0), (20, 3.5)]}


def test_epoch_means_are_used_where_nothing_is_logged_inside():
    lines = [line for line in fairseq_log("json") if "train_inner" not in line]
    assert collect_curves(parse_log(lines))["loss"]["train"] == [(3, 9.5), (6, 9.5)]


def test_most_confused_pairs():
    matrix = np.array([[5, 2, 0], [3, 9, 0], [1, 0, 0]])
    assert plots.most_confused(matrix, ["a", "b", "c"], 2) == [("b", "a", 3), ("a", "b", 2)]
    assert plots.most_confused(np.diag([1, 2]), ["a", "b"], 5) == []
    assert matrix[0, 0] == 5  # the caller's matrix is left as it is


def pixels(path):
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[0] > 200 and image.shape[1] > 200
    return image


def reddish(image):
    """Number of clearly red pixels: what errors are drawn in."""
    return int(((image[..., 0] - image[..., 2] > 0.25) & (image[..., 0] > 0.7)).sum())


@pytest.mark.slow
def test_learning_curve_command(tmp_path):
    log, out = tmp_path / "train.log", tmp_path / "curve.png"
    log.write_text("\n".join(fairseq_log("simple")))
    done = processes.run(
        [sys.executable, "-m", "ext_common.plots", str(log), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    image = pixels(out)
    # Three panels one above the other: each has drawn pixels of the training curve's blue.
    blue = (image[..., 2] - image[..., 0]) > 0.35
    assert all(part.any() for part in np.array_split(blue, 3))


@pytest.mark.parametrize("chooses, marked", [("bleu", "3"), ("ter", "1"), (None, None)])
def test_the_metric_that_chooses_is_drawn_and_its_best_marked(chooses, marked, monkeypatch):
    """bleu is the largest, ter the least; where the log does not say, the loss alone is drawn."""
    values = {1: 2.0, 2: 1.0, 3: 3.0}
    best = {"bleu": max, "ter": min, None: max}[chooses]
    lines = []
    for epoch, value in values.items():
        row = {"epoch": epoch, "valid_loss": "5", "valid_num_updates": str(epoch)}
        row |= {"valid_accuracy": "9", f"valid_{chooses}": str(value)} if chooses else {}
        row |= (
            {f"valid_best_{chooses}": str(best(list(values.values())[:epoch]))} if chooses else {}
        )
        lines.append(json.dumps(row))
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, out: drawn.append(figure))
    plots.learning_curve(lines, "unused.png")
    panels = {axis.get_ylabel(): [text.get_text() for text in axis.texts] for axis in drawn[0].axes}
    assert list(panels) == ["loss", *filter(None, [chooses])]
    assert panels.get(chooses) == ([marked] if chooses else None)


def test_learning_curve_refuses_what_is_no_log(tmp_path):
    with pytest.raises(UserError, match="holds no training line"):
        plots.learning_curve(["hello"], tmp_path / "x.png")
    with pytest.raises(UserError, match=r"absent\.log cannot be read"):
        plots.learning_curve(tmp_path / "absent.log", tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [6, 251])
def test_confusion_matrix_shows_errors(tmp_path, count):
    names = [f"speaker {i} $\\alpha" for i in range(count)]
    matrix = np.eye(count, dtype=np.int64) * 4
    plots.confusion_matrix(matrix, names, tmp_path / "none.png")
    assert reddish(pixels(tmp_path / "none.png")) == 0
    matrix[1, 4] = 9
    plots.confusion_matrix(matrix, names, tmp_path / "one.png", title="test")
    assert reddish(pixels(tmp_path / "one.png")) > 200


def test_confusion_matrix_edges(tmp_path):
    plots.confusion_matrix(np.zeros((2, 2)), ["a", "b"], tmp_path / "zero.png")
    plots.confusion_matrix(np.zeros((40, 40)), [str(i) for i in range(40)], tmp_path / "z.png")
    pixels(tmp_path / "zero.png"), pixels(tmp_path / "z.png")
    with pytest.raises(ValueError, match="shape"):
        plots.confusion_matrix(np.zeros((2, 3)), ["a", "b"], tmp_path / "bad.png")


def test_scatter_has_a_legend_up_to_twenty(tmp_path):
    def picture(count):
        angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
        points = np.stack([np.cos(angle), np.sin(angle)], 1)
        path = tmp_path / f"{count}.png"
        plots.scatter_2d(points, [f"s{i:03d}" for i in range(count)], path)
        image = pixels(path)
        # Text is black; the legend lies right of the axes, in the last tenth of the picture.
        right = image[60:-60, int(image.shape[1] * 0.9) :]
        return int((right.max(-1) < 0.3).sum())

    assert picture(20) > 200
    assert picture(21) == 0


def test_scatter_edges(tmp_path):
    plots.scatter_2d(np.zeros((0, 2)), [], tmp_path / "empty.png")
    plots.scatter_2d(np.zeros((1, 2)), [3], tmp_path / "one.pdf")
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        plots.scatter_2d(np.zeros((3, 2)), ["a"], tmp_path / "bad.png")
