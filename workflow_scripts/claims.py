from ensdistill.claims import claims
from ensdistill.claims_page import to_html, to_markdown
from ensdistill.files import write_csv, write_text
from ensdistill.jobs import job
from ensdistill.systems import by_label

with job(snakemake):
    files = dict(snakemake.input.items())
    files["students"] = by_label(snakemake.params.systems, files["students"])
    table = claims(**files, **snakemake.params.settings)
    write_csv(snakemake.output.csv, table)
    write_text(snakemake.output.md, to_markdown(table, snakemake.wildcards.study))
    write_text(snakemake.output.html, to_html(table, snakemake.wildcards.study))
