"""`python -m fairseq_ext.backtranslation.assemble`: bitext and synthetic text become training data."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
