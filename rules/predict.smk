# Both files in one job: to load PyTorch takes longer than to predict on few images.
rule logits:
    input:
        images="results/{study}/images.h5",
        shifted="results/{study}/shifted.h5",
        weights="results/{study}/{network}/weights.safetensors",
    output:
        images="results/{study}/logits/{network}.h5",
        shifted="results/{study}/logits/shifted/{network}.h5",
    log:
        "results/{study}/logs/logits/{network}.log",
    wildcard_constraints:
        network=r"(teachers|(students|judged)/\w+)/\d+",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        gpu=1,
        mem_mb=growing(4000, 4),
        runtime=computing(ensemble_passes(2)),
    params:
        code=network_code,
    script:
        "../workflow_scripts/logits.py"


# What teachers say around training images, by functions of ensdistill.analysis.
rule perturbed:
    input:
        images="results/{study}/images.h5",
        weights=of_ensemble("{}/weights.safetensors"),
    output:
        "results/{study}/logits/perturbed.h5",
    log:
        "results/{study}/logs/logits/perturbed.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        gpu=1,
        mem_mb=growing(4000, 4),
        runtime=computing(ensemble_passes(25)),
    params:
        function="perturbed_logits",
        distillation=distillation,
        images=lambda wildcards: STUDIES[wildcards.study].analyses.perturbed_images,
        settings=lambda wildcards: {"perturbations": STUDIES[wildcards.study].perturbations()},
        beside=["held_out"],
        titles=perturbation_titles(),
        code=analysis_code("perturbed_logits"),
    script:
        "../workflow_scripts/analyse.py"


use rule perturbed as swept with:
    output:
        "results/{study}/logits/swept.h5",
    log:
        "results/{study}/logs/logits/swept.log",
    params:
        function="sweep_logits",
        distillation=distillation,
        images=lambda wildcards: STUDIES[wildcards.study].analyses.train_images,
        settings=eta_sweep,
        beside=[],
        titles=perturbation_titles(sized=True),
        code=analysis_code("sweep_logits", sized=True),


use rule perturbed as transferred with:
    input:
        images="results/{study}/images.h5",
        weights=of_pool("{}/weights.safetensors"),
    output:
        "results/{study}/logits/transferred.h5",
    log:
        "results/{study}/logs/logits/transferred.log",
    params:
        function="transfer_logits",
        distillation=distillation,
        images=lambda wildcards: STUDIES[wildcards.study].analyses.train_images,
        settings=distillation,
        beside=[],
        titles={},
        code=analysis_code("transfer_logits"),


rule distances:
    input:
        images="results/{study}/images.h5",
        teachers=of_ensemble("{}/weights.safetensors"),
        students=of_students("{}/weights.safetensors"),
    output:
        "results/{study}/logits/distances.h5",
    log:
        "results/{study}/logs/logits/distances.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        gpu=1,
        mem_mb=growing(4000, 4),
        runtime=computing(ensemble_passes(25)),
    params:
        images=lambda wildcards: STUDIES[wildcards.study].analyses.jacobian_images,
        code=distances_code,
    script:
        "../workflow_scripts/distances.py"
