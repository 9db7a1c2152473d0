# One thread per process that trains unless a profile says otherwise: as many jobs as cores is the
# best use of a CPU, and results do not depend on how many cores a machine has.


rule teacher:
    input:
        images="results/{study}/images.h5",
        source=source_of,
        pretrained=pretrained_of,
    output:
        weights="results/{study}/teachers/{seed}/weights.safetensors",
        history="results/{study}/teachers/{seed}/history.csv",
    log:
        "results/{study}/logs/teachers/{seed}.log",
    benchmark:
        "results/{study}/benchmarks/teachers/{seed}.tsv"
    conda:
        "../envs/ensdistill.yaml"
    threads: together
    resources:
        gpu=together,
        gpus_per_job=together,
        mem_mb=training_memory,
        runtime=computing(training_passes),
    params:
        training=training,
        code=training_code,
    script:
        "../workflow_scripts/train.py"


rule student:
    input:
        images="results/{study}/images.h5",
        teachers=teachers_of_student,
        backbone=backbone_of_student,
        pretrained=pretrained_of,
    output:
        weights="results/{study}/students/{method}/{seed}/weights.safetensors",
        history="results/{study}/students/{method}/{seed}/history.csv",
    log:
        "results/{study}/logs/students/{method}/{seed}.log",
    benchmark:
        "results/{study}/benchmarks/students/{method}/{seed}.tsv"
    conda:
        "../envs/ensdistill.yaml"
    threads: together
    resources:
        gpu=together,
        gpus_per_job=together,
        mem_mb=training_memory,
        runtime=computing(training_passes),
    params:
        training=training,
        code=training_code,
    script:
        "../workflow_scripts/train.py"
