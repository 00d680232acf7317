"""Going on: at the same place of the data with other batches, and not beyond the end."""

import logging

import pytest
import torch

from ext_common import engine
from ext_common.compat.resume import find_place

engine.apply()

# 22 samples an epoch, so that 3 in a batch make 8 batches.
MID = ["--batch-size", 3, "--max-update", 4]


def chunks(samples, size):
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def shards(batches, count):
    return [batches[i::count] for i in range(count)]


def read(path):
    return torch.load(path, weights_only=False)


# --- where that is ------------------------------------------------------------------------------


def test_batches_that_are_only_shared_out_otherwise_go_on_exactly():
    batches = chunks(list(range(24)), 2)
    place = find_place(shards(batches, 4), 2, shards(batches, 2), freq=1)
    assert place == (4, 16, 24, 16, 0, 0)
    assert place.in_words().endswith("none comes again, none is left out")


def test_batches_of_another_size_go_on_after_as_many_samples():
    """Counted by hand: 12 seen of 22; of batches of 5 two, 10 samples, are nearest."""
    before, now = chunks(list(range(22)), 3), chunks(list(range(22)), 5)
    assert find_place([before], 4, [now], freq=1) == (2, 10, 22, 12, 2, 0)
    # In another order the first ten are others: 12 … 21 were seen by no one and are left out.
    assert find_place([before], 4, [chunks(list(range(21, -1, -1)), 5)], freq=1) == (
        *(2, 10, 22, 12, 12),
        10,
    )
    assert "12 of those seen come again in it and 10 others are left out" in (
        find_place([before], 4, [chunks(list(range(21, -1, -1)), 5)], freq=1).in_words()
    )


def test_the_place_is_one_between_updates():
    before, now = chunks(list(range(24)), 2), chunks(list(range(24)), 1)
    for done, freq, batches in ((3, 4, 4), (5, 4, 8), (5, 7, 7), (12, 5, 24), (11, 24, 24)):
        assert find_place([before], done, [now], freq).batches == batches


def test_shards_of_different_length():
    batches = chunks(list(range(7)), 1)
    assert find_place([batches], 6, [batches[0::2], batches[1::2] + [[]]], 1)[:3] == (3, 6, 7)


# --- a training goes on there -------------------------------------------------------------------


def test_another_batch_size_goes_on_at_the_same_place(train_here, caplog):
    """12 of 22 samples were seen; so many are a batch of 2 and two of 5: two more end the epoch."""
    saved = train_here("ck", *MID)
    train_here("ck", "--batch-size", 5, "--max-update", 6)
    assert (
        "--batch-size 3 → 5: epoch 1 goes on after 12 of its 22 samples (12 were seen)"
        in caplog.text
    )
    state = read(saved / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 6
    place = state["extra_state"]["train_iterator"]
    assert (place["epoch"], place["iterations_in_epoch"]) == (2, 0)


def test_fewer_batches_than_were_done_are_no_mismatch(train_here, caplog):
    """7 of 8 batches were done (19 samples: the last has 1); of 11 in a batch there are two in all."""
    train_here("ck", "--batch-size", 3, "--max-update", 7)
    train_here("ck", "--batch-size", 11, "--max-update", 8)
    assert "epoch 1 goes on after 22 of its 22 samples (19 were seen)" in caplog.text
    train_here("ck", "--batch-size", 11, "--max-update", 9)


def test_the_same_batches_go_on_as_ever(train_here, caplog):
    train_here("parts", *MID)
    parts = train_here("parts", "--batch-size", 3, "--max-update", 11)
    whole = train_here("whole", "--batch-size", 3, "--max-update", 11)
    assert "goes on" not in caplog.text
    one, two = (read(folder / "checkpoint_last.pt")["model"] for folder in (parts, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_smaller_data_set_begins_the_next_epoch(train_here, caplog, monkeypatch):
    import toy_plugin.toy as toy

    train_here("ck", "--batch-size", 3, "--max-update", 7)
    monkeypatch.setitem(toy.SIZES, "train", 12)
    saved = train_here("ck", "--batch-size", 3, "--max-update", 8)
    assert "epoch 1 has only 4 batches now: the next begins" in caplog.text
    place = read(saved / "checkpoint_last.pt")["extra_state"]["train_iterator"]
    assert (place["epoch"], place["iterations_in_epoch"]) == (2, 1)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_at_the_same_place(new_toy, reference):
    """2 processes, then 1: the same batches, so that in the end it is the uninterrupted run."""
    toy = new_toy()
    toy.train("ck", "--batch-size", 3, "--max-update", 6, "--distributed-world-size", 2)
    log = toy.train("ck", "--batch-size", 3, "--update-freq", 2, "--max-epoch", 4)
    assert "--update-freq 1 → 2, processes 2 → 1: epoch 2 goes on after 10 of its 22 samples" in log
    assert "none comes again, none is left out" in log
    one, two = (
        read(path)["model"]
        for path in (toy.folder / "ck" / "checkpoint4.pt", reference / "checkpoint4.pt")
    )
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6, msg=name)


# --- the end ------------------------------------------------------------------------------------


def test_a_finished_training_trains_no_more(train_here, caplog):
    caplog.set_level(logging.INFO)
    saved = train_here("ck", *MID)
    before = {path.name: path.read_bytes() for path in saved.glob("*.pt")}
    times = {path.name: path.stat().st_mtime_ns for path in saved.glob("*.pt")}
    train_here("ck", *MID)
    assert "already at 4 updates" in caplog.text
    assert {path.name: path.read_bytes() for path in saved.glob("*.pt")} == before
    assert {path.name: path.stat().st_mtime_ns for path in saved.glob("*.pt")} == times


def test_finished_epochs_are_said(train_here, caplog):
    caplog.set_level(logging.INFO)
    train_here("ck", "--batch-size", 11, "--max-epoch", 1)
    assert "already" not in caplog.text
    train_here("ck", "--batch-size", 11, "--max-epoch", 1)
    assert "already at the end of epoch 1 (--max-epoch 1)" in caplog.text


def test_hours_of_training_are_an_end_too(train_here, caplog):
    caplog.set_level(logging.INFO)
    saved = train_here("ck", "--batch-size", 3, "--stop-time-hours", 1e-9, "--max-update", 9)
    assert read(saved / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 1
    train_here("ck", "--batch-size", 3, "--stop-time-hours", 1e-9, "--max-update", 9)
    assert "hours of training (--stop-time-hours 1e-09 was asked for)" in caplog.text
    assert read(saved / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 1


def test_patience_goes_on_counting(train_here, caplog):
    """No loss is below 0, so that the first validation stays the best: two more end the training."""
    caplog.set_level(logging.INFO)
    flags = ["--batch-size", 22, "--patience", 2, "--lr", 0, "--max-update"]
    train_here("ck", *flags, 2)
    saved = train_here("ck", *flags, 9)
    state = read(saved / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 3
    assert state["extra_state"]["patience"]["num_runs"] == 2
    before = (saved / "checkpoint_last.pt").read_bytes()
    caplog.clear()
    train_here("ck", *flags, 9)
    assert "already at 2 validations without a better one (--patience 2)" in caplog.text
    assert (saved / "checkpoint_last.pt").read_bytes() == before
    train_here("ck", *flags, 9, "--patience", 3)
    assert read(saved / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 4
