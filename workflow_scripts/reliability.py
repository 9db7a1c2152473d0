from ensdistill.evaluation import by_label, reliability_table
from ensdistill.jobs import job
from ensdistill.provenance import write_csv

with job(snakemake):
    students = by_label(snakemake.params.labels, snakemake.input.students)
    table = reliability_table(students, snakemake.input.ensemble, snakemake.params.n_bins)
    write_csv(snakemake.output[0], table)
