import logging

from ensdistill.devices import prepare
from ensdistill.jobs import job
from ensdistill.parity import export_student

with job(snakemake):
    prepare(snakemake.threads, snakemake.resources)
    report = export_student(snakemake.input.weights, snakemake.output[0], "onnx")
    logging.getLogger("ensdistill").info("%s", report)
