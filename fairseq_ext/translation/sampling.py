"""Subword regularisation: training text cut into other pieces in every epoch.

Unigram models draw a segmentation x of a sentence with probability ∝ P(x)^α, by forward filtering and
backward sampling over all of them (Kudo 2018, section 3.2, l = ∞). BPE models leave out each possible merge
with probability p (BPE-dropout, Provilkov et al. 2020, algorithm 1). All randomness comes from a generator
that the caller gives: SentencePiece's own is one for the process, so that workers and resumes would differ.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from fairseq.data import BaseWrapperDataset

from ext_common.cli import UserError
from fairseq_ext.translation.text.spm import SPECIALS, Codec

_SPACE = "\u2581"
_CACHED_WORDS = 1 << 16
_MEASURED = 500


class SubwordSampler:
    """Other segmentations of sentences that `codec` has encoded.

    strength: α in (0, ∞] of a unigram model (0.1 to 0.5 are usual, ∞ is the best segmentation always);
    p in [0, 1] of a BPE model (0.1 is usual, 0 is the plain encoding, 1 leaves single characters).
    Extra symbols and byte pieces stay as they are.
    """

    def __init__(self, codec: Codec, strength: float):
        check_strength(codec, strength)
        self.codec, self.strength = codec, strength
        processor = codec.processor
        fixed = {codec.symbol_id(symbol) for symbol in codec.extra_symbols}
        own = [
            i for i in range(SPECIALS, codec.size) if i not in fixed and not processor.is_byte(i)
        ]
        names = codec.pieces(own)
        self._name = dict(zip(own, names, strict=True))
        self._piece = {n: (i, processor.get_score(i)) for i, n in zip(own, names, strict=True)}
        self._longest = max(map(len, names))
        # no piece reaches over a space, so that words can be cut one by one, and remembered
        self._words = all(_SPACE not in name.lstrip(_SPACE) for name in names)
        self._cut = self._sample_merges if codec.kind == "bpe" else self._sample_path
        self._lattice = lru_cache(_CACHED_WORDS)(self._forward)

    def __getstate__(self) -> dict[str, Any]:
        return {"codec": self.codec, "strength": self.strength}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def sample(self, ids: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Ids that spell what `ids` spell; the same for the same `rng`."""
        found: list[int] = []
        for run in self._runs(ids):
            if isinstance(run, int):
                found.append(run)
            else:
                for word in self._split(run):
                    found += self._cut(word, rng)
        return found

    def _runs(self, ids: Sequence[int]) -> Iterator[int | str]:
        """Text between pieces that stay, and those."""
        text: list[str] = []
        for i in map(int, ids):
            name = self._name.get(i)
            if name is not None:
                text.append(name)
                continue
            if text:
                yield "".join(text)
                text = []
            yield i
        if text:
            yield "".join(text)

    def _split(self, text: str) -> list[str]:
        """The words of a run, each with the spaces before it."""
        if not self._words:
            return [text]
        starts = [
            k for k, c in enumerate(text) if c == _SPACE and (k == 0 or text[k - 1] != _SPACE)
        ]
        edges = sorted({0, *starts, len(text)})
        return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]

    # --- unigram ---

    def _sample_path(self, word: str, rng: np.random.Generator) -> list[int]:
        lattice = self._lattice(word)
        draws = rng.random(len(word)).tolist()
        found: list[int] = []
        end = len(word)
        while end:
            cumulative, edges = lattice[end]
            # a draw can equal the last sum where that is rounded below 1
            start, i = edges[min(bisect_right(cumulative, draws[end - 1]), len(edges) - 1)]
            found.append(i)
            end = start
        return found[::-1]

    def _forward(self, word: str) -> list[tuple[list[float], list[tuple[int, int]]]]:
        """For each end: cumulative probabilities of the pieces that end there, and (start, id) of each."""
        alpha = self.strength
        total = [0.0] + [-math.inf] * len(word)
        lattice: list = [([], [])]
        for end in range(1, len(word) + 1):
            edges, weights = [], []
            for start in range(max(0, end - self._longest), end):
                piece = self._piece.get(word[start:end])
                if piece is not None and total[start] > -math.inf:
                    edges.append((start, piece[0]))
                    weights.append(
                        total[start] + (piece[1] if alpha == math.inf else alpha * piece[1])
                    )
            if edges:
                best = max(weights)
                if alpha == math.inf:
                    parts = [float(weight == best) for weight in weights]
                    total[end] = best
                else:
                    parts = [math.exp(weight - best) for weight in weights]
                    total[end] = best + math.log(sum(parts))
                whole = sum(parts)
                lattice.append((list(accumulate(part / whole for part in parts)), edges))
            else:
                lattice.append(([], []))
        return lattice

    # --- BPE ---

    def _sample_merges(self, word: str, rng: np.random.Generator) -> list[int]:
        parts = list(word)
        while len(parts) > 1:
            pairs = [self._piece.get(a + b) for a, b in zip(parts, parts[1:], strict=False)]
            kept = rng.random(len(pairs)) >= self.strength
            possible = [(-pair[1], k) for k, pair in enumerate(pairs) if pair and kept[k]]
            if not possible:
                break
            k = min(possible)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        found: list[int] = []
        for part in parts:
            piece = self._piece.get(part)
            found += [piece[0]] if piece else self._bytes(part)
        return found

    def _bytes(self, text: str) -> list[int]:
        return [self.codec.processor.piece_to_id(f"<0x{b:02X}>") for b in text.encode()]


