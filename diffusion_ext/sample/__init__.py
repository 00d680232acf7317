"""`python -m diffusion_ext.sample`: images drawn with a trained model."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
