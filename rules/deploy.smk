# What leaves the study: a student's model card, the files beside it as the Hugging Face Hub takes them,
# and the student as an ONNX file. `deploy` says of which methods; of any student on demand:
#
#     snakemake --cores all results/digits/deployed/kd_ods/0/README.md
#     snakemake --cores all results/digits/deployed/kd_ods/0/model.onnx


# Needs ensdistill[onnx].
rule export:
    input:
        weights="results/{study}/students/{method}/{seed}/weights.safetensors",
        images="results/{study}/images.h5",
        logits="results/{study}/logits/students/{method}/{seed}.h5",
    output:
        "results/{study}/deployed/{method}/{seed}/model.onnx",
    log:
        "results/{study}/logs/deployed/{method}/{seed}_onnx.log",
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(4000, 0.2),
        runtime=growing(20),
    params:
        code=lambda wildcards: code("export", **entries_of(wildcards)),
    script:
        "../workflow_scripts/export.py"


rule card:
    input:
        weights="results/{study}/students/{method}/{seed}/weights.safetensors",
        images="results/{study}/images.h5",
        logits="results/{study}/logits/students/{method}/{seed}.h5",
        teachers=logits_of_teachers,
        metrics=[
            f"results/{{study}}/metrics/{name}.csv"
            for name in ("scores", "costs", "corruptions", "out_of_distribution")
        ],
        figure="results/{study}/figures/reliability.png",
        exported=exported,
    output:
        "results/{study}/deployed/{method}/{seed}/README.md",
        "results/{study}/deployed/{method}/{seed}/config.json",
        "results/{study}/deployed/{method}/{seed}/weights.safetensors",
        "results/{study}/deployed/{method}/{seed}/reliability.png",
    log:
        "results/{study}/logs/deployed/{method}/{seed}.log",
    group:
        short
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000, 0.2),
        runtime=growing(5),
    params:
        words=text_digest(PACKAGE / "card/README.md.jinja"),
        code=judging_code("card", METRICS=("acc", "nll", "bs", "ece", "nll_ts", "bs_ts", "ece_ts")),
    script:
        "../workflow_scripts/card.py"
