"""`python -m fairseq_ext.backtranslation.generate`: monolingual text becomes synthetic bitext."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
