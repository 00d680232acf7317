"""`python -m diffusion_ext.export`: a trained model as a pipeline of diffusers."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.__main__")
