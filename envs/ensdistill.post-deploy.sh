# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: fc2f1a1ea09e7ab7cf8aee933f8a56c0af9009baaecf361153a6648ff4263a0c
set -eu
[ -f constraints.txt ] || {
	echo "--sdm conda works in the repository of ensdistill; elsewhere install it by pip" >&2
	exit 1
}
python -m pip install --constraint constraints.txt --editable .
