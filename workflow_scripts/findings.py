from ensdistill.files import read_csv, write_csv, write_text
from ensdistill.findings import findings
from ensdistill.jobs import job
from ensdistill.systems import by_label
from ensdistill.verdict_pages import FINDINGS, to_html, to_markdown

with job(snakemake):
    files = dict(snakemake.input.items())
    for name in ("students", "shifted_students"):
        files[name] = by_label(snakemake.params.systems, files[name])
    files["costs"] = read_csv(files["costs"])
    table = findings(**files, **snakemake.params.settings)
    write_csv(snakemake.output.csv, table)
    write_text(snakemake.output.md, to_markdown(FINDINGS, table, snakemake.wildcards.study))
    write_text(snakemake.output.html, to_html(FINDINGS, table, snakemake.wildcards.study))
