"""`--user-dir diffusion_ext`: images for fairseq.

Importing this package where fairseq is loaded registers everything with it. Where it is not (the commands
that need no model), nothing is imported, so that they start at once.
"""

import sys

if "fairseq" in sys.modules:
    from ext_common import engine

    engine.apply()
    from . import criterion, model, task  # noqa: F401
