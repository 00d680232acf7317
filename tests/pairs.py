"""All-pairs: of a full product of parameters, cases that still show every two values together."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any


def all_pairs(cases: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of cases, in order, in which every pair of values occurs that occurs in any of them.

    Greedy: the case with the most pairs that are still missing, the first of equals. One factor: all cases.
    """
    pairs = [set(itertools.combinations(sorted(_values(case)), 2)) or {()} for case in cases]
    missing = set().union(*pairs)
    if missing == {()}:
        return list(range(len(cases)))
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def _values(case: Mapping[str, Any], prefix: str = "") -> set[tuple[str, Hashable]]:
    """(name, value as text) of each parameter; of one that is a dict, of each of its entries."""
    found = set()
    for name, value in case.items():
        if isinstance(value, Mapping):
            found |= _values(value, f"{prefix}{name}.")
        else:
            found.add((f"{prefix}{name}", repr(value)))
    return found
