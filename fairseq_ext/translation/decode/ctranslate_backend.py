"""Decoding with a model that CTranslate2 has already: what opening and converting one both stand on."""

import threading
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from ext_common.cli import UserError
from fairseq_ext.translation.decode.options import Candidate, DecodeOptions, SampleOptions
from fairseq_ext.translation.text.spm import SPECIALS

VERSION = 1  # of what a converted folder holds
DESCRIPTION = "translation.json"
# Zero would let CTranslate2 stop at the first finished hypothesis, which fairseq never does.
_NO_PENALTY = 1e-9
_SPECIAL_TOKENS = ["<s>", "<blank>", "</s>", "<unk>"]
_SEEDING = threading.Lock()


class CTranslate2Backend:
    """Decodes ids with a converted model.

    model: a ctranslate2.Translator whose tokens are :func:`tokens`. positions: of source and target.
    size: of the target vocabulary. reopen: makes another such Translator with one worker, for `sample`.
    shortlist: whether `decode` keeps to the model's map of pieces, of all sources in a batch together.
    """

    name = "ctranslate2"
    shortlist = False

    def __init__(
        self,
        model: Any,
        positions: Sequence[int],
        size: int,
        reopen: Callable[[], Any] | None = None,
    ):
        self.model, self.size, self.reopen = model, size, reopen
        self.max_source, self.max_target = positions
        self.max_tokens = 1024 if model.device == "cpu" else 4096
        self.workers = model.num_translators

    def decode(
        self, batch: Sequence[Sequence[int]], options: DecodeOptions, limit: int
    ) -> list[list[Candidate]]:
        """For each source (ids, `</s>` at its end) the `nbest` best targets, best first."""
        search = {
            "beam_size": min(options.beam, self.size - 1),
            "num_hypotheses": min(options.nbest, self.size - 1),
            # as in fairseq, scores are divided by the length with </s> to this power
            "length_penalty": options.lenpen or _NO_PENALTY,
            "use_vmap": self.shortlist,
        }
        return self._translate(self.model, batch, options, limit, **search)

    def sample(
        self,
        batch: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: SampleOptions,
        limit: int,
    ) -> list[Candidate]:
        """For each source a target, drawn by CTranslate2's one generator for all rows of a batch.

        So on a CPU the whole answer depends on (batch, seeds, options, limit) alone, and a batch that is
        drawn again is the same to the byte; but what a line gets depends on its neighbours in the batch too.
        """
        digest = blake2b(" ".join(map(str, seeds)).encode(), digest_size=4).digest()
        # a thread has a generator, seeded when it first draws: a new model has a new thread
        with _SEEDING:
            set_seed(int.from_bytes(digest, "little"))
            assert self.reopen is not None
            model = self.reopen()
            # an empty source would draw nothing
            self._translate(model, [max(batch, key=len)[-2:]], SampleOptions(), 1, sampling_topk=0)
        drawn = {
            "sampling_topk": min(options.topk, self.size - 1),
            "sampling_topp": options.topp,
            "sampling_temperature": options.temperature,
        }
        found = self._translate(model, batch, options, limit, beam_size=1, **drawn)
        return [one for (one,) in found]

    def _translate(
        self,
        model: Any,
        batch: Sequence[Sequence[int]],
        options: DecodeOptions,
        limit: int,
        **how: Any,
    ) -> list[list[Candidate]]:
        if 0 < options.unkpen < float("inf"):
            raise UserError(
                "the backend ctranslate2 either allows <unk> (--unkpen 0) or not (inf): "
                "another --unkpen needs --backend fairseq"
            )
        results = model.translate_batch(
            self._sources(batch),
            no_repeat_ngram_size=options.no_repeat_ngram,
            disable_unk=options.unkpen > 0,
            max_input_length=0,
            # one more for </s>, which fairseq does not count
            max_decoding_length=limit + 1,
            min_decoding_length=min(options.min_len, limit),
            return_scores=True,
            **how,
        )
        return [self._candidates(result, limit) for result in results]

    def _sources(self, batch: Sequence[Sequence[int]]) -> list[list[str]]:
        # the model itself adds </s>
        return [list(map(token, ids[:-1])) for ids in batch]

    def _candidates(self, result: Any, limit: int) -> list[Candidate]:
        # an output that did not end has one piece more, where fairseq has </s>
        found = (list(map(self._id, tokens[:limit])) for tokens in result.hypotheses)
        return [
            Candidate(ids, score, len(ids) >= limit)
            for ids, score in zip(found, result.scores, strict=True)
        ]

    def _id(self, token: str) -> int:
        return int(token) if token[0] != "<" else _SPECIAL_TOKENS.index(token)


def set_seed(seed: int) -> None:
    """The seed of generators of threads that have not drawn yet."""
    import_ctranslate2().set_random_seed(seed)


def tokens(size: int) -> list[str]:
    """The vocabulary that CTranslate2 sees: ids as text, so that no two pieces can collide."""
    return [*_SPECIAL_TOKENS, *map(str, range(SPECIALS, size))]


def token(i: int) -> str:
    """The name of an id in that vocabulary."""
    return str(i) if i >= SPECIALS else _SPECIAL_TOKENS[i]


def import_ctranslate2() -> Any:
    try:
        import ctranslate2
    except ImportError as error:
        raise UserError(
            f"the backend ctranslate2 cannot be used ({error}): pip install ctranslate2,"
            " or use --backend fairseq"
        ) from error
    return ctranslate2
