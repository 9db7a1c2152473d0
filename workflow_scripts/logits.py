import torch

from ensdistill.devices import prepare
from ensdistill.digests import attributes
from ensdistill.files import write_hdf5
from ensdistill.images import read_images
from ensdistill.jobs import job
from ensdistill.predictions import splits_of
from ensdistill.students import count_parameters, predict
from ensdistill.weights import load_student, origin

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
        arrays, path = {}, snakemake.input[name]
        for split in splits_of(path):
            if split not in ("train", "held_out"):
                images, labels = read_images(path, split)
                arrays[f"{split}/logits"] = predict(student, torch.from_numpy(images).to(device))
                arrays[f"{split}/labels"] = labels
        write_hdf5(snakemake.output[name], arrays, made)
