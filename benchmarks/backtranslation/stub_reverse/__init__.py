"""--user-dir of `benchmarks.backtranslation --memory`: the backend "stub", which copies a line's letters."""

from fairseq_ext.backtranslation.models.backends import BACKENDS, Line

REASON = "the line is empty"


class StubModel:
    """Reads en, writes zh; nothing is kept of a line."""

    name, source_lang, target_lang, sha256 = "stub", "en", "zh", "0" * 64

    def encode(self, lines):
        return [tuple(map(ord, line)) for line in lines]

    def translate(self, encoded, numbers, mode, seed=1, round=1, nbest=1, done=lambda n: None):
        texts = ["".join(map(chr, ids)) for ids in encoded]
        done(len(texts))
        return [[Line(text, -0.5) if text else Line("", None, REASON)] * nbest for text in texts]


@BACKENDS.register("stub")
class Stub:
    """No model at all."""

    @staticmethod
    def describe(path, options):
        languages = {"source_lang": "en", "target_lang": "zh"}
        return {"sha256": "0" * 64, "backend": "stub", "compute_type": None, **languages}

    @staticmethod
    def open(path, options):
        return StubModel()
