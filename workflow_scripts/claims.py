from ensdistill.claims import claims
from ensdistill.files import write_csv, write_text
from ensdistill.jobs import job
from ensdistill.systems import by_label
from ensdistill.verdict_pages import CLAIMS, to_html, to_markdown

with job(snakemake):
    files = dict(snakemake.input.items())
    files["students"] = by_label(snakemake.params.systems, files["students"])
    table = claims(**files, **snakemake.params.settings)
    write_csv(snakemake.output.csv, table)
    write_text(snakemake.output.md, to_markdown(CLAIMS, table, snakemake.wildcards.study))
    write_text(snakemake.output.html, to_html(CLAIMS, table, snakemake.wildcards.study))
