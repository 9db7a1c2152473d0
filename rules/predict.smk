rule logits:
    input:
        images="results/{study}/images.h5",
        weights="results/{study}/{network}/weights.safetensors",
    output:
        "results/{study}/logits/{network}.h5",
    log:
        "results/{study}/logs/logits/{network}.log",
    wildcard_constraints:
        network=r"(teachers|students/\w+)/\d+",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        gpu=1,
    params:
        code=code("logits"),
    script:
        "../workflow_scripts/logits.py"


rule perturbed:
    input:
        images="results/{study}/images.h5",
        teachers=lambda wildcards: teacher_files(
            wildcards.study, "{}/weights.safetensors", STUDIES[wildcards.study].members
        ),
    output:
        "results/{study}/logits/perturbed.h5",
    log:
        "results/{study}/logs/logits/perturbed.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        gpu=1,
    params:
        perturbation=lambda wildcards: STUDIES[wildcards.study].distillation.model_dump(
            include={"eta", "temperature"}
        ),
        code=code("perturbed"),
    script:
        "../workflow_scripts/perturbed.py"
