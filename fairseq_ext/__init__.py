"""`--user-dir fairseq_ext`: speech and translation for fairseq.

Importing this package where fairseq is loaded registers everything with it. Where it is not (the commands
that need no model), nothing is imported, so that they start at once.
"""

import sys

if "fairseq" in sys.modules:
    from ext_common import engine

    engine.apply()
    from . import noam  # noqa: F401
    from .speaker import criterion, model, task  # noqa: F401
    from .translation import task as translation_task  # noqa: F401
