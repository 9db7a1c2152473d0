"""One thread per test process: as a workflow's jobs run, and kind to a shared machine."""

import torch

torch.set_num_threads(1)
