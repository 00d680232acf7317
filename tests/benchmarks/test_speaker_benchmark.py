"""The benchmark compares like with like, and one command runs all of it."""

import json
import sys

import numpy as np
import pytest
import torch

from tests import processes

fairseq = pytest.importorskip("fairseq")

from benchmarks import common  # noqa: E402
from benchmarks.speaker import cases, peers  # noqa: E402


@pytest.fixture
def pair():
    peer, ours = peers.torchaudio_network(), peers.our_network()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    peers.copy_weights(peer, ours)
    return ours, peer


def crops(number=4):
    return torch.randn(number, 33, peers.N_MELS, generator=torch.Generator().manual_seed(1))


def test_same_parameters(pair):
    ours, peer = pair
    assert peers.count(ours) == peers.count(peer)
    assert peers.encoder_parameters(ours) == peers.encoder_parameters(peer)


@pytest.mark.parametrize("batch", [2, 17])
def test_same_function_in_evaluation(pair, batch):
    """17 utterances take the path by convolutions, 2 that by matrix products."""
    ours, peer = (network.eval() for network in pair)
    x = crops(batch)
    with torch.no_grad():
        a, b = ours(x), peer(x)
    torch.testing.assert_close(a["embedding"], b["embedding"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a["logits"], b["logits"], rtol=1e-4, atol=1e-5)


def test_same_gradients_without_dropout(pair):
    for network in pair:
        for module in network.modules():
            if "Dropout" in type(module).__name__:
                module.p = 0.0
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
    ours, peer = (network.train() for network in pair)
    x, target = crops(17), torch.arange(17)
    for network in (ours, peer):
        torch.nn.functional.cross_entropy(30 * network(x)["logits"], target).backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(p.grad)
    holder = peers.our_network()
    peers.copy_weights(peer, holder)
    for name, p in holder.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=2e-3, atol=2e-4, msg=name)


def test_both_have_the_same_dropouts(pair):
    def rates(network):
        modules = list(network.encoder.modules())
        found = [m.p for m in modules if "Dropout" in type(m).__name__]
        return found + [m.dropout for m in modules if isinstance(m, torch.nn.MultiheadAttention)]

    ours, peer = (rates(network) for network in pair)
    # six in a block: two in each feed-forward, attention's output and the convolution's; torchaudio
    # holds that on the attention weights as a number, and one module is used twice by ours
    assert set(ours) == set(peer) == {0.1}


def test_copying_misses_no_weight(pair):
    ours, peer = pair
    peer.encoder.conformer.conformer_layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError):
        peers.copy_weights(peer, ours)


def test_both_readers_give_the_same_frames(tmp_path):
    cases.write_utterances(tmp_path, 6)
    size = cases.Size.quick()
    store = cases.reading_side("store", size, tmp_path)
    files = cases.reading_side("torch.load", size, tmp_path)
    corpus = store.dataset.corpus
    assert [len(torch.load(f)) for f in files.files] == corpus.lengths.tolist()
    for row, file in enumerate(files.files):
        assert np.array_equal(corpus.read(row), torch.load(file).numpy())
    crop, label = files.item(3)
    whole = corpus.read(3)
    starts = range(len(whole) - len(crop) + 1)
    assert any(np.array_equal(whole[s : s + len(crop)], crop) for s in starts)
    assert len(crop) == min(cases.CROP, len(whole)) and label == corpus.labels[3]
    assert files() == 6


def test_ratio_is_of_medians():
    found = common.compare([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])
    assert found == {"ratio": 4.0, "ratio_min": 2.0, "ratio_max": 4.0}


@pytest.mark.slow
def test_every_side_runs_every_round():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or 1 for name in "ab"}
    rates = common.alternate(sides, 3, warmup=2, before=lambda name: calls.append(name.upper()))
    assert {name: len(rate) for name, rate in rates.items()} == {"a": 3, "b": 3}
    assert sorted(calls) == sorted("aAbB" * 5)
    assert all(
        first == second.upper() for first, second in zip(calls[::2], calls[1::2], strict=True)
    )


def test_memory_of_what_is_known(repo_root):
    # In a process of its own, as the benchmarks do: here the system may take back pages meanwhile.
    program = (
        "import json, numpy as np; from benchmarks import common; "
        "work = lambda: np.ones(40_000_000, dtype=np.uint8).sum(); work(); "
        "print(json.dumps(common.memory_increase(work)))"
    )
    command = [sys.executable, "-c", program]
    done = processes.run(command, cwd=repo_root, capture_output=True, text=True, check=True)
    assert 36 < json.loads(done.stdout)["peak_mb"] < 60


@pytest.mark.slow
def test_the_command(repo_root, tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.speaker", "--quick", "--threads", "1"]
    command += ["--output", str(output), "--folder", str(tmp_path)]
    done = processes.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert [case["case"] for case in figures["cases"]] == [
        "training step, 1 thread",
        "reading crops, page cache warm",
        "reading crops, page cache cold",
        "embedding whole utterances",
    ]
    for case in figures["cases"]:
        assert case["ratio"] > 0 and case["against"] in case["sides"]
        assert case["case"] in done.stdout
        for side in case["sides"].values():
            assert side["median"] > 0
    counts = figures["cases"][-1]["parameters"]
    assert all(abs(n / counts["ours"] - 1) <= 0.1 for n in counts.values())
    assert list(tmp_path.iterdir()) == [output]
