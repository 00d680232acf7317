"""Pages as tests read them: blocks of commands and of Python, commands in running text, links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"`((?:python -m \w+|bash scripts/|fairseq-\w+|python scripts/)[^`]*)`")


@dataclass(frozen=True)
class Block:
    """kind: sh or python; why: the reason for which a test does not run it, None where one does.

    file: what the line before names as the file that the block is, None where it names none.
    """

    page: str
    line: int
    kind: str
    text: str
    why: str | None
    file: str | None

    def commands(self) -> list[list[str]]:
        """The words of each command."""
        joined = self.text.replace("\\\n", " ")
        found = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words for words in found if words]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        file = re.fullmatch(r"`([\w./]+)`:", before)
        found.append(
            Block(
                page.name,
                text.count("\n", 0, match.start()) + 1,
                match["kind"],
                match["text"],
                match["why"],
                file and file[1],
            )
        )
    return found


def inline_commands(page: Path) -> list[str]:
    """Whole commands in running text; one with an ellipsis is none."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = (" ".join(command.split()) for command in INLINE.findall(text))
    return sorted({command for command in found if "…" not in command})


def links(page: Path) -> list[str]:
    """Where a page's links and pictures inside this repository lead."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    return [to for pair in found for to in pair if to and "://" not in to and to[0] != "#"]
