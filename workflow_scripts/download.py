from ensdistill.downloads import download
from ensdistill.jobs import job

with job(snakemake):
    download(snakemake.wildcards.archive, snakemake.output[0])
