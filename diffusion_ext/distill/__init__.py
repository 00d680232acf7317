"""A model of 20 steps made one of 1 or 2: `python -m diffusion_ext.distill`, `--criterion consistency`."""
