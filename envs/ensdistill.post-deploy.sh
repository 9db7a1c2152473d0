# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: b74a294c73281364cf13a96302a47e97f98e36f6ddc0a907c5f127ea97525028
set -eu
python -m pip install --constraint constraints.txt --editable .
