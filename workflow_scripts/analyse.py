import numpy as np
import torch

from ensdistill import analysis
from ensdistill.devices import prepare
from ensdistill.digests import attributes
from ensdistill.files import write_hdf5
from ensdistill.images import read_images
from ensdistill.jobs import job
from ensdistill.predictions import splits_of
from ensdistill.weights import load_student, read_header

with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    path = snakemake.input.images
    networks = [load_student(path, device).network for path in snakemake.input.weights]
    images, labels = read_images(path, "train")
    beside = {
        split: torch.from_numpy(read_images(path, split)[0]).to(device)
        for split in snakemake.params.beside
        if split in splits_of(path)
    }
    # As in training, the batches that share a source of perturbation mix the classes.
    order = np.random.default_rng(0).permutation(len(labels))[: snakemake.params.images]
    analyse, settings = getattr(analysis, snakemake.params.function), snakemake.params.settings
    arrays = analyse(networks, torch.from_numpy(images[order]).to(device), **beside, **settings)
    sets = [name.removesuffix("/logits") for name in arrays if name.endswith("/logits")]
    made = attributes(
        **{"study": snakemake.wildcards.study, **snakemake.params.distillation, **settings},
        teachers=[read_header(path)["digest"] for path in snakemake.input.weights],
        titles={name: snakemake.params.titles.get(name, name) for name in sets},
        device=device.type,
        precision="fp32",
    )
    write_hdf5(snakemake.output[0], {**arrays, "labels": labels[order]}, made)
