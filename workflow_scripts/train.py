from ensdistill.devices import prepare
from ensdistill.jobs import fingerprint, job
from ensdistill.training import train_student

with job(snakemake):
    train_student(
        snakemake.input.images,
        snakemake.output.weights,
        snakemake.output.history,
        teachers=snakemake.input.get("teachers", []),
        backbone=snakemake.input.get("backbone", []),
        device=prepare(snakemake.threads, snakemake.resources),
        fingerprint=fingerprint(snakemake),
        **snakemake.params.training,
    )
