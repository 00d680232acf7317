"""`python -m diffusion_ext.evaluate`: how far drawn images are from real ones."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
