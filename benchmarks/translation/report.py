"""The tables of `benchmarks.translation` and its `tables` as Markdown, from their records."""

import statistics
from collections import defaultdict

from benchmarks.pages import latest_first, markdown, origin, spread
from benchmarks.translation.significance import Pairs, seed_of, significance_table

COMMAND = "python -m benchmarks.translation.tables"
# Kind → name without the seed, and what it is, of the runs that vary vocabulary and shape.
SHAPES = {
    "noam": ("noam-0.45", "Transformer 4 + 4, d 128, 3,800 pieces"),
    "shallownoam": ("shallownoam-0.45", "Transformer 2 + 2, d 192, 3,800 pieces"),
    "bigshallownoam": ("bigshallownoam-0.45", "Transformer 2 + 2, d 192, 8,000 pieces"),
    "lstm": ("lstm-0.004-0.1", "LSTM, 3,800 pieces"),
    "biglstm": ("biglstm-0.004-0.1", "LSTM, 8,000 pieces"),
}
GROUPS = {
    "same CPU time": "tuning chosen",
    "24 minutes": "longer",
    "same updates": "schedules constant",
}


def report(records: list[dict], tests: list[dict]) -> str:
    """All tables of which at least one run is done."""
    return "\n\n".join(tables(records, tests).values()) or "no run is recorded yet"


def tables(records: list[dict], tests: list[dict]) -> dict[str, str]:
    """Name → table: mean ± standard deviation over seeds."""
    found = {}
    for head, systems in systems_of(records).items():
        runs = [run for some in systems.values() for run in some]
        made = [main_table(head, systems), significance_table(tests, head)]
        made += [origin(f"{COMMAND} {GROUPS[head]}", runs)]
        found[head] = "\n\n".join(part for part in made if part)
    kinds = by_kind(records)
    shapes = {
        title: [run for run in kinds[kind][name] if seed_of(run) == "1"]
        for kind, (name, title) in SHAPES.items()
        if name in kinds.get(kind, {})
    }
    if shapes:
        runs = [run for some in shapes.values() for run in some]
        table = main_table("vocabulary and shape, seed 1", shapes)
        found["shapes"] = f"{table}\n\n{origin(f'{COMMAND} vocabulary', runs)}"
    if tuned := tuning_runs(kinds):
        found["tuning"] = f"{tuning_table(kinds)}\n\n{origin(f'{COMMAND} tuning schedules', tuned)}"
    return found


