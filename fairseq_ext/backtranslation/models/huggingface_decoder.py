"""Decoding with Hugging Face's `generate` so that every option means what it means to fairseq.

Searches agree with fairseq's in what decides their output: scores are sums of log-probabilities divided by
(pieces + 1) ** lenpen, `</s>` counted; a sentence ends with `beam` finished hypotheses (early_stopping);
an output that reaches its limit ends there with the score that `</s>` then has. What differs: of hypotheses
that finish in one step beyond the `beam`-th, Hugging Face keeps the best ones and fairseq the first.
A card's own decoding defaults (num_beams, max_length 512, forced end) do not count, its bans do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)

from ext_common.cli import UserError
from ext_common.random import uniforms
from ext_common.threads import limited
from fairseq_ext.backtranslation.models.huggingface_vocabulary import (
    HuggingFaceVocabulary,
    positions,
)
from fairseq_ext.translation.decode.draws import draw
from fairseq_ext.translation.decode.options import Candidate, DecodeOptions, SampleOptions

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KEPT = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
_KEPT_TOO = ("forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens")


class HuggingFaceBackend:
    """Decodes ids with an encoder-decoder model of transformers."""

    name = "huggingface"
    workers = 1

    def __init__(
        self,
        model: Any,
        vocabulary: HuggingFaceVocabulary,
        device: str = "cpu",
        compute_type: str | None = None,
        threads: int | None = None,
    ):
        compute_type = compute_type or "float32"
        if compute_type not in _TYPES:
            raise UserError(
                f"the backend huggingface has no compute type {compute_type!r}: it has"
                f" {', '.join(_TYPES)} (int8 is one of the backend ctranslate2)"
            )
        self.threads = threads
        self.device = torch.device(device)
        self.model = model.to(self.device, _TYPES[compute_type]).eval()
        card = model.generation_config
        tokenizer = vocabulary.tokenizer
        self.eos, self.unk = tokenizer.eos_token_id, tokenizer.unk_token_id
        self.pad = card.pad_token_id if card.pad_token_id is not None else tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.eos
        self.start = first_of(card.decoder_start_token_id, card.bos_token_id, self.pad)
        words = card.bad_words_ids or []
        self.bad_words = [ids for ids in words if len(ids) > 1]
        single = {ids[0] for ids in words if len(ids) == 1}
        self.banned = sorted({*single, self.pad, self.start, *vocabulary.code_ids} - {self.eos})
        card = {name: getattr(card, name, None) for name in _KEPT + _KEPT_TOO}
        card |= {"pad_token_id": self.pad, "eos_token_id": self.eos}
        self._card = card | {"decoder_start_token_id": self.start}
        # generate takes from here what it is not told
        model.generation_config = GenerationConfig(**self._card)
        self.max_tokens = 1024 if self.device.type == "cpu" else 4096
        self.max_source, self.max_target = positions(model.config.to_dict(), tokenizer)

    def decode(
        self, batch: Sequence[Sequence[int]], options: DecodeOptions, limit: int
    ) -> list[list[Candidate]]:
        """For each source (ids, `</s>` at its end) the `nbest` best targets, best first.

        limit: the largest number of ids in a target, `</s>` not counted.
        """
        if options.beam == 1:
            return [[one] for one in self._choose(batch, options, limit, Choice(), options.lenpen)]
        totals = BeamTotals(len(batch), options.beam, self.eos)
        found = self._generate(
            batch,
            limit,
            [self._rules(options, limit), totals],
            num_beams=options.beam,
            num_return_sequences=options.nbest,
            length_penalty=float(options.lenpen),
            early_stopping=True,
        )
        # one row for each hypothesis
        rows = [found[n : n + options.nbest] for n in range(0, len(found), options.nbest)]
        scored = totals.scores(rows, options.lenpen)
        return [[Candidate(ids, score, len(ids) >= limit) for ids, score in one] for one in scored]

    def sample(
        self,
        batch: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: SampleOptions,
        limit: int,
    ) -> list[Candidate]:
        """For each source a target, drawn with its own seed from the whole vocabulary or a part."""
        # one more for </s>
        u = torch.from_numpy(uniforms(seeds, limit + 1, options.stream)).to(self.device)
        choice = Choice(u, options.topk, options.topp, options.temperature)
        return self._choose(batch, options, limit, choice, 1.0)

    def _choose(self, batch, options, limit: int, choice: "Choice", lenpen: float):
        found = self._generate(batch, limit, [Normalise(), self._rules(options, limit), choice])
        sums = torch.stack(choice.found, dim=1).double().cumsum(dim=1).tolist()
        return [
            Candidate(ids, total[len(ids)] / (len(ids) + 1) ** lenpen, len(ids) >= limit)
            for ids, total in zip(found, sums, strict=True)
        ]

    def _generate(self, batch, limit: int, processors, **search: Any) -> list[list[int]]:
        """Ids of what is generated, without start, `</s>` and padding."""
        longest = max(map(len, batch))
        ids = torch.full((len(batch), longest), self.pad)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, source in enumerate(batch):
            ids[row, : len(source)] = torch.tensor(source)
            mask[row, : len(source)] = 1
        config = GenerationConfig(**self._card, **search, do_sample=False, max_new_tokens=limit + 1)
        with limited(self.threads), torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
            )
        return [self._ended(row) for row in out[:, 1:].tolist()]

    def _ended(self, row: list[int]) -> list[int]:
        return row[: row.index(self.eos)] if self.eos in row else row

    def _rules(self, options: DecodeOptions, limit: int) -> "Rules":
        bans: list[LogitsProcessor] = []
        if options.no_repeat_ngram:
            bans.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram))
        if self.bad_words:
            bans.append(NoBadWordsLogitsProcessor(self.bad_words, self.eos))
        return Rules(bans, self.banned, self.eos, self.unk, options, limit)


class Normalise(LogitsProcessor):
    """Logits to log-probabilities, which beam search does by itself."""

    def __call__(self, input_ids, scores):
        return torch.log_softmax(scores.float(), dim=-1)


class Rules(LogitsProcessor):
    """What no output may hold, in fairseq's order: bans, <unk>, then where it may and must end."""

    def __init__(self, bans, banned: list[int], eos: int, unk: int | None, options, limit: int):
        self.bans, self.banned, self.eos, self.unk = bans, banned, eos, unk
        self.options, self.limit = options, limit

    def __call__(self, input_ids, scores):
        """input_ids (R, 1 + pieces so far), scores (R, V): log-probabilities."""
        pieces = input_ids.shape[1] - 1
        end = scores[:, self.eos].clone()
        for ban in self.bans:
            scores = ban(input_ids, scores)
        scores[:, self.banned] = -torch.inf
        if self.unk is not None:
            scores[:, self.unk] -= self.options.unkpen
        # where the first piece is </s>, as in BART, it counts as repeated
        scores[:, self.eos] = end
        if pieces >= self.limit:
            scores.fill_(-torch.inf)
            scores[:, self.eos] = end
        elif pieces < self.options.min_len:
            scores[:, self.eos] = -torch.inf
        return scores


