"""Lines of monolingual text that must not be trained on, because valid or test of a bitext has them."""

import hashlib
import os
from pathlib import Path

from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.prepare.leaks import LeakGuard
from fairseq_ext.translation.prepare.settings import held_out_splits
from fairseq_ext.translation.text.normalise import language, normalise


class Guard:
    """The valid and test lines of a prepared bitext on the side of ``lang``; call it with a line.

    sha256: of what decides its answers. Raises UserError where the bitext has no such lines.
    """

    def __init__(self, data: str | os.PathLike, lang: str) -> None:
        corpus = Corpus.open(data)
        own = [code for code in corpus.languages if language(code) == language(lang)]
        if not own:
            raise UserError(
                f"{data} is of {' and '.join(corpus.languages)}, and the text is {lang}: give --guard "
                "the bitext that the forward model is trained on"
            )
        self.lang, self.convention = own[0], corpus.convention
        files = [corpus.text(split, self.lang) for split in held_out_splits(corpus)]
        if not files:
            raise UserError(f"{data} has neither valid nor test: give --guard a bitext that has")
        self.sha256 = _digest(files, self.convention)
        self._leaks = LeakGuard.from_files({self.lang: files})

    def __call__(self, line: str) -> str | None:
        """Why a line must not be used, None where it may be."""
        return self._leaks.find(normalise(line, self.lang, self.convention), self.lang)


def _digest(files: list[Path], convention: str) -> str:
    parts = [convention, *map(sha256_file, files)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
