from ensdistill.images import download
from ensdistill.jobs import job

with job(snakemake):
    download(snakemake.wildcards.source, snakemake.output[0])
