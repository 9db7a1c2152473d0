# Networks that were trained elsewhere and are judged beside the students: by their weights, or by
# their logits alone. Teachers that are adopted are made by the rule `teacher`.


rule judged:
    input:
        images="results/{study}/images.h5",
        source=source_of,
    output:
        weights="results/{study}/judged/{judged}/{seed}/weights.safetensors",
    log:
        "results/{study}/logs/judged/{judged}/{seed}.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        gpu=1,
        mem_mb=growing(4000, 4),
        runtime=computing(ensemble_passes(1)),
    params:
        training=training,
        code=training_code,
    script:
        "../workflow_scripts/train.py"


# Logits that were computed elsewhere, checked against the study's images.
rule given:
    input:
        images="results/{study}/images.h5",
        described="results/{study}/images.h5",
        logits=given_logits("logits"),
    output:
        "results/{study}/logits/given/{judged}/{seed}.h5",
    log:
        "results/{study}/logs/logits/given/{judged}/{seed}.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000, 8),
        runtime=growing(20, 0.1),
    params:
        classes=lambda wildcards: STUDIES[wildcards.study].judge[wildcards.judged].classes,
        code=code("given"),
    script:
        "../workflow_scripts/given.py"


use rule given as given_shifted with:
    input:
        images="results/{study}/shifted.h5",
        described="results/{study}/images.h5",
        logits=given_logits("shifted"),
    output:
        "results/{study}/logits/shifted/given/{judged}/{seed}.h5",
    log:
        "results/{study}/logs/logits/shifted/given/{judged}/{seed}.log",
