from ensdistill.devices import prepare
from ensdistill.jobs import job
from ensdistill.networks import load_network
from ensdistill.objectives import student_objective
from ensdistill.training import train_network

with job(snakemake):
    device = prepare(snakemake.threads)
    teachers = [load_network(path, device) for path in snakemake.input.teachers]
    train_network(
        snakemake.input.images,
        snakemake.output.weights,
        snakemake.output.history,
        student_objective(teachers, **snakemake.params.method),
        device=device,
        **snakemake.params.training,
    )
