"""`python -m fairseq_ext.translation.prepare`: raw bitext becomes fairseq's binarised data."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
