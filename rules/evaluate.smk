# Tables of numbers, each by the function of its name in ensdistill.evaluation: what it reads, and
# which of the study's settings it takes.
ENSEMBLE_AND_STUDENTS = {
    "ensemble": of_ensemble("logits/{}.h5"),
    "students": of_students("logits/{}.h5"),
}
SHIFTED = {
    "ensemble": of_ensemble("logits/shifted/{}.h5"),
    "students": of_students("logits/shifted/{}.h5"),
}
TEACHERS_ON_TRAIN = {
    "perturbed": "results/{study}/logits/perturbed.h5",
    "ensemble": of_ensemble("logits/{}.h5"),
}
EVALUATIONS = {
    "scores": (
        {"teachers": of_pool("logits/{}.h5"), "students": of_students("logits/{}.h5")},
        ["n_bins"],
    ),
    "reliability": (ENSEMBLE_AND_STUDENTS, ["n_bins"]),
    "diversity_students": (ENSEMBLE_AND_STUDENTS, ["n_bins"]),
    "diversity_teachers": (TEACHERS_ON_TRAIN, ["n_bins"]),
    "learning_curves": (
        {"teachers": of_pool("{}/history.csv"), "students": of_students("{}/history.csv")},
        [],
    ),
    "saturation": (TEACHERS_ON_TRAIN, []),
    "sweep": ({"swept": "results/{study}/logits/swept.h5", **TEACHERS_ON_TRAIN}, []),
    "transfer": ({"transferred": "results/{study}/logits/transferred.h5"}, ["members"]),
    "directions": ({"transferred": "results/{study}/logits/transferred.h5"}, ["members"]),
    "jacobians": ({"distances": "results/{study}/logits/distances.h5"}, ["labels"]),
    "corruptions": (SHIFTED, ["n_bins"]),
    "out_of_distribution": (
        {**ENSEMBLE_AND_STUDENTS, **{f"shifted_{name}": files for name, files in SHIFTED.items()}},
        [],
    ),
}

for table, (inputs, settings) in EVALUATIONS.items():

    rule:
        name:
            table
        input:
            **inputs,
        output:
            f"results/{{study}}/metrics/{table}.csv",
        log:
            f"results/{{study}}/logs/metrics/{table}.log",
        group:
            "tables"
        conda:
            "../envs/ensdistill.yaml"
        resources:
            mem_mb=growing(2000, 8),
            runtime=growing(20, 0.1),
        params:
            systems=student_labels if "students" in inputs else None,
            settings=settings_of(settings),
            code=code("evaluate", evaluation=(table,)),
        script:
            "../workflow_scripts/evaluate.py"


rule claims:
    input:
        teachers=of_pool("logits/{}.h5"),
        students=of_students("logits/{}.h5"),
        perturbed="results/{study}/logits/perturbed.h5",
        transferred="results/{study}/logits/transferred.h5",
        distances="results/{study}/logits/distances.h5",
    output:
        csv="results/{study}/claims.csv",
        md="results/{study}/claims.md",
        html=report(
            "results/{study}/claims.html",
            caption="../report/claims.rst",
            category="{study}",
            labels={"what": "The paper's claims", "as": "page"},
        ),
    log:
        "results/{study}/logs/claims.log",
    group:
        "tables"
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000, 8),
        runtime=growing(20, 0.1),
    params:
        systems=student_labels,
        settings=settings_of(["n_bins", "members", "methods"]),
        study=lambda wildcards: STUDIES[wildcards.study].model_dump(include=IN_CAPTIONS),
        code=code("claims"),
    script:
        "../workflow_scripts/claims.py"
