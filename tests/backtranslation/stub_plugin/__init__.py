"""--user-dir for tests: the backend "stub", whose text depends on line, seed, round and rank only.

STUB_SLEEP: seconds for each line; STUB_LOG: file that gets the number of each line that is translated;
STUB_SYNC: seconds that every os.fsync takes, so that set-up and merge last.
"""

import os
import time
from hashlib import blake2b

from ext_common.random import line_seed
from fairseq_ext.backtranslation.models.backends import BACKENDS, Line

NO_LINE = "untranslatable"


class StubModel:
    """Reads zh, writes en."""

    name, source_lang, target_lang, sha256 = "stub", "zh", "en", "5" * 64

    def encode(self, lines):
        return [line.strip() for line in lines]

    def translate(self, encoded, numbers, mode, seed=1, round=1, nbest=1, done=lambda n: None):
        found = []
        for text, number in zip(encoded, numbers, strict=True):
            # the sanity check has lines of no number
            if number and (pause := float(os.environ.get("STUB_SLEEP", 0))):
                time.sleep(pause)
            if number and (log := os.environ.get("STUB_LOG")):
                with open(log, "a") as file:
                    file.write(f"{number}\n")
            found.append([self.line(text, line_seed(seed, number, round, n)) for n in range(nbest)])
            done(1)
        return found

    def line(self, text, seed):
        if not text:
            return Line("", None, "the line is empty")
        if NO_LINE in text:
            return Line("", None, f"the line has {len(text)} pieces, the model holds 3")
        digest = blake2b(f"{text} {seed}".encode(), digest_size=8)
        return Line(f"about {digest.hexdigest()}", -int.from_bytes(digest.digest()[:2]) / 7)


@BACKENDS.register("stub")
class Stub:
    """Nothing is read but the name of the model."""

    @staticmethod
    def describe(path, options):
        digest = blake2b(path.encode(), digest_size=32).hexdigest()
        return {
            "sha256": digest,
            "backend": "stub",
            "compute_type": None,
            "source_lang": "zh",
            "target_lang": "en",
        }

    @staticmethod
    def open(path, options):
        return StubModel()


if SYNC := float(os.environ.get("STUB_SYNC", 0)):
    fsync = os.fsync

    def slow(descriptor):
        time.sleep(SYNC)
        fsync(descriptor)

    os.fsync = slow
