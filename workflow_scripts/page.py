from pathlib import Path

from ensdistill.files import write_text
from ensdistill.jobs import job
from ensdistill.page import first_page

with job(snakemake):
    output, params = snakemake.output[0], snakemake.params
    folder, study = Path(output).parent, snakemake.wildcards.study
    write_text(output, first_page(folder, study, params.study, params.titles, params.captions))
