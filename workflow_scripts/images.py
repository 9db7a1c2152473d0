from ensdistill.digests import attributes
from ensdistill.images import write_images
from ensdistill.jobs import job

with job(snakemake):
    images = snakemake.params.images
    write_images(
        snakemake.output[0],
        **images,
        archives=snakemake.input.archives,
        attributes=attributes(study=snakemake.wildcards.study, images=images),
    )
