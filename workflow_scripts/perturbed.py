import numpy as np
import torch

from ensdistill.analysis import SETS, perturbed_logits
from ensdistill.devices import prepare
from ensdistill.images import read_images
from ensdistill.jobs import job
from ensdistill.networks import load_network
from ensdistill.provenance import attributes, write_hdf5

with job(snakemake):
    device = prepare(snakemake.threads)
    teachers = [load_network(path, device) for path in snakemake.input.teachers]
    images, labels = read_images(snakemake.input.images, "train")
    # As in training, the batches that share a source of perturbation mix the classes.
    order = np.random.default_rng(0).permutation(len(labels))
    settings = snakemake.params.perturbation
    images = torch.from_numpy(images[order]).to(device)
    arrays = perturbed_logits(teachers, images, **settings)
    made = attributes(study=snakemake.wildcards.study, **settings, device=device.type, sets=SETS)
    write_hdf5(snakemake.output[0], {**arrays, "labels": labels[order]}, made)
