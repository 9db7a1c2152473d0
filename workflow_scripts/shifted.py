from ensdistill.digests import attributes
from ensdistill.jobs import job
from ensdistill.shift import write_shifted

with job(snakemake):
    settings = snakemake.params.settings
    write_shifted(
        snakemake.output[0],
        snakemake.input.images,
        **settings,
        official=snakemake.input.official,
        archives=snakemake.input.archives,
        attributes=attributes(study=snakemake.wildcards.study, **settings),
    )
