"""Tests of what differs between systems, recorded, as the references they need are not in this repository."""

import statistics
from pathlib import Path

from benchmarks.pages import markdown
from benchmarks.recorded import Results, digest_of

# In the hash of a record: what p was before, sacreBLEU's, was not two-sided.
METHOD = "two-sided"
Pairs = dict[str, tuple[list[dict], list[dict]]]


def record_tests(
    results: Results, tables: dict[str, Pairs], references: Path, lang: str = "zh"
) -> None:
    """Table → title → two systems, compared on test by the outputs of equal seeds, unless that is recorded.

    p of each seed by itself, the largest of them; and of all seeds together, where a sentence with the
    outputs of all seeds is what is resampled or exchanged (their statistics are summed).
    """
    from ext_common.manifest import sha256_file
    from fairseq_ext.translation.score.metrics import tokenizer_for
    from fairseq_ext.translation.score.scoring import Metric, ScoringOptions, compare
    from fairseq_ext.translation.text.normalise import read_lines

    digest = sha256_file(references)
    lines, options = list(read_lines(references)), ScoringOptions()
    metrics = {key: Metric.of(key, lang, tokenizer_for(lang), [lines]) for key in ("bleu", "chrf")}
    for table, pairs in tables.items():
        for number, (title, (ours, theirs)) in enumerate(pairs.items()):
            same_seed = [(a, b) for a in ours for b in theirs if seed_of(a) == seed_of(b)]
            outputs = [[run["test"]["translations"] for run in pair] for pair in same_seed]
            name, recipe = f"{table}: {number:02d} {title}", digest_of(outputs, digest, METHOD)
            if not same_seed or results.has(name, recipe):
                continue
            if any(run["test"]["reference_sha256"] != digest for pair in same_seed for run in pair):
                raise SystemExit(f"error: {references} is of another split: prepare it again")
            record = {"run": name, "recipe_sha256": recipe, "table": table, "title": title}
            for key, metric in metrics.items():
                found = [[metric.statistics(texts) for texts in pair] for pair in outputs]
                compared = [compare(metric.formula, *pair, options) for pair in found]
                together = compare(metric.formula, *map(sum, zip(*found, strict=True)), options)
                record[key] = {
                    "difference": statistics.mean(one.difference for one in compared),
                    "largest_p": [max(p) for p in zip(*map(p_values, compared), strict=True)],
                    "p_together": list(p_values(together)),
                }
            results.put({**record, "seeds": len(same_seed)})


def significance_table(tests: list[dict], table: str) -> str:
    """The recorded tests of one table."""
    rows = []
    for record in tests:
        if record["table"] == table:
            row = [record["title"]]
            for key in ("bleu", "chrf"):
                found = record[key]
                row.append(f"{found['difference']:+.1f}")
                row += [slashed(found["largest_p"]), slashed(found["p_together"])]
            rows.append([*row, str(record["seeds"])])
    head = ["difference on test, same seeds"]
    for name in ("BLEU", "chrF"):
        head += [name, "p, largest", "p, together"]
    return markdown([*head, "seeds"], rows)


def slashed(values: list[float]) -> str:
    return " / ".join(f"{p:.4f}" for p in values)


def p_values(comparison) -> tuple[float, float]:
    return comparison.bootstrap_p, comparison.randomisation_p


def seed_of(run: dict) -> str:
    return run["run"].rsplit("-", 1)[1]
