import numpy as np

from ensdistill import analysis
from ensdistill.devices import prepare
from ensdistill.digests import attributes
from ensdistill.hdf5 import write_hdf5
from ensdistill.images import evaluation_images
from ensdistill.jobs import job
from ensdistill.loading import load_images
from ensdistill.predictions import splits_of
from ensdistill.weights import load_student, read_header

with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    path = snakemake.input.images
    networks = [load_student(path, device).network for path in snakemake.input.weights]
    beside = {
        split: load_images(evaluation_images(path, split), device)[0]
        for split in snakemake.params.beside
        if split in splits_of(path)
    }
    train = evaluation_images(path, "train")
    # As in training, the batches that share a source of perturbation mix the classes.
    order = np.random.default_rng(0).permutation(len(train))[: snakemake.params.images]
    images, _ = load_images(train.choose(order), device)
    analyse, settings = getattr(analysis, snakemake.params.function), snakemake.params.settings
    arrays = analyse(networks, images, **beside, **settings)
    sets = [name.removesuffix("/logits") for name in arrays if name.endswith("/logits")]
    made = attributes(
        **{"study": snakemake.wildcards.study, **snakemake.params.distillation, **settings},
        teachers=[read_header(path)["digest"] for path in snakemake.input.weights],
        titles={name: snakemake.params.titles.get(name, name) for name in sets},
        device=device.type,
        precision="fp32",
    )
    write_hdf5(snakemake.output[0], {**arrays, "labels": train.labels[order]}, made)
