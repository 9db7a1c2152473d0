# One thread per training job unless a profile says otherwise: as many jobs as cores is the best
# use of a CPU, and results do not depend on how many cores a machine has.


rule teacher:
    input:
        images="results/{study}/images.h5",
    output:
        weights="results/{study}/teachers/{seed}/weights.safetensors",
        history="results/{study}/teachers/{seed}/history.csv",
    log:
        "results/{study}/logs/teachers/{seed}.log",
    benchmark:
        "results/{study}/benchmarks/teachers/{seed}.tsv"
    conda:
        "../envs/ensdistill.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        training=lambda wildcards: training(
            wildcards, "teacher", "teacher", int(wildcards.seed), ensemble_size=1
        ),
        code=code("teacher"),
    script:
        "../workflow_scripts/teacher.py"


def teachers_of_student(wildcards):
    study = STUDIES[wildcards.study]
    if study.methods[wildcards.method].objective == "cross_entropy":
        return []
    return teacher_files(wildcards.study, "{}/weights.safetensors", study.members)


def student_training(wildcards):
    study = STUDIES[wildcards.study]
    method = study.methods[wildcards.method]
    ensemble_size = study.members if method.network == "batch_ensemble" else 1
    # Seeds apart from the teachers', or a plain student would start as its teacher did. The same
    # for all methods, so that they are compared from the same start.
    seed = 1000 + int(wildcards.seed)
    return training(wildcards, "student", method.label, seed, ensemble_size)


rule student:
    input:
        images="results/{study}/images.h5",
        teachers=teachers_of_student,
    output:
        weights="results/{study}/students/{method}/{seed}/weights.safetensors",
        history="results/{study}/students/{method}/{seed}/history.csv",
    log:
        "results/{study}/logs/students/{method}/{seed}.log",
    benchmark:
        "results/{study}/benchmarks/students/{method}/{seed}.tsv"
    conda:
        "../envs/ensdistill.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        training=student_training,
        method=lambda wildcards: STUDIES[wildcards.study].method(wildcards.method),
        code=code("student"),
    script:
        "../workflow_scripts/student.py"
