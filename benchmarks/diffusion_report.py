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
        digits_table(runs.get("digits", []), known),
        sampler_table([r for rs in runs.values() for r in rs if "sampler" in r]),
        ablation_table(runs),
        table(
            ["emoji 32 × 32, 500 samples", *COLUMNS],
            [
                [name, *cells(runs[name])]
                for name in ("emoji_default", "emoji_cosine_eps")
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


def digits_table(records: list[dict], controls: dict) -> str:
    def more(found: dict) -> list[str]:
        near = next(iter(found["memorisation"].values()))
        missing = found["classes"]["missing"]
        return [f"{near['median']:.3g} / {near['median_held_out']:.3g}", str(10 - len(missing))]

    rows = []
    if records:
        first = records[0]["evaluation"]
        rows.append(["samples", *cells(records), *more(first)])
    for title, found in controls.items():
        record = {"evaluation": found}
        rows.append([title, *cells([record]), *more(found)])
    heads = ["digits, 500 images", *COLUMNS, "nearest training image / of held-out", "classes"]
    return table(heads, rows)


def sampler_table(records: list[dict]) -> str:
    steps = sorted({record["steps"] for record in records})
    rows = defaultdict(dict)
    for record in records:
        value = record["evaluation"]["metrics"]["frechet"]["value"]
        rows[record["sampler"], record["spacing"]][record["steps"]] = f"{value:.3g}"
    lines = [
        [name, spacing, *[row.get(s, "") for s in steps]] for (name, spacing), row in rows.items()
    ]
    return table(["Fréchet distance, 500 digits", "spacing", *[f"{s} steps" for s in steps]], lines)


def ablation_table(runs: dict) -> str:
    rows = []
    for schedule in ("sigmoid", "cosine", "linear"):
        for objective in ("v", "eps"):
            row = [f"{schedule}, {objective}"]
            for augmentation in ("none", "leaky", "nonleaky"):
                records = runs.get(f"{schedule}_{objective}_{augmentation}")
                row.append(cells(records)[1] if records else "")
            if any(row[1:]):
                rows.append(row)
    return table(
        ["Fréchet distance × floor, digits", "no augmentation", "leaky", "non-leaky"], rows
    )


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ± {stdev(values):.2g}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
