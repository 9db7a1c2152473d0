import torch

from ensdistill.devices import prepare
from ensdistill.files import write_hdf5
from ensdistill.images import read_images
from ensdistill.jobs import job
from ensdistill.logits import splits_of
from ensdistill.networks import count_parameters, load_network, predict, read_header

with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    network = load_network(snakemake.input.weights, device)
    arrays = {}
    for split in splits_of(snakemake.input.images):
        if split == "train":
            continue
        images, labels = read_images(snakemake.input.images, split)
        arrays[f"{split}/logits"] = predict(network, torch.from_numpy(images).to(device))
        arrays[f"{split}/labels"] = labels
    made = {**read_header(snakemake.input.weights), "parameters": count_parameters(network)}
    write_hdf5(snakemake.output[0], arrays, made)
