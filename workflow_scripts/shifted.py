from ensdistill.digests import attributes
from ensdistill.jobs import job
from ensdistill.own_data import remember
from ensdistill.shift import write_shifted

with job(snakemake):
    settings = snakemake.params.settings
    checksums = write_shifted(
        snakemake.output[0],
        snakemake.input.images,
        **settings,
        official=snakemake.input.official,
        archives=snakemake.input.archives,
        attributes=attributes(study=snakemake.wildcards.study, **settings),
    )
    for name, own in snakemake.params.own_data.items():
        remember(**own, sha256=checksums[name])
