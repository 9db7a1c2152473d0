from ensdistill.adoption import MAKERS
from ensdistill.devices import prepare
from ensdistill.jobs import fingerprint, job

with job(snakemake):
    files, made = snakemake.input, snakemake.output
    how, more = "adopted", {}
    if "source" not in snakemake.params.training:
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
