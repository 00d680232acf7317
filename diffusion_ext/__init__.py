"""`--user-dir diffusion_ext`: images for fairseq.

Importing this package where fairseq is loaded registers everything with it. Where it is not (the commands
that need no model), nothing is imported, so that they start at once.
"""

import sys

from ext_common import aliases  # ext_common before torch: it settles OpenMP's threads

aliases.install()


def register() -> None:
    """Register everything with fairseq, which is imported here where it is not yet."""
    from ext_common import engine, presets

    engine.apply()
    presets.apply()
    from ext_common import muon  # noqa: F401

    from . import criterion, model, task  # noqa: F401
    from .distill import criterion as consistency  # noqa: F401


if "fairseq" in sys.modules:
    register()
