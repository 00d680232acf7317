"""SentencePiece for one side of a bitext: training, text to ids and back.

The models are trained with the special symbols where fairseq's dictionaries have them (<s> 0, <pad> 1,
</s> 2, <unk> 3), so the id of a piece *is* its id in fairseq: no second table can disagree with the first.
"""

import hashlib
import io
import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import Any

from ext_common.cli import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIALS = 4
BYTE_PIECES = 256
KINDS = ("unigram", "bpe")
# Lines that SentencePiece holds in memory to train on; more changes a vocabulary of 32,000 hardly.
TRAINING_LINES = 1_000_000
# Of the characters in the text; the others are spelled in bytes.
COVERAGE = 0.9995
# Always pieces: a small corpus has few questions, and bytes for a question mark are learnt badly.
ALWAYS = string.digits + string.punctuation
# Inserted behind the first character of what looks like an extra symbol; text that went through
# text.normalise holds none.
_JOINER = "\u2060"


class Codec:
    """Text of one language to ids and back, by a SentencePiece model; picklable.

    model: the bytes of a SentencePiece model made by :func:`train_model`.
    extra_symbols: its user-defined symbols, such as `<BT>`, which text never turns into.
    Raises UserError where the model is none, or has its special symbols elsewhere.
    """

    def __init__(self, model: bytes, extra_symbols: Sequence[str] = (), name: str = "the model"):
        self.model, self.extra_symbols, self.name = model, tuple(extra_symbols), name
        self._check()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], extra_symbols: Sequence[str] = ()) -> "Codec":
        try:
            with open(path, "rb") as file:
                model = file.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        return cls(model, extra_symbols, os.fspath(path))

    def encode(self, text: str) -> list[int]:
        """Ids of the best segmentation of normalised text, without `</s>`."""
        ids: list[int] = self.processor.encode(self.escape(text))
        return ids

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """:meth:`encode` of each text."""
        escaped = [self.escape(text) for text in texts]
        ids: list[list[int]] = self.processor.encode(escaped, num_threads=threads)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, byte pieces joined to characters.

        Special and extra symbols are left out; bytes that are no character become U+FFFD.
        """
        kept = [i for i in map(int, ids) if i >= SPECIALS and i not in self._extra_ids]
        return self.unescape(self.processor.decode(kept)) if kept else ""

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self.processor.id_to_piece(int(i)) for i in ids]

    def symbol_id(self, symbol: str) -> int:
        """The id of an extra symbol; UserError where the model has no such."""
        if symbol not in self.extra_symbols:
            known = ", ".join(self.extra_symbols) or "none"
            raise UserError(
                f"{self.name} has no symbol {symbol} (known: {known}): prepare the bitext with "
                f"--extra-symbols '{symbol}'"
            )
        return int(self.processor.piece_to_id(symbol))

    def escape(self, text: str) -> str:
        """Text in which no extra symbol occurs; the inverse of :meth:`unescape`."""
        if self._symbols is None or self._symbols.search(text) is None:
            return text
        return str(self._symbols.sub(lambda m: f"{m[0][0]}{_JOINER}{m[0][1:]}", text))

    def unescape(self, text: str) -> str:
        if _JOINER not in text or self._symbols is None:
            return text
        return str(self._symbols.sub(lambda m: m[0].replace(_JOINER, "", 1), text))

    @cached_property
    def processor(self) -> Any:
        """The SentencePieceProcessor."""
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_proto=self.model)
        except Exception as error:
            raise UserError(f"{self.name} is not a SentencePiece model, or is damaged") from error

    @property
    def size(self) -> int:
        """Number of ids, the four special ones among them."""
        return int(self.processor.get_piece_size())

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    @cached_property
    def kind(self) -> str:
        """ "unigram" or "bpe"."""
        # The scores of BPE pieces are their ranks, 0, -1, -2, …; of unigram, log-probabilities.
        ordinary = range(SPECIALS + BYTE_PIECES + len(self.extra_symbols), self.size)
        scores = (self.processor.get_score(i) for i in ordinary)
        return "bpe" if all(score == int(score) for score in scores) else "unigram"

    @cached_property
    def _extra_ids(self) -> frozenset[int]:
        return frozenset(self.processor.piece_to_id(symbol) for symbol in self.extra_symbols)

    @cached_property
    def _symbols(self) -> re.Pattern[Any] | None:
        """Matches an extra symbol with any number of joiners behind its first character."""
        if not self.extra_symbols:
            return None
        parts = (f"{re.escape(s[0])}{_JOINER}*{re.escape(s[1:])}" for s in self.extra_symbols)
        return re.compile("|".join(parts))

    def _check(self) -> None:
        processor = self.processor
        found = tuple(getattr(processor, f"{name}_id")() for name in ("bos", "pad", "eos", "unk"))
        if found != (BOS, PAD, EOS, UNK):
            raise UserError(
                f"{self.name} has <s>, <pad>, </s>, <unk> at {found}, not at 0 to 3: only models "
                "made by fairseq_ext.translation.prepare can be used"
            )
        for symbol in self.extra_symbols:
            if processor.piece_to_id(symbol) == UNK:
                raise UserError(f"{self.name} does not have the symbol {symbol} it is said to have")

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "extra_symbols": self.extra_symbols, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def train_model(
    files: Sequence[str | os.PathLike[str]],
    size: int | None = None,
    kind: str = "unigram",
    pairs: int | None = None,
    extra_symbols: Sequence[str] = ("<BT>",),
    seed: int = 1,
    threads: int = 2,
    coverage: float = COVERAGE,
) -> bytes:
    """A SentencePiece model of the lines of `files` (UTF-8, normalised), as bytes.

    size: wanted vocabulary size; None: :func:`default_size`. Where the text has not
    enough different pieces for it, the model is as large as the text allows.
    pairs: number of pairs; None: the lines of the first file.
    kind: "unigram" (Kudo 2018) or "bpe" (Sennrich et al. 2016). Bytes are pieces, so nothing is
    unknown; digits are pieces of their own. coverage: part of the characters that are pieces of their
    own, as ASCII digits and punctuation always are; rarer ones are spelled in bytes.
    Raises UserError where the text gives no model.
    """
    import sentencepiece

    if kind not in KINDS:
        raise UserError(f"unknown kind of SentencePiece model {kind!r}: known: {', '.join(KINDS)}")
    check_symbols(extra_symbols)
    if size is None:
        count = sum(1 for _ in _lines(files)) if pairs is None else pairs
        size = default_size(count, _characters(files, coverage))
    least = SPECIALS + BYTE_PIECES + len(extra_symbols)
    if size <= least:
        raise UserError(
            f"a vocabulary of {size} is too small: {least} are taken by bytes and symbols"
        )
    sentencepiece.set_random_generator_seed(seed)
    for attempt in range(8):
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=chain.from_iterable(map(_read, files)),
                model_writer=model,
                model_type=kind,
                vocab_size=size,
                hard_vocab_limit=kind == "bpe",
                character_coverage=coverage,
                required_chars=ALWAYS,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                user_defined_symbols=list(extra_symbols),
                bos_id=BOS,
                pad_id=PAD,
                eos_id=EOS,
                unk_id=UNK,
                input_sentence_size=TRAINING_LINES,
                shuffle_input_sentence=True,
                max_sentence_length=1 << 16,
                num_threads=threads,
                minloglevel=2,
            )
            return model.getvalue()
        except (RuntimeError, OSError) as error:
            size = _other_size(size, str(error))
            if size is None or attempt == 7:
                raise UserError(
                    f"SentencePiece makes no model of {', '.join(map(str, files))}: "
                    f"{_reason(str(error))}"
                ) from error
    raise AssertionError("unreachable")


def check_symbols(symbols: Sequence[str]) -> None:
    """UserError where an extra symbol cannot be one."""
    for symbol in symbols:
        if (
            len(symbol) < 2
            or re.search(r"\s|\u2581", symbol)
            or symbol in ("<s>", "</s>", "<pad>", "<unk>")
        ):
            raise UserError(
                f"{symbol!r} cannot be an extra symbol: it needs at least two characters without "
                "white space, such as <BT>"
            )


def default_size(pairs: int, characters: int) -> int:
    """Vocabulary size that follows the corpus: all characters, and as many longer pieces as it can teach.

    characters + 256 bytes + max(500, 22,000 · (pairs / 10⁶)^0.8), at most 32,000, in hundreds. Little
    data learns faster from few, frequent pieces (Sennrich & Zhang 2019).
    """
    size = characters + BYTE_PIECES + max(500, 22_000 * (max(pairs, 1) / 1e6) ** 0.8)
    return int(min(32_000, round(size, -2)))


def _characters(files: Sequence[str | os.PathLike[str]], coverage: float = COVERAGE) -> int:
    """How many different characters make up `coverage` of the text."""
    counts: Counter[str] = Counter()
    for line in islice(chain.from_iterable(map(_read, files)), TRAINING_LINES):
        counts.update(line)
    wanted, needed = coverage * counts.total(), 0
    for _, count in counts.most_common():
        if wanted <= 0:
            break
        wanted, needed = wanted - count, needed + 1
    return needed


def _read(path: str | os.PathLike[str]) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")


def _lines(files: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    return _read(files[0]) if files else iter(())


def _other_size(size: int, message: str) -> int | None:
    """The size SentencePiece says it could do, None where its error is about something else."""
    for pattern, step in ((r"<= (\d+)", 0), (r"vocab_size\(\d+\) (?:should be|is) .*?(\d+)", 1)):
        match = re.search(pattern, message)
        if match and int(match[1]) + step != size:
            return int(match[1]) + step
    match = re.search(r"smaller than required_chars.*?(\d+) vs (\d+)", message)
    return int(match[2]) + 100 if match else None


def _reason(message: str) -> str:
    return " ".join(message.split())[-200:]
