"""Mutants of a module as text: how they are drawn, and found again in another checkout."""

import ast
import contextlib
import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ext_common.cli import UserError

# where a module is, or was in an older checkout
MODULES = {
    "margins": ("fairseq_ext/speaker/margins.py",),
    "pooling": ("fairseq_ext/speaker/pooling.py",),
    "conformer": ("fairseq_ext/speaker/conformer.py",),
    "noam": ("fairseq_ext/noam.py",),
    "schedules": ("diffusion_ext/schedules.py",),
    "objectives": ("diffusion_ext/objectives.py",),
    "samplers": ("diffusion_ext/samplers.py",),
    "weightings": ("diffusion_ext/weightings.py",),
    "filters": (
        "fairseq_ext/translation/prepare/filters.py",
        "fairseq_ext/translation/pair_filters.py",
    ),
    "filter_chain": (
        "fairseq_ext/translation/prepare/filter_chain.py",
        "fairseq_ext/translation/filters.py",
    ),
    "claims": (
        "fairseq_ext/backtranslation/generate/claims.py",
        "fairseq_ext/backtranslation/claims.py",
    ),
    "store": ("ext_common/store.py",),
}


@dataclass(frozen=True)
class Mutant:
    """A change of a few lines; `nth` counts the places in `function` with the same lines."""

    module: str
    function: str
    operator: str
    nth: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @classmethod
    def of(cls, record: dict) -> "Mutant":
        values = {name: record[name] for name in cls.__dataclass_fields__}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def line(self, source: str) -> int | None:
        """Index of the first of its lines; None where they are not there."""
        places = places_of(source.splitlines(), scopes(source), self.function, self.before)
        return places[self.nth] if self.nth < len(places) else None

    def apply(self, source: str) -> str:
        """The source with the mutant in it."""
        lines, first = source.splitlines(), self.line(source)
        old, new = (
            text[: len(text) - len(text.lstrip())] for text in (self.before[0], lines[first])
        )
        lines[first : first + len(self.before)] = [
            new + text.removeprefix(old) for text in self.after
        ]
        return "\n".join(lines) + "\n"


def scopes(source: str) -> list[str]:
    """For every line the dotted name of the innermost class or function around it."""
    names = [""] * len(source.splitlines())

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{prefix}.{child.name}".lstrip(".")
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                names[first - 1 : child.end_lineno] = [inner] * (child.end_lineno - first + 1)
            visit(child, inner)

    visit(ast.parse(source), "")
    return names


def places_of(lines: list[str], names: list[str], function: str, block: tuple) -> list[int]:
    """Where in a function the lines of a block stand, whatever their indentation."""
    bare, wanted = [line.strip() for line in lines], [line.strip() for line in block]
    return [
        first
        for first in range(len(lines) - len(block) + 1)
        if names[first] == function and bare[first : first + len(block)] == wanted
    ]


def path_in(tree: Path, module: str) -> Path:
    """The module's file, relative to the checkout."""
    for path in MODULES[module]:
        if (tree / path).exists():
            return Path(path)
    raise UserError(f"{tree} has no {' or '.join(MODULES[module])}: enter its path in MODULES")


def candidates(source: str, module: str, order: random.Random) -> Iterator[Mutant]:
    """Mutants of a source in random order: at most one a place."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    parsed, operators = list(ast_nodes(get_ast(source))), OperatorProvider()
    annotations = list(annotated(ast.parse(source)))
    places: dict[tuple, list] = {}
    for name in operators:
        if operators[name].arguments():
            continue  # VariableReplacer and VariableInserter want names of variables
        found = (place for node in parsed for place in operators[name]().mutation_positions(node))
        for occurrence, place in enumerate(found):
            if not any(start <= place[0] < end for start, end in annotations):
                places.setdefault(place, []).append((name, occurrence))
    lines, names, tree = source.splitlines(), scopes(source), ast.dump(ast.parse(source))
    for place in order.sample(sorted(places), len(places)):
        name, occurrence = order.choice(places[place])
        mutated = mutate_code(source, operators[name](), occurrence)
        with contextlib.suppress(SyntaxError):
            if ast.dump(ast.parse(mutated)) != tree:
                changes = difflib.SequenceMatcher(None, lines, mutated.splitlines(), autojunk=False)
                yield as_text(module, name, lines, names, mutated.splitlines(), changes)


def as_text(module, operator, lines, names, mutated, changes) -> Mutant:
    """The mutant by the lines that differ."""
    blocks = [block for block in changes.get_opcodes() if block[0] != "equal"]
    first, last, new_first, new_last = blocks[0][1], blocks[-1][2], blocks[0][3], blocks[-1][4]
    while not lines[first]:  # which cosmic-ray takes away together with a decorator
        first += 1
    block = tuple(lines[first:last])
    nth = places_of(lines, names, names[first], block).index(first)
    after = tuple(mutated[new_first:new_last])
    return Mutant(module, names[first], operator, nth, block, after)


def annotated(tree: ast.AST) -> Iterator[tuple]:
    """(start, end) of the annotations, each as (line, column)."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if (a := getattr(node, name, None)) is not None:
                yield (a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)
