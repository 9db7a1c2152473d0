from ensdistill.evaluation import by_label, student_diversity, teacher_diversity
from ensdistill.jobs import job
from ensdistill.provenance import write_csv

with job(snakemake):
    n_bins = snakemake.params.n_bins
    teachers = teacher_diversity(snakemake.input.perturbed, snakemake.input.ensemble, n_bins)
    write_csv(snakemake.output.teachers, teachers)
    students = by_label(snakemake.params.labels, snakemake.input.students)
    table = student_diversity(students, snakemake.input.ensemble, n_bins)
    write_csv(snakemake.output.students, table)
