from ensdistill.costs import cost_table
from ensdistill.devices import prepare
from ensdistill.files import write_csv
from ensdistill.jobs import job

with job(snakemake):
    # The job has all cores, so that nothing runs beside it; it computes with as many as are said.
    device = prepare(snakemake.params.threads, snakemake.resources)
    systems = dict(snakemake.params.systems)
    judged = dict(zip(systems.pop("judged", []), snakemake.input.judged, strict=True))
    table = cost_table(snakemake.input.images, **systems, judged=judged, device=device)
    write_csv(snakemake.output[0], table)
