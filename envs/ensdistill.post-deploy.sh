# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: 66723eb637497b90daaab6a682db639d4e9448e249172a090c4456552721c318
set -eu
[ -f constraints.txt ] || {
	echo "--sdm conda works in the repository of ensdistill; elsewhere install it by pip" >&2
	exit 1
}
python -m pip install --constraint constraints.txt --editable .