class SampledPairs(BaseWrapperDataset):
    """A LanguagePairDataset whose sentences are cut anew in every epoch.

    samplers: "source" and/or "target" → sampler; limits: the longest a side may become, in pieces with
    </s>, beyond which it stays plain. What index i is cut into depends on (seed, epoch, i) only. Sizes are
    those of the plain encoding times :attr:`growth`; a batch that still exceeds `budget` (padded pieces,
    as --max-tokens) has its longest sentences plain.
    """

    def __init__(
        self, dataset, samplers: dict[str, SubwordSampler], limits: dict[str, int], seed: int
    ):
        super().__init__(dataset)
        self.samplers, self.limits, self.seed = samplers, limits, seed
        self.epoch = 1
        self.budget: int | None = None
        self.growth = self._measure()

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        example["plain"] = {side: example[side] for side in self.samplers}
        for number, side in enumerate(("source", "target")):
            if side in self.samplers:
                rng = np.random.default_rng((self.seed, self.epoch, int(index), number))
                example[side] = self._recut(side, example[side], rng)
        return example

    def collater(self, samples, **kwargs):
        budget = self.budget or math.inf
        for side in self.samplers:
            for example in sorted(samples, key=lambda example: -len(example[side])):
                if len(samples) * max(len(other[side]) for other in samples) <= budget:
                    break
                example[side] = example["plain"][side]
        return self.dataset.collater(samples, **kwargs)

    def num_tokens_vec(self, indices):
        """int64: expected size of each sentence, for batching."""
        return np.ceil(self.dataset.num_tokens_vec(indices) * self.growth).astype(np.int64)

    def filter_indices_by_size(self, indices, max_sizes):
        return self.dataset.filter_indices_by_size(indices, max_sizes)

    def _recut(self, side: str, tokens, rng: np.random.Generator):
        *ids, eos = tokens.tolist()
        cut = self.samplers[side].sample(ids, rng)
        if len(cut) + 1 > self.limits[side]:
            return tokens
        return tokens.new_tensor([*cut, eos])

    def _measure(self) -> float:
        """The growth in size that nine in ten sentences stay below."""
        ratios = [1.0]
        for index in np.linspace(0, len(self.dataset) - 1, min(_MEASURED, len(self.dataset))):
            example = self[int(index)]
            plain = {"source": example["source"], "target": example["target"], **example["plain"]}
            sizes = [max(len(found[side]) for side in plain) for found in (example, plain)]
            ratios.append(sizes[0] / sizes[1])
        return max(1.0, float(np.quantile(ratios, 0.9)))


def check_strength(codec: Codec, strength: float) -> None:
    """UserError for a strength that the kind of model has no use for."""
    if codec.kind == "bpe" and not 0 <= strength <= 1:
        raise UserError(
            f"--subword-sampling {strength} is no probability: of a BPE model it is the share of merges"
            " left out, such as 0.1"
        )
    if codec.kind == "unigram" and not strength > 0:
        raise UserError(f"--subword-sampling {strength} is not above 0: give an α such as 0.2")
