from ensdistill.digests import attributes
from ensdistill.jobs import job
from ensdistill.own_data import remember
from ensdistill.shift import write_shifted

with job(snakemake):
    settings = snakemake.params.settings
    sha256 = write_shifted(
        snakemake.output[0],
        snakemake.input.images,
        **settings,
        official=snakemake.input.official,
        archives=snakemake.input.archives,
        attributes=attributes(study=snakemake.wildcards.study, **settings),
    )
    if settings["out_of_distribution"]["source"] == "folder":
        remember(**snakemake.params.own_data, sha256=sha256)
