from ensdistill.evaluation import learning_curves
from ensdistill.jobs import job
from ensdistill.provenance import write_csv

with job(snakemake):
    write_csv(snakemake.output[0], learning_curves(snakemake.params.labels, snakemake.input))
