from ensdistill.adoption import MAKERS
from ensdistill.devices import prepare
from ensdistill.jobs import fingerprint, job
from ensdistill.launching import train_together

with job(snakemake):
    files, made, how = snakemake.input, snakemake.output, snakemake.params.training
    paths = {"images": files.images, "weights": made.weights, "history": made.get("history")}
    threads, resources = snakemake.threads, snakemake.resources
    if "source" in how:
        MAKERS["adopted"](**paths, device=prepare(threads, resources), **how)
    else:
        taught = {key: list(files.get(key, [])) for key in ("teachers", "backbone")}
        how = {**paths, **taught, "fingerprint": fingerprint(snakemake), **how}
        processes = resources.get("gpus_per_job", 1)
        if processes > 1:
            train_together(processes, threads, resources, snakemake.log[0], **how)
        else:
            MAKERS["trained"](**how, device=prepare(threads, resources))
