"""Students that do not fit beside their optimiser on every GPU: parameters, gradients and moments spread by FSDP2.

Apart from train/loop.py because data-parallel runs, nearly all there are, never need it. It is torch's own
`fully_shard`, asked for by accelerate's flags (`--use_fsdp --fsdp_version 2`, train/launch/fsdp2_2x8_bf16.yaml):
accelerate's preparation of it takes GPUs only and loses state of the optimiser on the way to a checkpoint
(accelerate#3971); this one runs, and is tested, on CPUs too, and its checkpoints are those of any other run. A run may
change between the two ways, and between numbers of processes, from one start to the next.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models import ModelError
from train.launching import Sharding


def units(module: nn.Module) -> list[nn.Module]:
    """The parts whose parameters are gathered together: the outermost members of lists and sequences that have any.

    These are a transformer's blocks and a ResNet's; they are always called as modules, which is when they are gathered.
    What lies outside of them is gathered once, for the whole step.
    """
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            found += [member for member in child if any(True for _ in member.parameters())]
        else:
            found += units(child)
    return found


def require_shardable(module: nn.Module) -> None:
    """Raises ModelError for a module with scalar parameters, of which there are no parts."""
    if scalars := [name for name, parameter in module.named_parameters() if parameter.ndim == 0]:
        raise ModelError(f"--use_fsdp: {scalars[0]} is a scalar, which cannot be sharded")


def shard(module: nn.Module, optimizer: torch.optim.Optimizer, sharding: Sharding, *, compiled: bool) -> None:
    """Spreads a module, whole and equal on all ranks, and its optimiser over all ranks, in place.

    Args:
        module: on its device.
        optimizer: over parameters of `module`; its state, if it has any yet, is spread too.
        compiled: compile each unit by itself; hooks between them cannot be compiled.

    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    before = {names[p]: state for p, state in optimizer.state.items()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]

    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # shards are cut from flat memory
    mesh = init_device_mesh(next(module.parameters()).device.type, (torch.distributed.get_world_size(),))
    for unit in units(module):
        if compiled:
            unit.compile()
        fully_shard(unit, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)

    spread = dict(module.named_parameters())
    optimizer.state.clear()
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [spread[name] for name in members]
    for name, state in before.items():
        parameter = spread[name]
        assert isinstance(parameter, DTensor)
        optimizer.state[parameter] = {
            # Each rank cuts its part out of its own copy: nothing is sent.
            key: distribute_tensor(value.contiguous(), mesh, parameter.placements, src_data_rank=None)
            if value.ndim
            else value
            for key, value in state.items()
        }


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on its device. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, keep: bool) -> Tensor:
    """All of a tensor that may be sharded; on the CPU if so, and empty where not `keep`. All ranks must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    everything = gathered(tensor.detach())
    return everything.cpu() if keep else everything.new_empty(0)


def shell(module: nn.Module) -> nn.Module:
    """A copy on the CPU, made before sharding, into which the whole state can be loaded in the end."""
    devices = {parameter.device for parameter in module.parameters()}
    module.cpu()
    copied = copy.deepcopy(module)
    module.to(devices.pop())
    return copied


def synchronise_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether backward passes from now on reduce gradients over the ranks, or only add them up on each."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(wanted)
