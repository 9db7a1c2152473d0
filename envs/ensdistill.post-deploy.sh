# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: cf598f16bf7ad8279a6cd917b15f2e4eaf402da427cd4cb95a02c76f2223670a
set -eu
python -m pip install --constraint constraints.txt --editable .
