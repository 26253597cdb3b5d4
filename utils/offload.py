"""Frozen modules that wait on the CPU between their uses: the extra of `--offload`."""

import contextlib
import functools

import torch


FLAGS = {
    "offload": {"action": "store_true", "resumable": True,
        "help": "Keep text encoders, VAE and rewards on the CPU between their uses."},
}


def offload(modules, device):
    """Keep the modules on the CPU, on a machine with a GPU in pinned memory, from where copies are faster.

    Returns a function of one of them to a context in which it is on the device. Nothing is copied back: a
    frozen module is what it was.
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
