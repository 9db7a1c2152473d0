from ensdistill.evaluation import by_label, score_systems
from ensdistill.jobs import job
from ensdistill.provenance import write_csv

with job(snakemake):
    students = by_label(snakemake.params.labels, snakemake.input.students)
    frame = score_systems(snakemake.input.teachers, students, snakemake.params.n_bins)
    write_csv(snakemake.output[0], frame)
