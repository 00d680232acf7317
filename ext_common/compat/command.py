"""fairseq_cli.train, which need not be imported yet when the plugin is."""

import sys
from collections.abc import Callable
from types import ModuleType

from fairseq import utils

from ext_common.compat.patching import after

Change = Callable[[ModuleType], object]
_changes: list[Change] = []


def in_training_command(change: Change) -> None:
    """Call `change(module)` for fairseq_cli.train, now or as soon as it is there.

    It is asked again at each import of a --user-dir, which main begins with: `change` must be one
    that can be made twice, as `patching.replace` is.
    """
    if change not in _changes:
        _changes.append(change)
    after(utils, "import_user_module", _change_all, ("import_user_module.memo",))
    _change_all()


def training_commands() -> list[ModuleType]:
    """fairseq_cli.train where it is imported, under its name or as the program itself."""
    candidates = (sys.modules.get("fairseq_cli.train"), sys.modules.get("__main__"))
    needed = ("get_valid_stats", "add_defaults", "should_stop_early")
    return [module for module in candidates if all(hasattr(module, name) for name in needed)]


def _change_all(*_) -> None:
    for module in training_commands():
        for change in _changes:
            change(module)
