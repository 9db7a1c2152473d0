rule table:
    input:
        "results/{study}/metrics/scores.csv",
    output:
        csv=report(
            "results/{study}/tables/results.csv",
            caption="../report/results.rst",
            category="{study}",
            labels={"what": "Results", "as": "CSV"},
        ),
        md="results/{study}/tables/results.md",
        tex="results/{study}/tables/results.tex",
        html=report(
            "results/{study}/tables/results.html",
            caption="../report/results.rst",
            category="{study}",
            labels={"what": "Results", "as": "table"},
        ),
    log:
        "results/{study}/logs/table.log",
    conda:
        "../envs/ensdistill.yaml"
    params:
        code=code("table"),
    script:
        "../workflow_scripts/table.py"


def histories(wildcards):
    """Histories of all teachers and students."""
    groups = all_student_files(wildcards.study, "{}/history.csv")
    students = [path for paths in groups.values() for path in paths]
    return [*teacher_files(wildcards.study, "{}/history.csv"), *students]


# What each figure is drawn from; it is drawn by the function of its name in ensdistill.figures.
FIGURES = {
    "diversity_teachers": "results/{study}/metrics/diversity_teachers.csv",
    "diversity_students": "results/{study}/metrics/diversity_students.csv",
    "de_curve": "results/{study}/tables/results.csv",
    "reliability": "results/{study}/metrics/reliability.csv",
    "learning_curves": histories,
    "examples": "results/{study}/logits/perturbed.h5",
}

for figure, source in FIGURES.items():

    rule:
        name:
            f"figure_{figure}"
        input:
            source,
        output:
            report(
                f"results/{{study}}/figures/{figure}.png",
                caption=f"../report/{figure}.rst",
                category="{study}",
                labels={"what": figure.replace("_", " ").capitalize(), "as": "figure"},
            ),
            f"results/{{study}}/figures/{figure}.pdf",
        log:
            f"results/{{study}}/logs/figures/{figure}.log",
        conda:
            "../envs/ensdistill.yaml"
        params:
            figure=figure,
            study=lambda wildcards: STUDIES[wildcards.study].model_dump(),
            code=code("figure"),
        script:
            "../workflow_scripts/figure.py"
