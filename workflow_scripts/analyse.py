import numpy as np
import torch

from ensdistill import analysis
from ensdistill.devices import prepare
from ensdistill.digests import attributes
from ensdistill.files import write_hdf5
from ensdistill.images import read_images
from ensdistill.jobs import job
from ensdistill.weights import load_student, read_header

with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    networks = [load_student(path, device).network for path in snakemake.input.weights]
    images, labels = read_images(snakemake.input.images, "train")
    # As in training, the batches that share a source of perturbation mix the classes.
    order = np.random.default_rng(0).permutation(len(labels))[: snakemake.params.images]
    analyse, settings = getattr(analysis, snakemake.params.function), snakemake.params.settings
    arrays = analyse(networks, torch.from_numpy(images[order]).to(device), **settings)
    made = attributes(
        **{"study": snakemake.wildcards.study, **snakemake.params.distillation, **settings},
        teachers=[read_header(path)["digest"] for path in snakemake.input.weights],
        sets=[name.removesuffix("/logits") for name in arrays if name.endswith("/logits")],
        device=device.type,
        precision="fp32",
    )
    write_hdf5(snakemake.output[0], {**arrays, "labels": labels[order]}, made)
