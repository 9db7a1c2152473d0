import numpy as np
import torch

from ensdistill import analysis
from ensdistill.devices import prepare
from ensdistill.digests import attributes
from ensdistill.files import write_hdf5
from ensdistill.images import read_images
from ensdistill.jobs import job
from ensdistill.networks import load_network

with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    networks = [load_network(path, device) for path in snakemake.input.weights]
    images, labels = read_images(snakemake.input.images, "train")
    # As in training, the batches that share a source of perturbation mix the classes.
    order = np.random.default_rng(0).permutation(len(labels))[: snakemake.params.images]
    analyse, settings = getattr(analysis, snakemake.params.function), snakemake.params.settings
    arrays = analyse(networks, torch.from_numpy(images[order]).to(device), **settings)
    sets = [name.removesuffix("/logits") for name in arrays if name.endswith("/logits")]
    made = attributes(study=snakemake.wildcards.study, **settings, device=device.type, sets=sets)
    write_hdf5(snakemake.output[0], {**arrays, "labels": labels[order]}, made)
