"""What a study will take: its jobs, as Snakemake plans them, and what each of them costs.

`jobs` asks Snakemake for the jobs, `measuring` finds out what networks cost, `forecast` puts both
together, and `schedule` lets the jobs run on paper. No rule uses this package.
"""
