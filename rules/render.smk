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
    group:
        "tables"
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(5),
    params:
        published=lambda wildcards: STUDIES[wildcards.study].model_dump()["published"],
        code=code("table"),
    script:
        "../workflow_scripts/table.py"


# What each figure is drawn from; it is drawn by the function of its name in ensdistill.figures.
FIGURES = {
    "diversity_teachers": "results/{study}/metrics/diversity_teachers.csv",
    "diversity_students": "results/{study}/metrics/diversity_students.csv",
    "de_curve": "results/{study}/tables/results.csv",
    "reliability": "results/{study}/metrics/reliability.csv",
    "learning_curves": "results/{study}/metrics/learning_curves.csv",
    "examples": "results/{study}/logits/perturbed.h5",
    "saturation": "results/{study}/metrics/saturation.csv",
    "sweep": "results/{study}/metrics/sweep.csv",
    "transfer": [
        "results/{study}/metrics/transfer.csv",
        "results/{study}/metrics/directions.csv",
    ],
    "jacobians": "results/{study}/metrics/jacobians.csv",
    "corruptions": "results/{study}/metrics/corruptions.csv",
    "out_of_distribution": "results/{study}/metrics/out_of_distribution.csv",
}
TITLES = {
    "diversity_teachers": "Diversity of the teachers",
    "diversity_students": "Diversity of the students",
    "de_curve": "Deep ensembles by size, and students",
    "reliability": "Reliability diagrams",
    "learning_curves": "Learning curves",
    "examples": "Perturbed images",
    "saturation": "Confidence of the teachers on train and test",
    "sweep": "Diversity by size of the perturbation",
    "transfer": "ODS from one teacher, seen by others",
    "jacobians": "Jacobians of students and teachers",
    "corruptions": "Corrupted images",
    "out_of_distribution": "Out-of-distribution detection",
}

# What their captions say of a study.
IN_CAPTIONS = {
    "members": True,
    "pool": True,
    "student_seeds": True,
    "confidence_bins": True,
    "distillation": True,
    "teacher": {"epochs"},
    "student": {"epochs"},
    "corruptions": {"source", "images"},
    "out_of_distribution": {"source", "images"},
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
                labels={"what": TITLES[figure], "as": "figure"},
            ),
            f"results/{{study}}/figures/{figure}.pdf",
        log:
            f"results/{{study}}/logs/figures/{figure}.log",
        group:
            "tables"
        conda:
            "../envs/ensdistill.yaml"
        resources:
            mem_mb=growing(2000),
            runtime=growing(5),
        params:
            figure=figure,
            study=lambda wildcards: STUDIES[wildcards.study].model_dump(include=IN_CAPTIONS),
            code=code("figure", figures=(figure,)),
        script:
            "../workflow_scripts/figure.py"
