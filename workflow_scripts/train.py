from ensdistill.adoption import MAKERS
from ensdistill.devices import prepare
from ensdistill.jobs import fingerprint, job

with job(snakemake):
    files, made = snakemake.input, snakemake.output
    if source := files.get("source"):
        how, more = "adopted", {"source": source}
    else:
        taught = {key: files.get(key, []) for key in ("teachers", "backbone")}
        how, more = "trained", {**taught, "fingerprint": fingerprint(snakemake)}
    MAKERS[how](
        files.images,
        made.weights,
        made.get("history"),
        device=prepare(snakemake.threads, snakemake.resources),
        **more,
        **snakemake.params.training,
    )
