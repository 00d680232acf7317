import pickle

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fairseq")

from fairseq.data import iterators
from torch.utils.data import DataLoader

from diffusion_ext.dataset import ImageDataset
from diffusion_ext.pictures import to_float
from diffusion_ext.prepare.options import ImageOptions
from diffusion_ext.store import open_images

N = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for n in range(N):
        path = folder / "data" / "ab"[n % 2] / f"{n:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (n, 2 * n, 255 - n)).save(path)
    options = ImageOptions(
        image_size=[5, 6], class_labels=True, image_store=str(folder / "store"), max_bad=0.0
    )
    return open_images(folder / "data", options)


def rows_of(dataset):
    return [dataset[i]["row"] for i in range(len(dataset))]


class TestInOrder:
    def test_samples(self, images):
        dataset = ImageDataset(images, np.array([7, 2, 9]))
        assert len(dataset) == 3 and rows_of(dataset) == [7, 2, 9]
        sample = dataset[1]
        assert sample["id"] == 1 and sample["label"] == images.labels[2]
        assert sample["image"].dtype == torch.uint8
        np.testing.assert_array_equal(sample["image"].numpy(), images.pixels[2])
        sample["image"].zero_()  # a copy: the store is left alone
        assert images.pixels[2].any()

    def test_epochs_change_nothing(self, images):
        dataset = ImageDataset(images, np.arange(N))
        dataset.set_epoch(5)
        assert rows_of(dataset) == list(range(N))
        assert dataset.can_reuse_epoch_itr_across_epochs
        with pytest.raises(ValueError, match="in order"):
            dataset.set_epoch_size(100, 1)


class TestShuffled:
    def dataset(self, images, seed=1, rows=None):
        return ImageDataset(images, np.arange(N) if rows is None else rows, seed, shuffle=True)

    @pytest.mark.parametrize("minimum, multiple", [(0, 1), (0, 4), (30, 8), (11, 11), (100, 7)])
    def test_size_and_shares(self, images, minimum, multiple):
        dataset = self.dataset(images)
        dataset.set_epoch_size(minimum, multiple)
        assert len(dataset) % multiple == 0
        assert max(minimum, N) <= len(dataset) < max(minimum, N) + multiple
        rows = rows_of(dataset)
        for start in range(0, len(rows) - N + 1, N):
            assert sorted(rows[start : start + N]) == list(range(N)), "a whole pass"
        counts = np.bincount(rows, minlength=N)
        assert counts.max() - counts.min() <= 1

    def test_of_seed_and_epoch_alone(self, images):
        dataset, again = self.dataset(images), self.dataset(images)
        orders = []
        for epoch in (1, 2, 3):
            dataset.set_epoch(epoch)
            orders.append(rows_of(dataset))
        assert len({tuple(order) for order in orders}) == 3
        again.set_epoch(3)
        again.set_epoch(2)
        assert rows_of(again) == orders[1]
        assert rows_of(self.dataset(images, seed=2)) != orders[0]
        assert not dataset.can_reuse_epoch_itr_across_epochs

    def test_a_longer_epoch_begins_like_a_shorter(self, images):
        dataset = self.dataset(images)
        dataset.set_epoch_size(15, 1)
        short = rows_of(dataset)
        dataset.set_epoch_size(50, 8)
        assert rows_of(dataset)[:15] == short
        assert short[:N] != rows_of(dataset)[N : 2 * N]

    def test_rows_alone(self, images):
        rows = np.array([3, 8])
        dataset = self.dataset(images, rows=rows)
        dataset.set_epoch_size(9, 3)
        assert set(rows_of(dataset)) == {3, 8} and len(dataset) == 9

    def test_no_global_generator(self, images):
        np.random.seed(0)
        torch.manual_seed(0)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        dataset = self.dataset(images)
        dataset.set_epoch(2)
        dataset.collater([dataset[0], dataset[5]])
        assert np.array_equal(np.random.get_state()[1], before[0])
        assert torch.equal(torch.get_rng_state(), before[1])


class TestBatches:
    def test_collater(self, images):
        dataset = ImageDataset(images, np.arange(N))
        batch = dataset.collater([dataset[4], dataset[9], dataset[4]])
        assert batch["nsentences"] == batch["ntokens"] == 3
        for key in ("id", "row"):
            assert batch[key].dtype == torch.int64 and batch[key].tolist() == [4, 9, 4]
        assert batch["label"].tolist() == images.labels[[4, 9, 4]].tolist()
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (3, 3, 5, 6)
        np.testing.assert_array_equal(batch["image"].numpy(), images.pixels[[4, 9, 4]])
        assert dataset.collater([]) == {}

    def test_what_fairseq_asks_for(self, images):
        dataset = ImageDataset(images, np.arange(N), shuffle=True)
        indices = dataset.ordered_indices()
        assert indices.dtype == np.int64 and indices.tolist() == list(range(N))
        assert dataset.num_tokens(3) == dataset.size(3) == 1
        assert dataset.num_tokens_vec(indices).tolist() == [1] * N
        assert dataset.sizes.dtype == np.int64
        batches = dataset.batch_by_size(indices, max_sentences=4)
        assert [len(b) for b in batches] == [4, 4, 3]

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_workers_change_nothing(self, images, context):
        dataset = ImageDataset(images, np.arange(N), 3, shuffle=True)
        dataset.set_epoch(2)
        dataset.set_epoch_size(24, 4)

        def load(**options):
            loader = DataLoader(dataset, 4, collate_fn=dataset.collater, **options)
            return list(loader)

        plain = load()
        again = load(num_workers=2, multiprocessing_context=context)
        assert len(plain) == len(again) == 6
        for one, other in zip(plain, again, strict=True):
            assert all(torch.equal(one[k], other[k]) for k in ("id", "row", "label", "image"))

    @pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_through_fairseqs_iterator(self, images, workers):
        """Two shards see the whole epoch, once, and the next epoch is another order."""
        seen = {}
        for epoch in (1, 2):
            for shard in (0, 1):
                dataset = ImageDataset(images, np.arange(N), 3, shuffle=True)
                dataset.set_epoch(epoch)
                dataset.set_epoch_size(24, 8)
                order = dataset.ordered_indices()
                iterator = iterators.EpochBatchIterator(
                    dataset=dataset,
                    collate_fn=dataset.collater,
                    batch_sampler=[order[i : i + 4].tolist() for i in range(0, 24, 4)],
                    num_shards=2,
                    shard_id=shard,
                    num_workers=workers,
                    epoch=epoch,
                    # as in training: read to its end in a thread, whose workers then end at once
                    persistent_workers=False,
                    buffer_size=10,
                )
                for batch in iterator.next_epoch_itr(shuffle=False):
                    ids, rows = batch["id"].tolist(), batch["row"].tolist()
                    seen.setdefault(epoch, {}).update(zip(ids, rows, strict=True))
        assert sorted(seen[1]) == list(range(24)) and seen[1] != seen[2]

    def test_pickled_small(self, images):
        dataset = ImageDataset(images, np.arange(N), 3, shuffle=True)
        again = pickle.loads(pickle.dumps(dataset))
        assert rows_of(again) == rows_of(dataset)


def test_to_float():
    x = to_float(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(((x + 1) * 127.5).round(), torch.arange(256).float())
