"""What all pages of results are made of: Markdown tables, means with deviations, where a table comes from."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

PLACE = re.compile(r"^\{\{([\w ]+)\}\}$", re.MULTILINE)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; empty where it has no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± sample standard deviation, one decimal; one value by itself."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{'+' if signed else ''}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def origin(command: str, records: Sequence[Mapping]) -> str:
    """The line under a table: its command, when it was run and on what."""
    dates = sorted({record["date"] for record in records if "date" in record})
    machines = sorted({processor(record) for record in records})
    when = dates and (dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    parts = [f"`{command}`", when or "date not recorded", "; ".join(machines)]
    return f"*{', '.join(parts)}*"


def processor(record: Mapping) -> str:
    """Processor and CPUs of a record, without the load."""
    return record.get("machine", "processor not recorded").split(", load")[0]


def filled(template: Path, tables: Mapping[str, str], made_by: str) -> str:
    """A page: a template with each line `{{name}}` replaced; KeyError for an unknown or an unused table."""
    used = set()

    def place(match: re.Match) -> str:
        used.add(match[1])
        return tables[match[1]]

    text = PLACE.sub(place, template.read_text(encoding="utf-8"))
    if unused := set(tables) - used:
        raise KeyError(f"{template.name} has no place for {', '.join(sorted(unused))}")
    place = f"{template.parent.name}/{template.name}"
    return f"<!-- made by `{made_by}` from {place}: do not edit -->\n\n{text.rstrip()}\n"


def latest_first(records: list[dict]) -> list[dict]:
    """Records by their date, the last one first."""
    return sorted(records, key=lambda record: record["date"], reverse=True)
