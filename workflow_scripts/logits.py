from ensdistill.devices import prepare
from ensdistill.digests import attributes
from ensdistill.hdf5 import in_blocks, write_hdf5
from ensdistill.images import evaluation_images
from ensdistill.jobs import job
from ensdistill.loading import load_images
from ensdistill.predictions import splits_of
from ensdistill.students import count_parameters, predictions
from ensdistill.weights import load_student, origin


def arrays(path):
    """Logits and labels of all splits but those that train, one by one."""
    for split in splits_of(path):
        if split not in ("train", "held_out"):
            stored = evaluation_images(path, split)
            images, _ = load_images(stored, device)
            answers = (part.cpu() for part in predictions(student, images))
            yield f"{split}/logits", in_blocks(answers, len(stored))
            yield f"{split}/labels", stored.labels


with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    student = load_student(snakemake.input.weights, device)
    made = attributes(
        **origin(snakemake.input.weights),
        parameters=count_parameters(student.network),
        device=device.type,
        precision="fp32",
    )
    for name in ("images", "shifted"):
        path = snakemake.input[name]
        write_hdf5(snakemake.output[name], arrays(path), made)
