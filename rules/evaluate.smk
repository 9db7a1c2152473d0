rule scores:
    input:
        teachers=lambda wildcards: teacher_files(wildcards.study, "logits/{}.h5"),
        students=student_logits,
    output:
        "results/{study}/metrics/scores.csv",
    log:
        "results/{study}/logs/scores.log",
    conda:
        "../envs/ensdistill.yaml"
    params:
        labels=student_labels,
        n_bins=confidence_bins,
        code=code("scores"),
    script:
        "../workflow_scripts/scores.py"


rule reliability:
    input:
        ensemble=ensemble_logits,
        students=student_logits,
    output:
        "results/{study}/metrics/reliability.csv",
    log:
        "results/{study}/logs/reliability.log",
    conda:
        "../envs/ensdistill.yaml"
    params:
        labels=student_labels,
        n_bins=confidence_bins,
        code=code("reliability"),
    script:
        "../workflow_scripts/reliability.py"


rule diversity:
    input:
        perturbed="results/{study}/logits/perturbed.h5",
        ensemble=ensemble_logits,
        students=student_logits,
    output:
        teachers="results/{study}/metrics/diversity_teachers.csv",
        students="results/{study}/metrics/diversity_students.csv",
    log:
        "results/{study}/logs/diversity.log",
    conda:
        "../envs/ensdistill.yaml"
    params:
        labels=student_labels,
        n_bins=confidence_bins,
        code=code("diversity"),
    script:
        "../workflow_scripts/diversity.py"


rule learning_curves:
    input:
        histories,
    output:
        "results/{study}/metrics/learning_curves.csv",
    log:
        "results/{study}/logs/learning_curves.log",
    conda:
        "../envs/ensdistill.yaml"
    params:
        labels=history_labels,
        code=code("learning_curves"),
    script:
        "../workflow_scripts/learning_curves.py"
