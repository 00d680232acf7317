"""`python -m fairseq_ext.speaker.prepare`: recordings become a store of features."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
