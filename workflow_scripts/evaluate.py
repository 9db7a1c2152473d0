from pkgutil import resolve_name

from ensdistill import reports
from ensdistill.files import write_csv
from ensdistill.jobs import job
from ensdistill.systems import by_label

package = reports  # by itself: code digests then follow just the function that is chosen

with job(snakemake):
    files = dict(snakemake.input.items())
    for name in files.keys() & {"students", "shifted_students"}:
        files[name] = by_label(snakemake.params.systems, files[name])
    table = resolve_name(f"{package.__name__}.{snakemake.params.result}.table")
    write_csv(snakemake.output[0], table(**files, **snakemake.params.settings))
