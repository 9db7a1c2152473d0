# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: 7a7393bd882eddbef470a7ed9dc04aa7220338c709d1380e5a2d85451d600929
set -eu
python -m pip install --constraint constraints.txt --editable .
