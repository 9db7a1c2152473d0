# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: c77709db4ba122a6c6013db60bd82c37bd33548801f093c96c78eb3da18d512d
set -eu
python -m pip install --constraint constraints.txt --editable .
