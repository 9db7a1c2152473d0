from ensdistill.digests import attributes
from ensdistill.images import write_images
from ensdistill.jobs import job
from ensdistill.own_data import remember

with job(snakemake):
    images = snakemake.params.images
    sha256 = write_images(
        snakemake.output[0],
        **images,
        archives=snakemake.input.archives,
        attributes=attributes(study=snakemake.wildcards.study, images=images),
    )
    if images["source"] == "folder":
        remember(**snakemake.params.own_data, sha256=sha256)
