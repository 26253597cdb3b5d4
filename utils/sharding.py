"""FSDP2 with PyTorch's `fully_shard`: the extra of `--sharding`.

Weights, gradients, optimizer states and EMA of several networks are divided over the processes.
`accelerator.prepare` shards one model only; here there are three.
"""

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


FLAGS = {
    "sharding": {"choices": ["fsdp"],
        "excludes": ["shared_base", "generator_lora_rank", "assistant_lora_rank", "use_8bit_adam",
                     "offload_ema"],
        "help": "Shard the networks and their optimizer states over the processes (FSDP2)."},
}


class FullySharded:
    """How networks are divided over the processes; it has the methods of the script's `Replicated`."""

    def __init__(self, blocks, device, dtype):
        """`blocks` are the names of the classes that are gathered one by one, in `dtype` if that is bf16."""
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        self.blocks, self.device, self.dtype = blocks, device, dtype if dtype == torch.bfloat16 else None

    def place(self, network):
        """Shard a network in place, onto the device.

        The blocks are gathered one by one, for their forward and once more for their backward; gradients are
        averaged in the weights' own precision. The rest, too, is freed after each forward: kept, it would
        miss a change of the weights, such as EMA's for a validation.
        """
        mesh = torch.distributed.init_device_mesh(self.device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=self.dtype and torch.float32,
                                      cast_forward_inputs=False)  # autocast does it, as without sharding
        inner = [module for module in network.modules() if type(module).__name__ in self.blocks]
        for module in (*inner, network):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        return network

    def wrap(self, network):
        """The network that updates call."""
        return network

    def average_gradients(self, network, on):
        """Set whether the next backward averages gradients over the processes."""
        network.set_requires_gradient_sync(on)

    def gather(self, network):
        """An unsharded network on the main process's CPU, None elsewhere; every process calls it."""
        state_dict, main = {}, torch.distributed.get_rank() == 0
        for key, value in network.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if main:
                state_dict[key] = value.cpu()
        if not main:
            return None
        kind = next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
        whole = kind.from_config(network.config)
        whole.load_state_dict(state_dict)
        return whole

    def save(self, folder, run, parts):
        """Write all tensors of the run's state, each process its part, and drop them from `parts`."""
        begin(run.parameters, run.optimizers)  # a run may be interrupted before the generator's first update
        state = tensors(run.parameters, run.optimizers, run.ema)
        files = {name: 1 + index % 32 for index, name in enumerate(state)}  # only one is in memory at a time
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder, files, save_distributed=True))
        for part in parts["optimizers"].values():
            part["state"] = {}
        parts["ema"].pop("shadow_params", None)

    def load(self, folder, run):
        """Read the state, saved by any number of processes."""
        begin(run.parameters, run.optimizers)  # allocates what is read into
        state = tensors(run.parameters, run.optimizers, run.ema)
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)))


def tensors(parameters, optimizers, ema):
    """All tensors of a run's state by name.

    Args:
        parameters: {network: {name: parameter}}. optimizers: {network: optimizer}. ema: an EMAModel or None.
    """
    held = {}
    for name, named in parameters.items():
        for key, parameter in named.items():
            state = optimizers[name].state[parameter]
            held |= {f"{name}/{key}": parameter.detach()}
            held |= {f"{name}/{key}/{part}": value for part, value in state.items()}
    if ema is not None:
        held |= {f"ema/{key}": value for key, value in zip(parameters["generator"], ema.shadow_params)}
    return held


def begin(parameters, optimizers):
    """Allocate the initial state of optimizers that have not stepped yet."""
    for name, named in parameters.items():
        momentum = optimizers[name].param_groups[0]["betas"][0] > 0
        for parameter in named.values():
            state = optimizers[name].state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for moment in ("exp_avg", "exp_avg_sq")[not momentum:]:
                    state[moment] = torch.zeros_like(parameter)
