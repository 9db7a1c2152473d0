# One rule for each result of ensdistill/reports that has numbers: results/<study>/metrics/<name>.csv
# by the function `table` in its file, which also says what it reads.
for result in RESULTS.values():
    if not result.has_table:
        continue

    rule:
        name:
            result.name
        input:
            **{name: result_input(pattern) for name, pattern in result.reads.items()},
        output:
            f"results/{{study}}/metrics/{result.name}.csv",
        log:
            f"results/{{study}}/logs/metrics/{result.name}.log",
        group:
            short
        conda:
            "../envs/ensdistill.yaml"
        resources:
            mem_mb=growing(2000, 0.2),
            runtime=growing(20, 0.1),
        params:
            systems=student_labels if "students" in result.reads else None,
            result=result.name,
            settings=settings_of(result.settings),
            code=judging_code("evaluate", reports=(f"{result.name}.table",), **result.chosen),
        script:
            "../workflow_scripts/evaluate.py"


# A local run gives it all cores, so that nothing runs beside what is timed; inside its job it asks for
# no more than a cluster has given it. It computes with the threads that the study says, and needs no
# trained network, so it comes before training.
rule costs:
    input:
        images="results/{study}/images.h5",
        judged=judged_firsts,
    output:
        "results/{study}/metrics/costs.csv",
    log:
        "results/{study}/logs/metrics/costs.log",
    priority: 1
    conda:
        "../envs/ensdistill.yaml"
    threads: workflow.resource_settings.cores or 1 if workflow.is_main_process else 1
    resources:
        gpu=1,
        mem_mb=growing(4000, 4),
        runtime=growing(60),
    params:
        systems=systems_of,
        threads=lambda wildcards: STUDIES[wildcards.study].costs.threads,
        code=costs_code,
    script:
        "../workflow_scripts/costs.py"


rule claims:
    input:
        teachers=of_pool("logits/{}.h5"),
        students=of_trained("logits/{}.h5"),
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
        short
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000, 0.2),
        runtime=growing(20, 0.1),
    params:
        systems=trained_labels,
        settings=settings_of(["n_bins", "members", "paper"]),
        study=lambda wildcards: STUDIES[wildcards.study].model_dump(include=IN_CAPTIONS),
        code=judging_code("claims", beside=False, METRICS=("nll", "ece", "bs", "acc", "dee")),
    script:
        "../workflow_scripts/claims.py"


rule findings:
    input:
        teachers=of_pool("logits/{}.h5"),
        students=of_students("logits/{}.h5"),
        shifted_ensemble=of_ensemble("logits/shifted/{}.h5"),
        shifted_students=of_students("logits/shifted/{}.h5"),
        costs="results/{study}/metrics/costs.csv",
    output:
        csv="results/{study}/findings.csv",
        md="results/{study}/findings.md",
        html=report(
            "results/{study}/findings.html",
            caption="../report/findings.rst",
            category="{study}",
            labels={"what": "Findings of the bench", "as": "page"},
        ),
    log:
        "results/{study}/logs/findings.log",
    group:
        short
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000, 0.2),
        runtime=growing(20, 0.1),
    params:
        systems=student_labels,
        settings=settings_of(["members", "families", "judged"]),
        study=lambda wildcards: STUDIES[wildcards.study].model_dump(
            include={"members", "student_seeds", "judge"}
        ),
        code=judging_code("findings"),
    script:
        "../workflow_scripts/findings.py"
