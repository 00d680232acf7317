"""How good translations are: BLEU, chrF and TER by sacreBLEU, how sure, and against a baseline.

python -m fairseq_ext.translation.score output.txt --ref ref.txt --lang zh
python -m fairseq_ext.translation.score output.txt --ref ref.txt --lang zh --baseline other.txt
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from ext_common.cli import Parser, UsageError, add_dataclass, from_args, run
from ext_common.manifest import atomic_json, check_writable
from fairseq_ext.translation.score.scoring import Scores, ScoringOptions, score
from fairseq_ext.translation.text.languages import check_code
from fairseq_ext.translation.text.normalise import read_lines

__all__ = ["Scores", "ScoringOptions", "score"]

EPILOG = """
Lines are compared as they are; --normalise puts hypotheses and references into the convention of
fairseq_ext.translation.prepare first. Intervals are the 95 % percentiles of bootstrap resampling.
Against --baseline, on BLEU and chrF: paired bootstrap resampling (Koehn 2004), of which "wins" is
the share of resampled tests on which HYP is better, and paired approximate randomisation (Riezler
& Maxwell 2005), each with a two-sided p. sacreBLEU's --paired-ar computes the same p; the p of its
--paired-bs is not two-sided but smaller, and stands in --json as sacrebleu_bootstrap_p.

TER is on words; for zh and yue on Han characters (asian:yes in its signature), for the other
languages written without spaces on characters (unit:char). Lower is better.

Refused: files of different length, empty references, text in SentencePiece or BPE pieces, and,
with --source, translations that are the source. Empty translations are scored and counted.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass(kw_only=True)
class ScoreOptions(ScoringOptions):
    """Options of `score`."""

    lang: str = field(metadata={"help": "language of the translations: zh, de, ..."})
    baseline: Optional[str] = field(
        default=None, metadata={"help": "file of another system's translations of the same lines"}
    )
    source: Optional[str] = field(
        default=None, metadata={"help": "file of what was translated, to find copies"}
    )
    json: Optional[str] = field(
        default=None, metadata={"help": "file to write all numbers to; -: the screen"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_code(self.lang, "--lang")


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.translation.score", description=__doc__, epilog=EPILOG
    )
    parser.add_argument("hypotheses", metavar="HYP", help="file of translations, one a line")
    parser.add_argument(
        "--ref",
        action="append",
        required=True,
        metavar="REF",
        help="file of references, one a line; give --ref again for another reference of each",
    )
    add_dataclass(parser, ScoreOptions)
    args = parser.parse_args(argv)
    options = from_args(ScoreOptions, args)
    # With --json - the screen is for the JSON alone.
    with redirect_stdout(sys.stderr if options.json == "-" else sys.stdout):
        record = score_files(args.hypotheses, args.ref, options)
    if options.json:
        atomic_json("/dev/stdout" if options.json == "-" else options.json, record)


def score_files(hypotheses: str, refs: Sequence[str], options: ScoreOptions) -> dict[str, Any]:
    """Score files, print the report and return what --json writes."""
    names = {"hypotheses": hypotheses, "references": list(refs)}
    names |= {"baseline": options.baseline, "source": options.source}
    inputs = [hypotheses, *refs, options.baseline, options.source]
    if inputs.count("-") > 1:
        raise UsageError("only one of the files can be - (the standard input)")
    if options.json in inputs and options.json not in (None, "-"):
        raise UsageError(f"--json {options.json} would overwrite what is scored: give another file")
    if options.json not in (None, "-"):
        check_writable(options.json)
    lines = {name: list(read_lines(path)) for name, path in names.items() if isinstance(path, str)}
    references = [list(read_lines(path)) for path in refs]
    found = score(
        lines["hypotheses"],
        references,
        options.lang,
        lines.get("baseline"),
        lines.get("source"),
        options,
        names,
    )
    print(report(found, options, names))
    return {"files": names, **asdict(found), "seed": options.seed, "trials": trials(options)}


def report(found: Scores, options: ScoreOptions, names: dict[str, Any]) -> str:
    """What the screen says."""
    how = "normalised first" if found.normalised else "as they are (no --normalise)"
    lines = [
        f"{found.lines:,} lines of {names['hypotheses']} against {', '.join(names['references'])}, "
        f"{how}",
        f"tokenizer of BLEU: {found.tokenizer} ({found.tokenizer_reason})",
        *(f"warning: {warning}" for warning in found.warnings),
        "",
    ]
    for metric in found.metrics.values():
        low, high = metric.interval
        lines.append(
            f"{metric.name:5} {metric.value:6.2f}   95 % {low:6.2f} to {high:6.2f}   "
            f"{metric.signature}"
        )
    if found.comparisons:
        lines += ["", *against(found, options, names["baseline"])]
    return "\n".join(lines)


def against(found: Scores, options: ScoreOptions, baseline: str) -> list[str]:
    """The lines on the baseline."""
    lines = [
        f"against {baseline} ({options.bootstrap:,} resamples, {options.randomisations:,} "
        f"randomisations, seed {options.seed}):",
        "       baseline   difference       95 %           wins   p (bootstrap)  p (randomisation)",
    ]
    for key, result in found.comparisons.items():
        low, high = result.interval
        lines.append(
            f"{found.metrics[key].name:6} {result.baseline:8.2f} {result.difference:+12.2f}   "
            f"{low:+6.2f} to {high:+6.2f}  {100 * result.wins:5.1f} %  {result.bootstrap_p:14.4f} "
            f"{result.randomisation_p:18.4f}"
        )
    return lines


def trials(options: ScoringOptions) -> dict[str, int]:
    return {"bootstrap": options.bootstrap, "randomisations": options.randomisations}


if __name__ == "__main__":
    run(main)
