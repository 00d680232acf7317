"""What prepare prints at its end."""

import re
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import fairseq_ext
from fairseq_ext.translation.text.normalise import unit

# The 13 of 13-grams is no number of the line, but of the kind.
_NUMBER = re.compile(r"\d++(?:[.,]\d++)*+(?!-)")
# Reasons may name something of each line.
_REASONS = 100


def table(report: dict[str, Any]) -> str:
    """Pairs in and out by reason, the splits, the vocabulary and the ratio of lengths, as text."""
    counts = report["counts"]
    lines = [f"pairs in           {counts['in']:>12,}"]
    for name, number in counts["removed"].items():
        lines.append(f"  {name:<17}{-number:>12,}  {share(number, counts['in'])}")
    lines += [f"pairs kept         {counts['out']:>12,}", ""]
    source, target = report["languages"]
    lines.append(f"split         pairs   tokens {source:<8}  tokens {target:<8}  unknown")
    for name, split in report["splits"].items():
        tokens, unknown = split["tokens"], split["unknown"]
        rate = sum(unknown.values()) / max(sum(tokens.values()), 1)
        lines.append(
            f"{name:<6}{split['pairs']:>13,}{tokens[source]:>17,}{tokens[target]:>17,}"
            f"{100 * rate:>8.4f} %"
        )
    sizes = report["vocabulary"]
    shown = f"{sizes[source]:,} pieces"
    shown += " for both languages" if report["joint"] else f" {source}, {sizes[target]:,} {target}"
    lines += ["", f"vocabulary    {shown}"]
    quantiles = "  ".join(f"{key}: {value:.2f}" for key, value in report["length_ratio"].items())
    lines.append(f"{unit(target)} of {target} per {unit(source)[:-1]} of {source}    {quantiles}")
    lines.append(f"split SHA-256 {report['split_sha256']}")
    return "\n".join(lines)


def next_command(
    dest: Path, splits: Collection[str], languages: Sequence[str] | None = None
) -> str:
    """The command that trains on `dest`; presets say the rest.

    splits: those that there are. languages: (source, target) where only one direction is to be trained.
    """
    plugin = Path(fairseq_ext.__file__).parent
    words = ["fairseq-train", str(dest), "--user-dir", str(plugin), "--task", "translation_spm"]
    words += ["-s", languages[0], "-t", languages[1]] if languages else []
    words += [] if "valid" in splits else ["--disable-validation"]
    return shlex.join(words)


def share(number: int, total: int) -> str:
    return f"{100 * number / max(total, 1):.2f} %"


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def about_leaks(leaks: Any, held_out: list[Any]) -> str:
    """How many pairs of INPUT have a side that is in valid or test, whole or nearly so, with the first."""
    shown = "; ".join(f"line {row.number}: {short(row.source)}" for row in leaks.first)
    kinds = [
        (leaks.equal, "have a side that is a line of"),
        (leaks.near, "have one that shares most of its word sequences with a line of"),
    ]
    told = " and ".join(f"{count:,} {what}" for count, what in kinds if count)
    return f"of the pairs of INPUT {told} {' or '.join(map(str, held_out))} ({shown})"


def short(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def count_reason(reasons: Counter[str], reason: str) -> None:
    """Count a reason without its numbers; those that come late are counted together."""
    known = _NUMBER.sub("…", reason)
    reasons[known if known in reasons or len(reasons) < _REASONS else "other reasons"] += 1