class Choice(LogitsProcessor):
    """Leaves the one id that is best or, with numbers u (B, steps) in [0, 1), drawn.

    What a row gets depends on itself and its numbers only. found: log-probabilities, (B,) for each step.
    """

    def __init__(self, u=None, topk: int = 0, topp: float = 1.0, temperature: float = 1.0):
        self.u, self.how = u, (topk, topp, temperature)
        self.found: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        if self.u is None:
            found, ids = scores.max(dim=-1)
        else:
            ids, found = draw(scores, self.u[:, input_ids.shape[1] - 1], *self.how)
        self.found.append(found)
        scores = torch.full_like(scores, -torch.inf)
        return scores.scatter_(1, ids.unsqueeze(1), 0.0)


class BeamTotals(LogitsProcessor):
    """Follows a beam search to know the scores of its outputs.

    `generate` tells them only with the scores of the whole vocabulary at every step, gigabytes for a
    batch. Here one step's are kept: what went on is found again by its ids.
    """

    def __init__(self, batch: int, beam: int, eos: int):
        self.batch, self.beam, self.eos = batch, beam, eos
        self.ids = self.scores_of = self.totals = None
        # for each number of pieces: ids (batch, beam, pieces) and score of ending behind them
        self.ends: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids, scores):
        """input_ids (batch · beam, 1 + pieces so far), scores (batch · beam, V)."""
        ids = input_ids.view(self.batch, self.beam, -1)[:, :, 1:].clone()
        if self.ids is None:
            totals = torch.zeros(self.batch, self.beam, dtype=torch.float64, device=ids.device)
        else:
            # equal beginnings have equal scores, so the first that fits is as good as another
            same = (ids[:, :, None, :-1] == self.ids[:, None]).all(dim=-1)
            parent = same.to(torch.int8).argmax(dim=-1)
            rows = parent + torch.arange(self.batch, device=ids.device)[:, None] * self.beam
            step = self.scores_of[rows.flatten(), ids[:, :, -1].flatten()]
            totals = self.totals.gather(1, parent) + step.view(self.batch, self.beam)
        self.ids, self.scores_of, self.totals = ids, scores, totals
        self.ends.append((ids, totals + scores[:, self.eos].view(self.batch, self.beam)))
        return scores

    def scores(self, rows: Sequence[list[list[int]]], lenpen: float):
        """For each source its different outputs with their scores, best first."""
        ends = [(ids.tolist(), totals.tolist()) for ids, totals in self.ends]
        found = []
        for source, outputs in enumerate(rows):
            scored: dict[tuple[int, ...], float] = {}
            for output in outputs:
                if len(output) >= len(ends):
                    continue
                ids, totals = ends[len(output)]
                if output in ids[source]:
                    total = totals[source][ids[source].index(output)]
                    if total > -torch.inf:
                        scored[tuple(output)] = total / (len(output) + 1) ** lenpen
            best = sorted(scored.items(), key=lambda one: -one[1])
            found.append([(list(ids), score) for ids, score in best])
        return found


def first_of(*values: int | None) -> int:
    return next(value for value in values if value is not None)
