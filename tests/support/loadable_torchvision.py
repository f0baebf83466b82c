"""Imported before open_clip, in a process of its own, so that it can import torchvision.

The registry's torchvision is built for CUDA. With a torch that is not, its operators cannot be loaded, and it fails at
import because two that it describes there are missing. open_clip calls none of them.
"""

import torch

if not torch.backends.cuda.is_built():
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
