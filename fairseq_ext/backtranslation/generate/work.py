"""One process's share of a run: chunks claimed, translated and kept until none is left, then the merge."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fairseq_ext.backtranslation.generate.chunks import Chunks
from fairseq_ext.backtranslation.generate.claims import Claim, Claims, pauses
from fairseq_ext.backtranslation.generate.merge import checked
from fairseq_ext.backtranslation.models.backends import Line, ReverseModel
from fairseq_ext.backtranslation.modes import Mode


class Job(NamedTuple):
    """A chunk that is claimed and encoded.

    kept: places in the chunk of the lines to translate, whose `encoded` follow; reasons: of all lines,
    None for these.
    """

    claim: Claim
    chunk: int
    reasons: list[str | None]
    kept: list[int]
    encoded: list[Any]


class Worker:
    """Does chunks with a model. judge: line → why it is not to be used, or None."""

    def __init__(
        self,
        chunks: Chunks,
        claims: Claims,
        model: ReverseModel,
        mode: Mode,
        judge: Callable[[str], str | None],
    ) -> None:
        self.chunks, self.claims, self.model, self.mode = chunks, claims, model, mode
        self.judge = judge

    def run(self, show: Callable[[int], object]) -> None:
        """Work until every chunk is done, by this process or others.

        show: told the number of lines that are done. On any exception the chunks that are claimed go back.
        """
        try:
            # lines of the next chunk become ids while this one is decoded
            with ThreadPoolExecutor(1) as beside:
                ahead = beside.submit(self.next_job)
                waits = pauses()
                while True:
                    job = ahead.result()
                    if job is None:
                        show(done := self.chunks.done_lines())
                        if done == self.chunks.lines:
                            return
                        time.sleep(next(waits))
                        ahead = beside.submit(self.next_job)
                        continue
                    ahead = beside.submit(self.next_job)
                    waits = pauses()
                    self.do(job, show)
        finally:
            self.claims.put_back_all()

    def next_job(self) -> Job | None:
        """The next chunk, ready to translate; None where others do all that is left."""
        while claim := self.claims.take():
            chunk = int(claim.name)
            # its owner was killed, or paused, between keeping it and letting go of it
            if self.chunks.is_done(chunk):
                self.claims.drop(claim)
                continue
            lines = self.chunks.read(chunk)
            reasons = [self.judge(line) for line in lines]
            kept = [place for place, reason in enumerate(reasons) if reason is None]
            encoded = self.model.encode([lines[place] for place in kept]) if kept else []
            return Job(claim, chunk, reasons, kept, encoded)
        return None

    def do(self, job: Job, show: Callable[[int], object]) -> None:
        """Translate a chunk and keep what came of it."""
        plan = self.chunks.plan
        numbers = self.chunks.numbers(job.chunk)
        nbest = plan["nbest"]
        others = self.chunks.done_lines()
        decoded = 0

        def done(count: int) -> None:
            nonlocal decoded
            decoded += count
            show(others + decoded)

        found = [[Line("", None, reason)] * nbest for reason in job.reasons]
        if job.kept:
            translated = self.model.translate(
                job.encoded,
                [numbers[place] for place in job.kept],
                self.mode,
                plan["seed"],
                plan["round"],
                nbest,
                done,
            )
            for place, several in zip(job.kept, translated, strict=True):
                if len(several) != nbest:
                    raise ValueError(f"{self.model.name}: {len(several)} texts, not {nbest}")
                found[place] = [checked(line) for line in several]
        self.chunks.write(job.chunk, found, job.claim)
        self.claims.drop(job.claim)
        show(self.chunks.done_lines())
