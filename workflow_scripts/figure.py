from ensdistill import figures
from ensdistill.jobs import job

with job(snakemake):
    draw = getattr(figures, snakemake.params.figure)
    figures.save(draw(list(snakemake.input)), snakemake.output)