def systems_of(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Head of a table → title → runs of all seeds, the chosen one of each kind."""
    kinds = by_kind(records)

    def chosen(title: str, kind: str) -> dict[str, list[dict]]:
        if kind not in kinds:
            return {}
        name = best_of(records, kind)
        return {f"{title} {', '.join(name.split('-')[1:])}": kinds[kind][name]}

    found = {
        "same CPU time": chosen("Transformer, Noam", "noam") | chosen("LSTM", "lstm"),
        "24 minutes": chosen("Transformer 2 + 2, Noam", "longershallownoam")
        | chosen("LSTM", "longerlstm"),
        "same updates": chosen("Noam", "shortnoam") | chosen("constant", "constant"),
    }
    return {head: systems for head, systems in found.items() if systems}


def compared(records: list[dict]) -> dict[str, Pairs]:
    """Head of a table → what is tested: its first system beside each other one."""
    found = {}
    for head, systems in systems_of(records).items():
        (name, ours), *others = systems.items()
        found[head] = {f"{name} − {other}": (ours, theirs) for other, theirs in others}
    return found


def by_kind(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Runs by kind (lstm) and by name without the seed (lstm-0.001-0.2)."""
    kinds: dict = defaultdict(lambda: defaultdict(list))
    for run in records:
        name = run["run"].rsplit("-", 1)[0]
        kinds[name.split("-")[0]][name].append(run)
    return kinds


def best_of(records: list[dict], kind: str) -> str:
    """The name, without the seed, of the run of this kind with seed 1 that is best on valid."""
    runs = [run for named in by_kind(records)[kind].values() for run in named]
    first = [run for run in runs if seed_of(run) == "1"]
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
        scores = [
            spread([run[subset][metric] for run in runs])
            for subset in ("test", "valid")
            for metric in ("bleu", "chrf")
        ]
        parameters = f"{runs[0]['parameters']:,}"
        rows.append([name, *scores, parameters, str(updates), f"{cpu:.0f}", str(len(runs))])
    columns = ["test BLEU", "test chrF", "valid BLEU", "valid chrF", "parameters", "updates"]
    return markdown([head, *columns, "CPU s", "seeds"], rows)


def tuning_runs(kinds: dict) -> list[dict]:
    """What was chosen from, with seed 1."""
    return [
        run
        for kind in ("noam", "lstm", "constant")
        for runs in kinds.get(kind, {}).values()
        for run in runs
        if seed_of(run) == "1"
    ]


def tuning_table(kinds: dict) -> str:
    rows = []
    for run in tuning_runs(kinds):
        kind, *options, _ = run["run"].split("-")
        score, cpu = f"{run['valid']['bleu']:.1f}", f"{run['cpu_seconds']:.0f}"
        rows.append([kind, ", ".join(options), score, cpu])
    return markdown(["tuning", "factor or rate, dropout", "valid BLEU, seed 1", "CPU s"], rows)


def speed_tables(speed: list[dict], prepared: list[dict]) -> dict[str, str]:
    """Of the last run of `python -m benchmarks.translation` on each processor, and of `.prepare`."""
    found = {}
    tables = {"translation": ("speed", speed_table), "trained": ("trained", trained_table)}
    for name, (part, drawn) in tables.items():
        of_part = [figures for figures in speed if figures["run"].startswith(part)]
        if of_part:
            found[name] = "\n\n".join(
                f"{drawn(figures)}\n\n{origin(figures['command'], [figures])}"
                for figures in latest_first(of_part)
            )
    if prepared:
        rows = [
            [
                f"{f['pairs']:,}",
                f"{f['prepare_s']:.0f}",
                f"{f['cpu_s']:.0f}",
                f"{f['pairs_per_cpu_s']:,}",
                f"{f['peak_rss_largest_process_mb']:,.0f} MB",
            ]
            for f in sorted(prepared, key=lambda f: f["pairs"])
        ]
        head = ["pairs", "s", "CPU s", "pairs a CPU second", "largest process"]
        line = origin(prepared[0]["command"], prepared)
        found["translation prepare"] = f"{markdown(head, rows)}\n\n{line}"
    return found


def speed_table(figures: dict) -> str:
    """A row each way of translating: speed and memory with both beams, and BLEU where it was measured."""
    beams = figures["speed"]["results"]
    quality = figures.get("quality", {}).get("results", [])
    rows = []
    for name in beams[0]["sides"]:
        row = [named(name), *rates(name, beams)]
        row.append(f"{max(result['sides'][name]['peak_mb'] for result in beams):,.0f} MB")
        if quality:
            row.append(" / ".join(f"{result['sides'][name]['bleu']:.2f}" for result in quality))
        rows.append(row)
    heads = [*rate_heads(beams), "peak memory", *(["BLEU, beam 5 / greedy"] if quality else [])]
    return markdown(["", *heads], rows)


def trained_table(figures: dict) -> str:
    """A row each way of translating with a trained model: speed, and what it translates."""
    beams = figures["quality"]["results"]
    rows = []
    for name in beams[0]["sides"]:
        sides = [result["sides"][name] for result in beams]
        bleu = " / ".join(f"{side['bleu']:.2f}" for side in sides)
        lines = " / ".join(f"{100 * side['same_lines']:.1f}" for side in sides)
        rows.append([named(name), *rates(name, beams), bleu, f"{lines} %"])
    heads = ["", *rate_heads(beams), "BLEU, beam 5 / greedy", "same lines, beam 5 / greedy"]
    return markdown(heads, rows)


def named(side: str) -> str:
    return f"`{side}`" if side.startswith("fairseq-") else f"ours, {side}"


def rates(name: str, beams: list[dict]) -> list[str]:
    """Sentences a second of a side, and its ratio to the peer's, for each beam."""
    sides = [result["sides"][name] for result in beams]
    return [f"{side['median']:.1f} ({side['ratio']:.2f} ×)" for side in sides]


def rate_heads(beams: list[dict]) -> list[str]:
    return [f"beam {r['beam']}, sentences/s" if r["beam"] > 1 else "greedy" for r in beams]
