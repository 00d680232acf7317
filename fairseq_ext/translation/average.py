"""The average of several checkpoints of one training: :mod:`fairseq_ext.average` by this wing's name.

python -m fairseq_ext.translation.average CKPT --best 5 --output CKPT/average.pt
"""

import functools

from ext_common.cli import run
from fairseq_ext.average import average, main

__all__ = ["average", "main"]

if __name__ == "__main__":
    run(functools.partial(main, program="fairseq_ext.translation.average"))
