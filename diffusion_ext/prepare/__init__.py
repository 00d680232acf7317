"""`python -m diffusion_ext.prepare`: images are decoded once, into a store."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
