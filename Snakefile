# The whole study, from raw images to tables and figures:
#
#     images ──► teachers ──► students (per method) ──► logits ──► metrics ──► tables, figures, claims, first page
#
# `snakemake --cores all` makes the studies named under `run` in config.yaml;
# `snakemake --cores all results/<study>/figures/de_curve.png` makes just what that file needs.
import os
import shlex
import sys
from glob import glob
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.utils import min_version

from ensdistill import InputError
from ensdistill.config_errors import check_files
from ensdistill.devices import visible_cards

min_version("9.19")

# Snakemake writes the path of its Python into shell commands as it is: a space in it, or another
# sign that shells take for something else, would fail every job.
if os.path.exists(sys.executable):  # not quoted yet
    sys.executable = shlex.quote(sys.executable)

if workflow.is_main_process:
    # A workflow that uses this one as a module gives it a configuration of its own.
    own_config = [] if workflow.modifier.skip_configfile else ["config.yaml"]
    try:
        check_files([*workflow.configfiles, *own_config])
    except InputError as error:
        raise WorkflowError(str(error)) from None

RECORDS = {}  # what Snakemake knew of the files to be made


configfile: "config.yaml"


# For `--sdm apptainer`; made from envs/Dockerfile, as docs/environments.md says.
container: "envs/ensdistill.sif"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/common_elsewhere.smk"
include: "rules/images.smk"
include: "rules/elsewhere.smk"
include: "rules/train.smk"
include: "rules/predict.smk"
include: "rules/evaluate.smk"
include: "rules/deploy.smk"
include: "rules/render.smk"


rule all:
    default_target: True
    input:
        expand("results/{study}/tables/{table}", study=RUN, table=TABLES),
        expand("results/{study}/figures/{figure}.png", study=RUN, figure=FIGURES),
        expand("results/{study}/{page}.md", study=RUN, page=["claims", "findings"]),
        expand("results/{study}/index.html", study=RUN),
        [card for study in RUN for card in cards(study)],


# snakemake --cores all teachers | students | tables | figures
rule teachers:
    input:
        [path for study in RUN for path in teacher_files(study, "{}/weights.safetensors")],


rule students:
    input:
        [path for study in RUN for path in student_files(study, "{}/weights.safetensors")],


rule tables:
    input:
        expand("results/{study}/tables/{table}", study=RUN, table=TABLES),


rule figures:
    input:
        expand("results/{study}/figures/{figure}.png", study=RUN, figure=FIGURES),


# What exists of the report, of all studies: snakemake --report results/report.html made
rule made:
    input:
        [path for study in STUDIES for path in reported(study)],


# A workflow that uses this one as a module calls these three itself: `onstart: study.onstart()`.
onstart:
    results = Path(placed("results/"))
    if not os.access(results if results.exists() else ".", os.W_OK):
        raise WorkflowError(f"{results.absolute()}: this folder cannot be written to")
    if workflow.local_exec and not visible_cards():
        logger.info("No GPU found: everything computes on the CPU.")
    for job in workflow.dag.needrun_jobs():
        RECORDS.update({file: workflow.persistence.metadata(file) for file in job.output})


# Snakemake notes the settings and inputs of a failed job as if it had made its files, and then
# takes results of its earlier files as up to date: the next run would make nothing, with status 0.
onerror:
    persistence = workflow.persistence
    for job in workflow.scheduler.failed:
        for file in filter(RECORDS.get, job.output):
            persistence._write_record(persistence._get_key(file), RECORDS[file])


# What unfinished training would have gone on from; see ensdistill.state.
onsuccess:
    for state in glob(placed("results/**/state.pt"), recursive=True):
        if Path(state).with_name("weights.safetensors").exists():
            Path(state).unlink()
