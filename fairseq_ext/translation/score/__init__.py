"""`python -m fairseq_ext.translation.score`: BLEU, chrF and TER, with tests of significance."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
