import numpy as np
import torch

from ensdistill.analysis import jacobian_distances
from ensdistill.devices import prepare
from ensdistill.digests import attributes
from ensdistill.hdf5 import write_hdf5
from ensdistill.images import evaluation_images
from ensdistill.jobs import job
from ensdistill.weights import load_student

with job(snakemake):
    device = prepare(snakemake.threads, snakemake.resources)
    teachers = [load_student(path, device) for path in snakemake.input.teachers]
    # results/<study>/students/<method>/<seed>/weights.safetensors, or judged/<name>/<seed>
    students = {
        "/".join(["students", *path.split("/")[-3:-1]]): load_student(path, device)
        for path in snakemake.input.students
    }
    test = evaluation_images(snakemake.input.images, "test")
    chosen = np.random.default_rng(0).permutation(len(test))[: snakemake.params.images]
    images = torch.from_numpy(test.read(chosen)).to(device)
    arrays = jacobian_distances(teachers, students, images)
    write_hdf5(
        snakemake.output[0],
        {**arrays, "test_index": chosen},
        attributes(study=snakemake.wildcards.study, device=device.type, precision="fp32"),
    )
