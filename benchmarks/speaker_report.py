"""The tables of `benchmarks.speaker_tables` as Markdown, from the JSON files of its runs."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

AS_IS, SHIFTED = "libri251", "libri251-shifted"


def report(results: Path) -> str:
    """All tables of which at least one run is done: mean ± standard deviation over seeds."""
    groups = defaultdict(lambda: defaultdict(list))
    for path in sorted(results.glob("*.json")):
        run = json.loads(path.read_text())
        group, rest = run["run"].split("-", 1)
        groups[group][rest.rsplit("-", 1)[0]].append(run)
    tables = [groups["main"] and main_table(groups["main"])]
    tables += [groups["ablation"] and ablation_table(groups["ablation"])]
    tables += [groups["ablation"] and effects_table(groups["ablation"])]
    tables += [groups["choices"] and choices_table(groups["choices"], groups["ablation"])]
    tables += [groups["digits"] and digits_table(groups["digits"])]
    return "\n\n".join(t for t in tables if t)


def main_table(runs: dict) -> str:
    rows = [
        [name, spread(r, f"{AS_IS}/test"), spread(r, f"{SHIFTED}/test"), *cost(r)]
        for name, r in sorted(runs.items(), reverse=True)
    ]
    head = ["libri251, test top-1 %", "as it is", "channel-shifted", "updates", "CPU s", "seeds"]
    return markdown(head, rows)


def digits_table(runs: dict) -> str:
    rows = [[n, spread(r, "fsdd/test"), *cost(r)] for n, r in sorted(runs.items(), reverse=True)]
    return markdown(["fsdd, test top-1 %", "as it is", "updates", "CPU s", "seeds"], rows)


def ablation_table(runs: dict) -> str:
    rows = [
        [*name.split("-"), spread(r, f"{AS_IS}/test"), spread(r, f"{SHIFTED}/test"), *cost(r)]
        for name, r in sorted(runs.items(), reverse=True)
    ]
    head = ["encoder", "pooling", "criterion", "as it is", "channel-shifted", "updates", "CPU s"]
    return markdown([*head, "seeds"], rows)


def choices_table(runs: dict, ablation: dict) -> str:
    """One change at a time to the Conformer with self-attention pooling and AM-softmax, on valid."""
    reference = {"(the reference)": ablation.get("conformer-self_attention-am_softmax", [])}
    rows = [
        [
            name.replace("_", " "),
            spread(r, f"{AS_IS}/valid"),
            spread(r, f"{SHIFTED}/valid"),
            *cost(r),
        ]
        for name, r in {**reference, **runs}.items()
        if r
    ]
    head = ["one change, valid top-1 %", "as it is", "channel-shifted", "updates", "CPU s", "seeds"]
    return markdown(head, rows)


def effects_table(runs: dict) -> str:
    """What each change earns: the mean over the other two factors and the seeds, paired by run."""
    rows = []
    changes = [("transformer", "conformer"), ("mean", "self_attention"), ("softmax", "am_softmax")]
    for before, after in changes:
        cells = []
        for data in (AS_IS, SHIFTED):
            gains = []
            for name, with_change in runs.items():
                parts = name.split("-")
                if after in parts:
                    parts[parts.index(after)] = before
                    old = {r["run"][-1]: r for r in runs.get("-".join(parts), [])}
                    gains += [
                        top1(r, f"{data}/test") - top1(old[r["run"][-1]], f"{data}/test")
                        for r in with_change
                        if r["run"][-1] in old
                    ]
            cells.append(plus_minus(gains, signed=True))
        rows.append([f"{before} → {after}", *cells])
    return markdown(["change", "as it is, points", "channel-shifted, points"], rows)


def top1(run: dict, key: str) -> float:
    return 100 * run[key]["top1"]


def spread(runs: list, key: str) -> str:
    return plus_minus([top1(r, key) for r in runs])


def cost(runs: list) -> list:
    updates = runs[0]["recipe"]["optimization"]["max_update"]
    seconds = statistics.mean(r["cpu_seconds"] for r in runs)
    return [str(updates), f"{seconds:.0f}", str(len(runs))]


def plus_minus(values: list, signed: bool = False) -> str:
    """Mean ± sample standard deviation, one decimal."""
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{'+' if signed else ''}.1f} ± {deviation:.1f}"


def markdown(head: list, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
