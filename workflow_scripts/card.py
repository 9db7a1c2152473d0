from pathlib import Path

from ensdistill.card import make_card
from ensdistill.jobs import job

with job(snakemake):
    make_card(snakemake.input.weights, Path(snakemake.output[0]).parent)
