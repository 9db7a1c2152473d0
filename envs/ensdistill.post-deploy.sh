# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: 0f29af407b3923d2bbb9fa6a48b526edce3a5e0dc3fda2d15b8bb3cd1c062e92
set -eu
python -m pip install --constraint constraints.txt --editable .
