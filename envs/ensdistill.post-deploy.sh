# Snakemake runs this in the new environment, from the folder where it was started: the repository.
# It makes a new environment when this file changes, not when constraints.txt does; so keep here its
# SHA-256: b9fc0d91eaecfea70ad966ef38eecd195be6f295c248e4b39ae32a9be490087e
set -eu
[ -f constraints.txt ] || {
	echo "--sdm conda works in the repository of ensdistill; elsewhere install it by pip" >&2
	exit 1
}
python -m pip install --constraint constraints.txt --editable .
