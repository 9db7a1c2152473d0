from ensdistill.claims import claims
from ensdistill.evaluation import by_label
from ensdistill.files import write_csv, write_text
from ensdistill.jobs import job
from ensdistill.tables import claims_to_html, claims_to_markdown

with job(snakemake):
    files = dict(snakemake.input.items())
    files["students"] = by_label(snakemake.params.systems, files["students"])
    table = claims(**files, **snakemake.params.settings)
    write_csv(snakemake.output.csv, table)
    write_text(snakemake.output.md, claims_to_markdown(table, snakemake.wildcards.study))
    write_text(snakemake.output.html, claims_to_html(table, snakemake.wildcards.study))
