# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: 44d64976c9839a3d4ab2ec8950c749e4227186ccfa32d283d5a3eaa865e1e39c
set -eu
python -m pip install --constraint constraints.txt --editable .
