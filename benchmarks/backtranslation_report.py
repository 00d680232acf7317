"""The tables of `benchmarks.backtranslation_tables` as Markdown, from the JSON files of its runs."""

import json
from pathlib import Path

from benchmarks.translation_report import main_table, significance_table

BITEXT, EARLY = "bitext", "_early"


def report(results: Path, references: Path) -> str:
    """Scores of every mixture, and each beside the bitext alone.

    references: the target side of test, which is not in this repository; without it there are no
    tests of significance.
    """
    systems = read(results)
    if not systems:
        return "no run is recorded yet"
    reverse = systems.pop("reverse", None)
    early = {name: systems.pop(name) for name in list(systems) if name.endswith(EARLY)}
    tables = []
    for head, some in (("same updates", systems), ("two thirds of them", early)):
        tables.append(main_table(head, {title_of(name): runs for name, runs in some.items()}))
        tables.append(significance_table(differences(some), references))
    if reverse:
        tables.append(main_table("reverse model", {"zh → en": reverse}))
    return "\n\n".join(table for table in tables if table)


def differences(systems: dict[str, list[dict]]) -> dict[str, tuple[list[dict], list[dict]]]:
    """What is compared: each mixture with the bitext alone, each toggle with what it toggles."""
    pairs = {}
    for name, runs in systems.items():
        mode, _, toggle = name.partition("_")
        bases = [base for base in systems if base.partition("_")[0] == BITEXT and name != base]
        if toggle and not name.endswith(EARLY):
            bases.append(mode)
        for base in bases:
            if base in systems:
                pairs[f"{title_of(name)} − {title_of(base)}"] = (runs, systems[base])
    return pairs


def read(results: Path) -> dict[str, list[dict]]:
    """Runs by name without the seed; the bitext first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(results.glob("*-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(run["run"].rsplit("-", 1)[0], []).append(run)
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith(BITEXT), item[0])))


def title_of(name: str) -> str:
    mode, _, toggle = name.removesuffix(EARLY).partition("_")
    if mode == BITEXT:
        return "bitext only"
    return f"+ {mode}{', ' + toggle if toggle else ''}"
