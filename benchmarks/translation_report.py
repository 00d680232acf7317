"""The tables of `benchmarks.translation_tables` as Markdown, from the JSON files of its runs."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

# Kind → name without the seed, and what it is, of the runs that vary vocabulary and shape.
SHAPES = {
    "noam": ("noam-0.45", "Transformer 4 + 4, d 128, 3,800 pieces"),
    "shallownoam": ("shallownoam-0.45", "Transformer 2 + 2, d 192, 3,800 pieces"),
    "bigshallownoam": ("bigshallownoam-0.45", "Transformer 2 + 2, d 192, 8,000 pieces"),
    "lstm": ("lstm-0.004-0.1", "LSTM, 3,800 pieces"),
    "biglstm": ("biglstm-0.004-0.1", "LSTM, 8,000 pieces"),
}


def report(results: Path, references: Path) -> str:
    """All tables of which at least one run is done: mean ± standard deviation over seeds.

    references: the target side of test, which is not in this repository; without it there are no
    tests of significance.
    """
    kinds = read(results)
    if not kinds:
        return "no run is recorded yet"

    def chosen(title: str, kind: str) -> dict[str, list[dict]]:
        if kind not in kinds:
            return {}
        name = best_of(results, kind)
        return {f"{title} {', '.join(name.split('-')[1:])}": kinds[kind][name]}

    systems = chosen("Transformer, Noam", "noam") | chosen("LSTM", "lstm")
    schedules = chosen("Noam", "shortnoam") | chosen("constant", "constant")
    longer = chosen("Transformer 2 + 2, Noam", "longershallownoam") | chosen("LSTM", "longerlstm")
    tables = []
    heads = {"same CPU time": systems, "24 minutes": longer, "same updates": schedules}
    for head, runs in heads.items():
        tables += [main_table(head, runs), significance_table(first_against(runs), references)]
    shapes = {
        title: kinds[kind][name]
        for kind, (name, title) in SHAPES.items()
        if name in kinds.get(kind, {})
    }
    first = {title: [run for run in runs if seed_of(run) == "1"] for title, runs in shapes.items()}
    tables += [main_table("vocabulary and shape, seed 1", first), tuning_table(kinds)]
    return "\n\n".join(table for table in tables if table)


def read(results: Path) -> dict[str, dict[str, list[dict]]]:
    """Runs by kind (lstm) and by name without the seed (lstm-0.001-0.2)."""
    kinds: dict = defaultdict(lambda: defaultdict(list))
    for path in sorted(results.glob("*-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        name = run["run"].rsplit("-", 1)[0]
        kinds[name.split("-")[0]][name].append(run)
    return kinds


def best_of(results: Path, kind: str) -> str:
    """The name, without the seed, of the run of this kind with seed 1 that is best on valid."""
    runs = [run for named in read(results)[kind].values() for run in named]
    first = [run for run in runs if run["run"].endswith("-1")]
    if not first:
        raise SystemExit(
            f"error: no {kind} run with seed 1 is recorded: run the group tuning first"
        )
    return max(first, key=lambda run: run["valid"]["bleu"])["run"].rsplit("-", 1)[0]


def main_table(head: str, systems: dict[str, list[dict]]) -> str:
    rows = []
    for name, runs in systems.items():
        updates = runs[0]["recipe"]["optimization"]["max_update"]
        cpu = statistics.mean(run["cpu_seconds"] for run in runs)
        scores = [spread(runs, s, m) for s in ("test", "valid") for m in ("bleu", "chrf")]
        parameters = f"{runs[0]['parameters']:,}"
        rows.append([name, *scores, parameters, str(updates), f"{cpu:.0f}", str(len(runs))])
    if not rows:
        return ""
    columns = ["test BLEU", "test chrF", "valid BLEU", "valid chrF", "parameters", "updates"]
    return markdown([head, *columns, "CPU s", "seeds"], rows)


def tuning_table(kinds: dict) -> str:
    rows = []
    for kind in ("noam", "lstm", "constant"):
        for name, runs in kinds.get(kind, {}).items():
            for run in (run for run in runs if run["run"].endswith("-1")):
                options = ", ".join(name.split("-")[1:])
                score, cpu = f"{run['valid']['bleu']:.1f}", f"{run['cpu_seconds']:.0f}"
                rows.append([kind, options, score, cpu])
    return markdown(["tuning", "factor or rate, dropout", "valid BLEU, seed 1", "CPU s"], rows)


def first_against(systems: dict[str, list[dict]]) -> dict[str, tuple[list[dict], list[dict]]]:
    """Pairs to compare: the first system beside each other one."""
    if not systems:
        return {}
    (name, ours), *others = systems.items()
    return {f"{name} − {other}": (ours, theirs) for other, theirs in others}


def significance_table(
    pairs: dict[str, tuple[list[dict], list[dict]]], references: Path, lang: str = "zh"
) -> str:
    """Title → two systems, compared on test by the outputs of equal seeds.

    p of each seed by itself, the largest of them; and of all seeds together, where a sentence with the
    outputs of all seeds is what is resampled or exchanged (their statistics are summed).
    """
    from ext_common.manifest import sha256_file
    from fairseq_ext.translation.score.metrics import tokenizer_for
    from fairseq_ext.translation.score.scoring import Metric, ScoringOptions, compare
    from fairseq_ext.translation.text.normalise import read_lines

    if not pairs or not references.exists():
        return ""
    digest = sha256_file(references)
    if any(run["test"]["reference_sha256"] != digest for runs, _ in pairs.values() for run in runs):
        return f"({references} is of another split: prepare it again)"
    lines, options = list(read_lines(references)), ScoringOptions()
    metrics = [Metric.of(key, lang, tokenizer_for(lang), [lines]) for key in ("bleu", "chrf")]
    rows = []
    for title, (ours, theirs) in pairs.items():
        same_seed = [(a, b) for a in ours for b in theirs if seed_of(a) == seed_of(b)]
        if not same_seed:
            continue
        row = [title]
        for metric in metrics:
            found = [
                [metric.statistics(run["test"]["translations"]) for run in pair]
                for pair in same_seed
            ]
            compared = [compare(metric.formula, *pair, options) for pair in found]
            row.append(f"{statistics.mean(one.difference for one in compared):+.1f}")
            worst = [max(p) for p in zip(*map(p_values, compared), strict=True)]
            row.append(" / ".join(f"{p:.4f}" for p in worst))
            together = compare(metric.formula, *map(sum, zip(*found, strict=True)), options)
            row.append(" / ".join(f"{p:.4f}" for p in p_values(together)))
        rows.append([*row, str(len(same_seed))])
    if not rows:
        return ""
    head = ["difference on test, same seeds"]
    for name in ("BLEU", "chrF"):
        head += [name, "p, largest", "p, together"]
    return markdown([*head, "seeds"], rows)


def p_values(comparison) -> tuple[float, float]:
    return comparison.bootstrap_p, comparison.randomisation_p


def seed_of(run: dict) -> str:
    return run["run"].rsplit("-", 1)[1]


def spread(runs: list[dict], subset: str, metric: str) -> str:
    values = [run[subset][metric] for run in runs]
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
