rule download:
    output:
        "results/downloads/{source}.tar.gz",
    log:
        "results/downloads/{source}.log",
    wildcard_constraints:
        source="cifar10|cifar100",
    conda:
        "../envs/ensdistill.yaml"
    params:
        code=code("download"),
    script:
        "../workflow_scripts/download.py"


rule images:
    input:
        unpack(archive),
    output:
        "results/{study}/images.h5",
    log:
        "results/{study}/logs/images.log",
    conda:
        "../envs/ensdistill.yaml"
    params:
        images=lambda wildcards: STUDIES[wildcards.study].images.model_dump(),
        code=code("images"),
    script:
        "../workflow_scripts/images.py"
