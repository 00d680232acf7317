"""`--user-dir diffusion_ext`: images for fairseq.

Importing this package where fairseq is loaded registers everything with it. Where it is not (the commands
that need no model), nothing is imported, so that they start at once.
"""

import sys

from ext_common import aliases  # ext_common before torch: it settles OpenMP's threads

aliases.install()
if "fairseq" in sys.modules:
    from ext_common import engine, presets

    engine.apply()
    presets.apply()
    from . import criterion, model, task  # noqa: F401
    from .distill import criterion as consistency  # noqa: F401
