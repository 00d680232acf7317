"""A package, because torch-fidelity installs one of the same name, which spawned processes would import."""
