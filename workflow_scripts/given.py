from ensdistill.given_logits import take_over
from ensdistill.jobs import job

with job(snakemake):
    take_over(
        snakemake.input.logits,
        snakemake.output[0],
        images=snakemake.input.images,
        described=snakemake.input.described,
        classes=snakemake.params.classes,
        origin=dict(snakemake.wildcards.items()),
    )
