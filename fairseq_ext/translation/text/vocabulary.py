"""fairseq's dictionary and bpe on top of a SentencePiece model, which alone turns pieces into text.

fairseq undoes subwords by replacing strings, on which byte pieces, extra symbols and hypotheses without
"▁" fail. Here what is shown remembers what it is: :class:`Pieces` carries its text, and :class:`Text` is
never decoded again, so that `fairseq-generate` and `fairseq-interactive` print text with and without
--remove-bpe.
"""

from collections.abc import Iterable
from typing import Any

import torch
from fairseq.data import Dictionary

from ext_common.cli import UserError
from fairseq_ext.translation.score.metrics import CorpusScorer
from fairseq_ext.translation.text.normalise import normalise, repaired, written
from fairseq_ext.translation.text.spm import SPECIALS, Codec


class Text(str):
    """Text as a reader sees it."""


class Pieces(str):
    """Pieces separated by spaces, with the text that they spell."""

    text: Text

    def __new__(cls, pieces: str, text: str):
        new = super().__new__(cls, pieces)
        new.text = Text(text)
        return new


class SpmDictionary(Dictionary):
    """The pieces of a SentencePiece model under the ids that the model itself gives them.

    lang: the language of the texts, by whose rule output is detokenised. Nothing is ever added.
    always_text: show text even where pieces are asked for; fairseq-interactive does not decode its S lines.
    """

    def __init__(self, codec: Codec, lang: str, always_text: bool = False):
        super().__init__()
        self.codec, self.lang, self.always_text = codec, lang, always_text
        for piece in codec.pieces(range(SPECIALS, codec.size)):
            self.add_symbol(piece)

    def scorer(self) -> CorpusScorer:
        """What `fairseq-generate` ends with where `--scoring` does not say: by the language's rules."""
        return CorpusScorer(self.lang)

    def string(
        self,
        tensor,
        bpe_symbol=None,
        escape_unk=False,
        extra_symbols_to_ignore=None,
        unk_string=None,
        include_eos=False,
        separator=" ",
    ) -> str:
        """Text of ids where `bpe_symbol` is set, else their pieces (which carry it).

        escape_unk marks a reference, as fairseq uses it: its text is given as it is, not detokenised.
        """
        if torch.is_tensor(tensor) and tensor.dim() == 2:
            return "\n".join(
                self.string(row, bpe_symbol, escape_unk, extra_symbols_to_ignore) for row in tensor
            )
        ignored = {*(extra_symbols_to_ignore or ()), self.bos()}
        if not include_eos:
            ignored.add(self.eos())
        ids = [i for i in map(int, tensor) if i not in ignored]
        text = self.codec.decode(ids) if escape_unk else self.text(ids)
        if self.always_text or bpe_symbol not in (None, "none"):
            return Text(text)
        return Pieces(separator.join(self.codec.pieces(ids)), text)

    def text(self, ids: Iterable[int]) -> str:
        """Text of ids that a model wrote: on one line, byte pieces joined to characters, detokenised.

        Bytes that are no character are left out.
        """
        return repaired(written(self.codec.decode(ids), self.lang))

    def encode_line(
        self,
        line,
        line_tokenizer=None,
        add_if_not_exist=False,
        consumer=None,
        append_eos=True,
        reverse_order=False,
    ) -> torch.IntTensor:
        """int32 ids of a line of pieces, or of a :class:`Text`; what is no piece is `<unk>`."""
        if isinstance(line, Text):
            ids = self.codec.encode(line)
        else:
            words = line_tokenizer(line) if line_tokenizer else line.split(" ")
            ids = [self.index(word) for word in words if word]
        if reverse_order:
            ids.reverse()
        if consumer is not None:
            for i in ids:
                consumer(self[i], i)
        return torch.IntTensor([*ids, self.eos()] if append_eos else ids)

    def become(self, other: "SpmDictionary") -> None:
        """Turn into `other`, in the hands of whoever holds this one already."""
        self.__dict__ = dict(other.__dict__)


class SpmBpe:
    """What fairseq's commands call bpe: source text in, target text out."""

    def __init__(self, source: SpmDictionary, target: SpmDictionary, convention: str):
        self.source, self.target, self.convention = source, target, convention

    def encode(self, text: str) -> str:
        """Pieces of a source text as a user types it."""
        return " ".join(self.source.codec.pieces(self.encode_ids(text)))

    def encode_ids(self, text: str) -> list[int]:
        return self.source.codec.encode(normalise(text, self.source.lang, self.convention))

    def decode(self, text: str) -> str:
        """Text of pieces; text that :meth:`SpmDictionary.string` already made stays as it is."""
        if isinstance(text, Pieces):
            return text.text
        if isinstance(text, Text):
            return text
        return self.target.text(self.target.encode_line(text, append_eos=False).tolist())


def to_state(codecs: dict[str, Codec], **more: Any) -> dict[str, Any]:
    """What a checkpoint holds of the vocabulary: plain lists, text and uint8 tensors.

    codecs: language → model. A model that is used for both languages is one tensor.
    """
    different = {codec.sha256: codec for codec in codecs.values()}
    models = {
        key: torch.frombuffer(bytearray(codec.model), dtype=torch.uint8)
        for key, codec in different.items()
    }
    pieces = {key: codec.pieces(range(SPECIALS, codec.size)) for key, codec in different.items()}
    return {
        **more,
        "spm": {lang: models[codec.sha256] for lang, codec in codecs.items()},
        "dict": {lang: pieces[codec.sha256] for lang, codec in codecs.items()},
    }


def direction(
    source: str | None, target: str | None, languages: tuple[str, str]
) -> tuple[str, str]:
    """(source, target) that flags and a pair of languages say; UserError where they contradict."""
    given = " ".join(f"{flag} {lang}" for flag, lang in (("-s", source), ("-t", target)) if lang)
    if not source and not target:
        return languages
    other = {languages[0]: languages[1], languages[1]: languages[0]}
    source, target = source or other.get(target), target or other.get(source)
    if source not in other or other[source] != target:
        raise UserError(f"{given} does not fit: there are {' and '.join(languages)}")
    return source, target


def refuse_other_direction(wanted: tuple[str, str], saved: tuple[str, str]) -> None:
    """UserError where a checkpoint translates another way than is wanted."""
    if wanted != saved:
        raise UserError(
            f"the checkpoint translates {saved[0]} to {saved[1]}, not {wanted[0]} to {wanted[1]}: give"
            f" -s {saved[0]} -t {saved[1]}, or another checkpoint (another --save-dir to train)"
        )
