"""Cosines between the ODS directions of different teachers; drawn beside `transfer`."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ensdistill.hdf5 import open_hdf5

READS = {"transferred": "logits/transferred.h5"}
SETTINGS = ["members"]


def table(transferred: str, members: int) -> pd.DataFrame:
    """Histograms of `direction_cosines`: name, bin, low, high, count, and mean and n of a name."""
    edges, tables = np.linspace(-1, 1, 81), []
    for name, cosines in direction_cosines(transferred, members).items():
        bins = {"name": name, "bin": range(80), "low": edges[:-1], "high": edges[1:]}
        bins["count"] = np.histogram(cosines.clip(-1, 1), edges)[0]
        tables.append(pd.DataFrame({**bins, "mean": cosines.mean(), "n": cosines.size}))
    return pd.concat(tables, ignore_index=True)


def direction_cosines(transferred: str, members: int) -> dict[str, NDArray[np.float32]]:
    """Cosines (N, pairs) between ODS directions: of two ensemble members (`inside`), of a member
    and an external network (`outside`; none if the pool has none), and of each with `random`."""
    with open_hdf5(transferred) as file:
        cosines, noise = file["cosines"][:], file["random_cosines"][:]
    rows, columns = np.triu_indices(cosines.shape[1], 1)
    named = {
        "inside": cosines[:, rows, columns][:, columns < members],
        "outside": cosines[:, rows, columns][:, (rows < members) & (columns >= members)],
        "random": noise,
    }
    return {name: values for name, values in named.items() if values.shape[1]}
