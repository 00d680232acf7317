"""A tokenizer of Hugging Face as a vocabulary of this project, and how long a text its model takes."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from fairseq_ext.translation.text.normalise import detokenise, normalise, written

# Of a tokenizer and configuration that know no limit.
_POSITIONS = 512
_CODE = regex.compile(r">>[^<> ]+<<")


class HuggingFaceVocabulary:
    """From a line of text to a model's ids, and back; see `translation.checkpoint.Vocabulary`.

    prefix: a piece such as `>>eng<<` (or, for a tokenizer without such pieces, text) before every source.
    Nothing in a line turns into a special piece: a space is put into what looks like one.
    """

    convention = "none"

    def __init__(
        self, tokenizer: Any, source_lang: str, target_lang: str, prefix: str | None = None
    ):
        self.tokenizer = tokenizer
        self.source_lang, self.target_lang, self.prefix = source_lang, target_lang, prefix
        codes = language_codes(tokenizer)
        self.code_ids = sorted(codes.values())
        self._first = [codes[prefix]] if prefix in codes else []
        self._words = f"{prefix.strip()} " if prefix and not self._first else ""
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *codes} - {""}
        longest_first = sorted(special, key=lambda symbol: (-len(symbol), symbol))
        self._special = regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")
        # tokenizers hold state while they work
        self._lock = threading.Lock()

    def sentences(self, text: str, ids: Sequence[int]) -> list[str]:
        """The text, whole: what lines such a model was trained on is not known."""
        return [text]

    def clean(self, line: str) -> str:
        """The line as it is, on one line; "" where nothing can be seen."""
        return normalise(line, self.source_lang, self.convention).strip()

    def encode(self, text: str) -> list[int]:
        """Ids of cleaned text, `</s>` at the end; never cut."""
        text = self._words + self.escape(text)
        with self._lock:
            ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [*self._first, *ids, *([] if ids and ids[-1] == end else [end])]

    def encode_target(self, text: str) -> list[int]:
        """Ids of a text of the target language, as the model learnt to write them."""
        with self._lock:
            ids: list[int] = self.tokenizer(text_target=text, truncation=False, verbose=False)[
                "input_ids"
            ]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Detokenised target text of ids, on one line and without a tab."""
        with self._lock:
            text = self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return written(text, self.target_lang)

    def join(self, texts: Sequence[str]) -> str:
        """The text of sentences; no space between them where the target language has none."""
        return detokenise(" ".join(filter(None, texts)), self.target_lang)

    def escape(self, text: str) -> str:
        """Text in which a tokenizer finds no special piece.

        Marian's takes whatever stands between ">>" at the start and "<<" for the name of a language, in
        some versions up to the last "<<", and that name would be lost.
        """
        text = self._special.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)
        if "<<" in text and text.startswith(">>"):
            text = "> " + text[1:]
        return text


def language_codes(tokenizer: Any) -> dict[str, int]:
    """The pieces `>>xxx<<` of a tokenizer that stand for a target language, and their ids."""
    return {
        piece: number for piece, number in tokenizer.get_vocab().items() if _CODE.fullmatch(piece)
    }


def positions(config: Mapping[str, Any], tokenizer: Any) -> tuple[int, int]:
    """How many ids a source and a target may have, `</s>` among them."""
    known = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
    own = [one for one in known if isinstance(one, int) and one > 0]
    # a tokenizer without a limit has 1e30
    said = int(tokenizer.model_max_length or 0)
    said = said if 0 < said < 10**6 else _POSITIONS
    longest = own[0] if own else said
    return min(longest, said), longest
