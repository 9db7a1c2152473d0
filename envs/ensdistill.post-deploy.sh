# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: bd8ef9c7c6df641fdf24afc7775a8f3fcb07e5e3ca8e42ca44533d91fa3fe5a5
set -eu
python -m pip install --constraint constraints.txt --editable .
