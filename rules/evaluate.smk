def student_logits(wildcards):
    """All students' logits files, flat; the labels of their methods are in `labels`."""
    groups = all_student_files(wildcards.study, "logits/{}.h5")
    return [path for paths in groups.values() for path in paths]


def student_labels(wildcards):
    """The system of each file of `student_logits`."""
    groups = all_student_files(wildcards.study, "logits/{}.h5")
    return [label for label, paths in groups.items() for _ in paths]


def ensemble_logits(wildcards):
    """Logits files of the teachers that teach."""
    return teacher_files(wildcards.study, "logits/{}.h5", STUDIES[wildcards.study].members)


def confidence_bins(wildcards):
    return STUDIES[wildcards.study].confidence_bins


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
