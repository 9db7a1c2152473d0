"""Distil deep ensembles into BatchEnsemble networks that keep their uncertainty.

Reproduces "Diversity Matters When Learning From Ensembles" (Nam et al., NeurIPS 2021).
"""

__version__ = "0.1.0"


class InputError(Exception):
    """Something given from outside is unusable; one sentence names what and where."""
