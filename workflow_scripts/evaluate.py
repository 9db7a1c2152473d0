from ensdistill import evaluation
from ensdistill.evaluation import by_label
from ensdistill.files import write_csv
from ensdistill.jobs import job

with job(snakemake):
    files = dict(snakemake.input.items())
    for name in files.keys() & {"students", "shifted_students"}:
        files[name] = by_label(snakemake.params.systems, files[name])
    measure = getattr(evaluation, snakemake.rule)
    write_csv(snakemake.output[0], measure(**files, **snakemake.params.settings))
