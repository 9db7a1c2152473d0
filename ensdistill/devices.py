"""The processor a job computes on."""

import logging

import torch

logger = logging.getLogger(__name__)


def prepare(threads: int) -> torch.device:
    """The GPU if there is one, else the CPU with as many threads as Snakemake granted."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        logger.info("computing on %s", torch.cuda.get_device_name(device))
    else:
        device = torch.device("cpu")
        logger.info("computing on the CPU, threads: %d", threads)
    return device
