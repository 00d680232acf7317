"""What is closed in fairseq, as Markdown: `python -m ext_common.compat`.

From the docstrings of this package; nothing of fairseq is imported for it.
"""

import ast
import inspect
import textwrap
from pathlib import Path

HEAD = """\
# What is closed in fairseq

Python from 3.11 and PyTorch from 2.6 on break fairseq in many places. `ext_common/compat` closes those that
this project meets, at run time, one function each, without touching site-packages and without switching off
the safety of `torch.load`. A place in fairseq that no longer looks as it did is left alone, with a warning.

Where a default of fairseq silently does harm (batches rounded to multiples of 8 drop utterances, workers
repeat the crops of the first epoch, `torchrun` on CPUs trains twice into one folder), the tasks here override
it.
"""


def page() -> str:
    """A section each module with gaps, an entry each function that its GAPS name, in their order."""
    parts = [HEAD]
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = gaps_of(tree)
        if not names:
            continue
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        title, _, more = (ast.get_docstring(tree) or path.stem).partition("\n")
        parts.append(f"## {title.rstrip('.')}\n")
        parts += [f"{more.strip()}\n"] if more.strip() else []
        parts += [entry(path.stem, functions[name]) for name in names]
    return "\n".join(parts)


def gaps_of(tree: ast.Module) -> list[str]:
    """The names in a module's `GAPS`."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "GAPS" for t in targets):
            return [element.id for element in node.value.elts]
    return []


def entry(module: str, function: ast.FunctionDef) -> str:
    """A function's name and what its docstring says."""
    text = inspect.cleandoc(ast.get_docstring(function) or "")
    return f"**`{module}.{function.name}`**\n\n{textwrap.dedent(text).replace('``', '`')}\n"


if __name__ == "__main__":
    print(page(), end="")
