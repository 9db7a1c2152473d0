from ensdistill.devices import prepare
from ensdistill.jobs import fingerprint, job
from ensdistill.networks import fold_batch_norms, load_network
from ensdistill.objectives import student_objective
from ensdistill.training import train_network

with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    teachers = [fold_batch_norms(load_network(path, device)) for path in snakemake.input.teachers]
    train_network(
        snakemake.input.images,
        snakemake.output.weights,
        snakemake.output.history,
        student_objective(teachers, **snakemake.params.method),
        device=device,
        fingerprint=fingerprint(snakemake),
        **snakemake.params.training,
    )
