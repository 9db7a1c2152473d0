rule table:
    input:
        scores="results/{study}/metrics/scores.csv",
        costs="results/{study}/metrics/costs.csv",
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
        wide_md="results/{study}/tables/wide.md",
        wide_html=report(
            "results/{study}/tables/wide.html",
            caption="../report/wide.rst",
            category="{study}",
            labels={"what": "All metrics", "as": "table"},
        ),
    log:
        "results/{study}/logs/table.log",
    group:
        short
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(5),
    params:
        published=lambda wildcards: STUDIES[wildcards.study].model_dump()["published"],
        study=lambda wildcards: STUDIES[wildcards.study].model_dump(
            include={"confidence_bins", "judge"}
        ),
        code=code("table"),
    script:
        "../workflow_scripts/table.py"


# What captions of figures say of a study.
IN_CAPTIONS = {
    "members": True,
    "pool": True,
    "student_seeds": True,
    "confidence_bins": True,
    "distillation": True,
    "teacher": {"epochs"},
    "student": {"epochs"},
    "corruptions": {"source", "images"},
    "out_of_distribution": {"__all__": {"name", "source", "images"}},
    "teachers": True,
    "judge": True,
}


# One rule for each result of ensdistill/reports that has a figure: figure_<name>, by the function
# `draw` in its file, with the caption report/<name>.rst.
for result in RESULTS.values():
    if not result.has_figure:
        continue

    rule:
        name:
            f"figure_{result.name}"
        input:
            [result_input(path) for path in result.drawn_from],
        output:
            report(
                f"results/{{study}}/figures/{result.name}.png",
                caption=f"../report/{result.name}.rst",
                category="{study}",
                labels={"what": result.title, "as": "figure"},
            ),
            f"results/{{study}}/figures/{result.name}.pdf",
        log:
            f"results/{{study}}/logs/figures/{result.name}.log",
        group:
            short
        conda:
            "../envs/ensdistill.yaml"
        resources:
            mem_mb=growing(2000),
            runtime=growing(5),
        params:
            result=result.name,
            study=lambda wildcards: STUDIES[wildcards.study].model_dump(include=IN_CAPTIONS),
            code=code("figure", reports=(f"{result.name}.draw",), **result.chosen),
        script:
            "../workflow_scripts/figure.py"


# All on one page, for a newcomer to open first.
rule page:
    input:
        [f"results/{{study}}/{name}" for name in FINAL],
        lambda wildcards: cards(wildcards.study),
    output:
        report(
            "results/{study}/index.html",
            caption="../report/page.rst",
            category="{study}",
            labels={"what": "All on one page", "as": "page"},
        ),
    log:
        "results/{study}/logs/page.log",
    group:
        short
    conda:
        "../envs/ensdistill.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(5),
    params:
        **first_page(),
    script:
        "../workflow_scripts/page.py"


# The same of what there is by now: snakemake --cores 1 results/<study>/so_far.html
# Without inputs it makes none of them, and it can be made while another snakemake makes them.
use rule page as page_so_far with:
    input:
        [],
    output:
        "results/{study}/so_far.html",
    log:
        "results/{study}/logs/so_far.log",
    params:
        **first_page(),
        state=final_state,
