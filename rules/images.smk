rule download:
    output:
        "results/downloads/{archive}",
    log:
        "results/downloads/{archive}.log",
    wildcard_constraints:
        archive="|".join(map(re.escape, [*ARCHIVES, *ANSWERS])),
    localrule: True  # nodes of a cluster often cannot reach the internet
    conda:
        "../envs/ensdistill.yaml"
    params:
        # Whatever code fetched it, a verified archive is the same.
        md5=lambda wildcards: {**ARCHIVES, **ANSWERS}[wildcards.archive].md5,
    script:
        "../workflow_scripts/download.py"


rule images:
    input:
        archives=lambda wildcards: archives_of(STUDIES[wildcards.study].images),
    output:
        "results/{study}/images.h5",
    log:
        "results/{study}/logs/images.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(4000, 6),
        runtime=growing(60, 0.1),
    params:
        images=lambda wildcards: STUDIES[wildcards.study].images.model_dump(),
        own_data=lambda wildcards: own_data(wildcards.study),
        code=lambda wildcards: reading_code("images", STUDIES[wildcards.study].images),
    script:
        "../workflow_scripts/images.py"


rule shifted:
    input:
        images="results/{study}/images.h5",
        official=official_corruptions,
        archives=lambda wildcards: archives_of(*STUDIES[wildcards.study].out_of_distribution),
    output:
        "results/{study}/shifted.h5",
    log:
        "results/{study}/logs/shifted.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(4000, 6),
        runtime=growing(60, 0.1),
    params:
        settings=shift,
        own_data=lambda wildcards: own_others(wildcards.study),
        code=lambda wildcards: reading_code(
            "shifted", *STUDIES[wildcards.study].out_of_distribution
        ),
    script:
        "../workflow_scripts/shifted.py"
