"""Tables of the runs that benchmarks.diffusion_tables recorded."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev


def report(results: Path) -> str:
    """All tables, in Markdown."""
    runs = defaultdict(list)
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        if "run" in record:
            runs[record["run"].rsplit("-", 1)[0]].append(record)
    controls = results / "controls.json"
    known = json.loads(controls.read_text()) if controls.exists() else {}
    tables = [
        digits_table(
            {n: r for n, r in runs.items() if n.startswith(("digits", "unlabelled"))}, known
        ),
        sampler_table([r for rs in runs.values() for r in rs if "sampler" in r]),
        ablation_table(runs),
        table(
            ["emoji 32 × 32, 898 images", *COLUMNS],
            [
                [name, *cells(runs[name])]
                for name in ("emoji_default", "emoji_augmented", "emoji_cosine_eps")
                if name in runs
            ],
        ),
    ]
    return "\n\n".join(t for t in tables if t) or "no run is recorded yet"


COLUMNS = ("Fréchet distance", "× floor", "precision", "recall", "CPU s", "seeds")


def cells(records: list[dict]) -> list[str]:
    metrics = [record["evaluation"]["metrics"] for record in records]
    return [
        spread([m["frechet"]["value"] for m in metrics]),
        spread([m["frechet"]["ratio"] for m in metrics]),
        spread([m["precision"]["value"] for m in metrics]),
        spread([m["recall"]["value"] for m in metrics]),
        f"{mean(r['cpu_seconds'] for r in records):.0f}" if "cpu_seconds" in records[0] else "",
        str(len(records)),
    ]


def digits_table(runs: dict, controls: dict) -> str:
    def more(found: list[dict]) -> list[str]:
        near = [f["memorisation"]["pixels"] for f in found]
        distances = spread([n["median"] for n in near]), f"{near[0]['median_held_out']:.3g}"
        return [" / ".join(distances), str(min(10 - len(f["classes"]["missing"]) for f in found))]

    rows = []
    for name, records in runs.items():
        title = name.replace("digits", "samples").replace("_guidance_", ", guidance ")
        rows.append([title, *cells(records), *more([r["evaluation"] for r in records])])
    for title, found in controls.items():
        record = {"evaluation": found}
        rows.append([title, *cells([record]), *more([found])])
    heads = ["digits, 898 images", *COLUMNS, "nearest training image / of held-out", "classes"]
    return table(heads, rows)


def sampler_table(records: list[dict]) -> str:
    """A row each sampler and spacing, a column each number of steps."""
    steps = sorted({record["steps"] for record in records})
    rows = defaultdict(lambda: defaultdict(list))
    for record in records:
        rows[record["sampler"], record["spacing"]][record["steps"]].append(record)

    lines = [
        [name, spacing, *[scores(row[s]) if s in row else "" for s in steps]]
        for (name, spacing), row in rows.items()
    ]
    heads = ["Fréchet distance × floor (precision, recall), 500 digits", "spacing"]
    heads += [f"{s} steps" for s in steps]
    return table(heads, lines)


def ablation_table(runs: dict) -> str:
    """Fréchet distance in floors, with precision and recall."""
    rows = []
    for schedule in ("sigmoid", "cosine", "linear"):
        for objective in ("v", "eps"):
            row = [f"{schedule}, {objective}"]
            for augmentation in ("none", "leaky", "nonleaky", "rarely"):
                records = runs.get(f"{schedule}_{objective}_{augmentation}", [])
                row.append(scores(records) if records else "")
            if any(row[1:]):
                rows.append(row)
    heads = [
        "Fréchet distance × floor (precision, recall), digits",
        "no augmentation",
        "leaky",
        "non-leaky",
        "non-leaky, 15 %",
    ]
    return table(heads, rows)


def scores(records: list[dict]) -> str:
    """Fréchet distance in floors, and (precision, recall)."""
    metrics = [record["evaluation"]["metrics"] for record in records]
    others = [mean(m[name]["value"] for m in metrics) for name in ("precision", "recall")]
    return f"{spread([m['frechet']['ratio'] for m in metrics])} ({others[0]:.2f}, {others[1]:.2f})"


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ± {stdev(values):.2g}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
