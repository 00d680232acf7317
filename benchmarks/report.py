"""Write docs/results, and the table of README.md, from what is recorded in benchmarks/results.

    python -m benchmarks.report            writes what differs
    python -m benchmarks.report --check    says what differs, exit code 1

A page is a template beside the code of its job (benchmarks/speaker/page.md), whose prose says what the
figures mean, with the tables put in. docs/fairseq-gaps.md comes from the docstrings of ext_common.compat.
"""

import re
import sys

from benchmarks import page, scale, shortest
from benchmarks.backtranslation import report as backtranslation
from benchmarks.diffusion import report as diffusion
from benchmarks.diffusion import speed as diffusion_speed
from benchmarks.headline import headline
from benchmarks.pages import filled, latest_first, markdown, origin
from benchmarks.recorded import RESULTS, ROOT, Results
from benchmarks.speaker import exported as speaker_export
from benchmarks.speaker import report as speaker
from benchmarks.speaker import verification_report as verification
from benchmarks.translation import compact
from benchmarks.translation import report as translation
from ext_common.cli import Parser, UserError, run
from ext_common.compat.__main__ import page as gaps_page

MADE_BY = "python -m benchmarks.report"
BEGIN, END = f"<!-- the table: made by `{MADE_BY}` -->", "<!-- end of the table -->"


def main(argv):
    """The command."""
    parser = Parser(prog=MADE_BY, description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing: say what differs")
    args = parser.parse_args(argv)
    differing = []
    for name, text in pages().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            differing.append(name)
            if not args.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if differing and args.check:
        raise UserError(f"{', '.join(differing)} differ from what is recorded: {MADE_BY}")
    print("\n".join(differing) or "nothing differs", file=sys.stderr)


def pages() -> dict[str, str]:
    """Path below the repository → what has to stand there."""
    tables = {
        "speaker": speaker.tables(recorded("speaker_tables"))
        | verification.tables(recorded("speaker_strangers"), recorded("speaker_open_set"))
        | {"audio": speaker.audio_table(recorded("speaker_audio"))}
        | {"imbalance": speaker.imbalance_table(recorded("speaker_imbalance"))}
        | {"variants": speaker.variants_table(recorded("speaker_variants"))},
        "translation": translation.tables(
            recorded("translation_tables"), recorded("translation_tests")
        )
        | {
            "compact": compact.report(
                recorded("translation_compact"), recorded("translation_tests")
            )
        },
        "backtranslation": backtranslation.tables(
            recorded("backtranslation_tables"), recorded("backtranslation_tests")
        ),
        "diffusion": diffusion.tables(recorded("diffusion_tables"))
        | diffusion.objective_sections(recorded("diffusion_objectives"))
        | {"emoji_hour": diffusion.emoji_section(recorded("diffusion_emoji"))},
    }
    found = {
        f"docs/results/{job}.md": filled(ROOT / "benchmarks" / job / "page.md", made, MADE_BY)
        for job, made in tables.items()
    }
    found["docs/results/speed.md"] = filled(
        ROOT / "benchmarks" / "speed.md", speed_tables(), MADE_BY
    )
    note = f"<!-- made by `{MADE_BY}` from the docstrings of ext_common/compat: do not edit -->"
    found["docs/fairseq-gaps.md"] = f"{note}\n\n{gaps_page()}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = f"{BEGIN}\n\n{headline(recorded)}\n\n{END}"
    found["README.md"] = re.sub(
        f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, readme
    )
    return found


def speed_tables() -> dict[str, str]:
    """The tables of docs/results/speed.md."""
    found = speaker.speed_tables(recorded("speaker_speed"), recorded("speaker_prepare"))
    found["verification"] = verification.speed_section(recorded("speaker_verification"))
    found |= translation.speed_tables(
        recorded("translation_speed"), recorded("translation_prepare")
    )
    found |= backtranslation.speed_tables(recorded("backtranslation_speed"))
    found["diffusion"] = "\n\n".join(
        f"{diffusion_speed.table(figures)}\n\n{origin(figures['command'], [figures])}"
        for figures in latest_first(recorded("diffusion_speed"))
    )
    found["speaker export"] = speaker_export.section(recorded("speaker_export"))
    found["startup"] = startup_section(recorded("startup"))
    found["page"] = page.section(recorded("page"))
    found["scale"] = scale.report(recorded("scale"))
    found["shortest"] = shortest.report()
    return found


def startup_section(records: list[dict]) -> str:
    """What `python -m benchmarks.startup` measured, with its heading; empty where it was not run yet."""
    parts = []
    for figures in records:
        rows = []
        for row in figures["commands"]:
            # what needs no torch has no goal, and is given in all
            time = "above_torch" if row["goal"] else "wall"
            shown = [f"{side[time]:.2f} s" for side in row["sides"].values()]
            share = f"{row['share']:.0%}" if "share" in row else ""
            goal = f"{row['goal']:.0%}" if row["goal"] else ""
            rows.append([row["name"] + ("" if row["goal"] else ", in all"), *shown, share, goal])
        sides = list(figures["commands"][0]["sides"])
        torch = f"`import torch` alone takes {figures['torch']['wall']:.2f} s."
        head = ["seconds above `import torch`", *sides, "share", "goal"]
        parts += [torch, markdown(head, rows), origin(figures["command"], [figures])]
    return "\n\n".join(["## Starting up", *parts]) if parts else ""


def recorded(name: str) -> list[dict]:
    """The records of benchmarks/results/NAME.jsonl."""
    return Results(RESULTS / f"{name}.jsonl").all()


if __name__ == "__main__":
    run(main)
