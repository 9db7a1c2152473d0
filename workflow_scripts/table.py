from ensdistill.files import read_csv, write_csv, write_text
from ensdistill.jobs import job
from ensdistill.tables import measured_columns, summarize, to_html, to_latex, to_markdown

with job(snakemake):
    scores, costs = map(read_csv, snakemake.input)
    summary = summarize(scores, snakemake.params.published, costs)
    write_csv(snakemake.output.csv, summary)
    write_text(snakemake.output.md, to_markdown(summary))
    write_text(snakemake.output.tex, to_latex(summary))
    write_text(snakemake.output.html, to_html(summary))
    wide = measured_columns(summary)
    write_text(snakemake.output.wide_md, to_markdown(summary, wide))
    write_text(snakemake.output.wide_html, to_html(summary, wide, "All metrics"))
