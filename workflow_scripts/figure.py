from pkgutil import resolve_name

from ensdistill import reports
from ensdistill.drawing import save
from ensdistill.files import read_csv
from ensdistill.jobs import job

package = reports  # by itself: code digests then follow just the function that is chosen

with job(snakemake):
    draw = resolve_name(f"{package.__name__}.{snakemake.params.result}.draw")
    inputs = [read_csv(path) if path.endswith(".csv") else path for path in snakemake.input]
    save(draw(*inputs), snakemake.output)
