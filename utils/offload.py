"""Frozen modules that stay on the CPU when not in use: the extra of `--offload`."""

import contextlib
import functools

import torch


FLAGS = {
    "offload": {"action": "store_true", "resumable": True,
        "help": "Keep text encoders, VAE and rewards on the CPU when not in use."},
}


def offload(modules, device):
    """Keep the modules on the CPU, for a GPU in pinned memory, from which copies are faster.

    Returns a function from a module to a context in which it is on the device. Nothing is copied back, since
    frozen modules do not change.
    """
    for module in modules if device.type == "cuda" else ():
        module._apply(torch.Tensor.pin_memory)
    return functools.partial(on_device, device=device)


@contextlib.contextmanager
def on_device(module, device):
    held = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    for tensor, data in held:
        tensor.data = data.to(device, non_blocking=True)
    yield
    for tensor, data in held:
        tensor.data = data
