from ensdistill.devices import prepare
from ensdistill.jobs import fingerprint, job
from ensdistill.objectives import cross_entropy
from ensdistill.training import train_network

with job(snakemake):
    train_network(
        snakemake.input.images,
        snakemake.output.weights,
        snakemake.output.history,
        cross_entropy,
        device=prepare(snakemake.threads, snakemake.resources),
        fingerprint=fingerprint(snakemake),
        **snakemake.params.training,
    )
