"""A model as an attack may run it on fixed weights: each batch norm folded into the convolution before it.

    bn(conv(x)) = (W*x + b - μ)·γ/√(σ² + ε) + β = W'*x + b',  W' = W·s, b' = β + (b - μ)·s, s = γ/√(σ² + ε)

which saves two passes over every map, forward and backward; the rest is the same up to rounding. `fold` builds it anew
for every attack, as weights change between training steps. What it builds are shallow copies: the model, its submodules
and their state are not touched, and nothing is copied but the folded weights.

Which batch norm follows which convolution only the code of `forward` says, so that it is traced (torch.fx) once for
each model and kept until something about the model changes. Code that cannot be traced (a check of the images' shape,
say) runs as it is, on submodules that are traced each by itself. A trace is refused, and its submodules are tried
instead, where it might not do what the code does: if the code draws random numbers in Python, makes constant tensors,
switches gradients or autocast, or changes attributes of its modules. What no check sees is a forward that depends on
variables outside the model. Nothing is folded

    where a module has hooks, as they would not see the maps they wait for; also where PyTorch has global hooks
    in models that are compiled, scripted or DataParallel, and in modules with a `forward` of their own in the instance
    unless convolution and batch norm are used once each, are exactly `nn.Conv2d` and `nn.BatchNorm2d` (or
      SyncBatchNorm), the latter in evaluation mode with running statistics, and nothing else reads the map between

If the whole network, from images or normalised images to logits, is one trace, it also runs channels-last where that is
faster: in float32 on a CPU and wherever bfloat16 autocast is on. Code that looks at strides (`view`) prevents it.

Tracing replaces `nn.Module.__call__` for some milliseconds: no other thread may run a model meanwhile.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

_log = logging.getLogger("shiftlens")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_STRIDED = {"view", "view_as", "as_strided", "stride", "is_contiguous"}


@dataclass
class _Plan:
    """What is to be done with one module.

    graph: its traced code, or None: then it runs as it is, on `children`.
    pairs: name in the graph, convolution and batch norm of each that is to be folded.
    strided: whether its code looks at strides.
    """

    graph: fx.GraphModule | None = None
    pairs: list[tuple[str, nn.Conv2d, nn.Module]] = field(default_factory=list)
    strided: bool = False
    children: dict[str, _Plan] = field(default_factory=dict)

    def graphs(self) -> Iterator[_Plan]:
        """All plans with a graph, from here on."""
        if self.graph is not None:
            yield self
        for child in self.children.values():
            yield from child.graphs()


# By model; the values hold its submodules, but not the model itself.
_plans: weakref.WeakKeyDictionary[nn.Module, tuple[Any, _Plan | None]] = weakref.WeakKeyDictionary()


def fold(model: nn.Module) -> nn.Module:
    """A module that computes what `model` does now, folded where that is possible; else the model itself.

    It holds copies of the folded weights and shares all others: it is to be used until weights change, and thrown away.
    Its parameters never matter for training. To be called in the gradient and autocast state in which it will run.
    """
    if any(_unfit(module) for module in model.modules()) or _has_any_global_hook():
        return model
    state = _state(model)
    known = _plans.get(model)
    if known is None or known[0] != state:
        plan = _plan(model)
        graphs = [] if plan is None else list(plan.graphs())
        _log.debug(
            "%s under attack: %d batch norms folded, in %d traced parts",
            type(model).__name__,
            sum(len(part.pairs) for part in graphs),
            len(graphs),
        )
        known = _plans[model] = (state, plan)
    plan = known[1]
    if plan is None:
        return model
    graphs = list(plan.graphs())
    return _build(model, plan, whole=len(graphs) == 1 and not graphs[0].strided)


# ------------------------------------------------------------------------------------------------- what can be folded


def _unfit(module: nn.Module) -> bool:
    """Whether there is a reason against folding anything in a model with this module."""
    return (
        any(getattr(module, hooks, None) for hooks in _HOOKS)
        or getattr(module, "_compiled_call_impl", None) is not None
        or isinstance(module, (torch.jit.ScriptModule, nn.DataParallel))
        or "_orig_mod" in module._modules
    )


def _modes() -> tuple[Any, ...]:
    """What code may switch while it runs and a trace would not repeat."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that its code could depend on, but the values of tensors; equal if nothing changed."""
    found: list[Any] = [_modes()]
    for name, module in model.named_modules():
        found += (name, type(module), id(module))
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                found += ((held, id(tensor)) for held, tensor in value.items())
            elif isinstance(value, _PLAIN):
                found.append((key, value))
            else:
                found.append((key, id(value), len(value) if isinstance(value, (list, dict, set)) else 0))
    return tuple(found)


def _foldable(conv: Any, norm: Any) -> bool:
    """Whether these two modules have the form of a pair."""
    return (
        type(conv) is nn.Conv2d
        and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and "forward" not in vars(conv)
        and "forward" not in vars(norm)
    )


class _Proxy(fx.Proxy):
    """A tensor to `isinstance` and `torch.is_tensor`, so that code which asks goes the way that tensors go."""

    _is_param = False  # what isinstance(…, nn.Parameter) asks of tensors

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return Tensor


class _Tracer(fx.Tracer):
    """Traces code that leaves gradient mode and autocast as they are; refuses all other."""

    proxy_buffer_attributes = True  # buffers are read when the trace runs

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, value: Any) -> Any:
        return value.node if type(value) is _Proxy else super().create_arg(value)

    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def create_node(self, *arguments: Any, **keywords: Any) -> fx.Node:
        if _modes() != self._modes:
            raise ValueError("forward switches gradients or autocast")
        return super().create_node(*arguments, **keywords)


def _random_states() -> tuple[Any, ...]:
    legacy: Any = np.random.get_state()
    return random.getstate(), legacy[1].tobytes(), legacy[2], torch.get_rng_state().numpy().tobytes()


def _trace(module: nn.Module) -> fx.GraphModule:
    """Its forward as a graph. Raises ValueError, or whatever the traced code does, where that is not possible."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    drawn = _random_states()
    try:
        graph = _Tracer().trace(module)
    finally:
        changed = False
        for part, attributes in before:
            now = vars(part)
            if now.keys() != attributes.keys() or any(now[key] is not attributes[key] for key in now):
                changed = True
                now.clear()
                now.update(attributes)
    if changed:
        raise ValueError("forward changes attributes")
    if drawn != _random_states():
        raise ValueError("forward draws random numbers")
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise ValueError("forward makes constant tensors")
    return fx.GraphModule(module, graph)


def _plan(module: nn.Module) -> _Plan | None:
    """None if there is nothing to fold in a module."""
    kinds = {type(part) for part in module.modules()}
    if nn.Conv2d not in kinds or not kinds & {nn.BatchNorm2d, nn.SyncBatchNorm} or not next(module.children(), None):
        return None
    own_forward = vars(module).get("forward")
    if own_forward is not None and not _accelerated(module):
        return None
    try:
        graph = _trace(module)
    except Exception as error:  # traced code meets proxies where it expects tensors, and may raise anything
        _log.debug("%s is not traced: %s", type(module).__name__, error)
    else:
        return _pairs(graph)
    children = {name: plan for name, child in module.named_children() if (plan := _plan(child)) is not None}
    return _Plan(children=children) if children else None


def _accelerated(module: nn.Module) -> bool:
    """Whether `forward` in the instance is accelerate's, around that of the class (see `attacks.pgd.under_attack`)."""
    return getattr(vars(module).get("_original_forward"), "__func__", None) is type(module).forward


def _pairs(traced: fx.GraphModule) -> _Plan | None:
    """The plan of a traced module: its graph without the batch norms that are to be folded; None if there are none."""
    graph = traced.graph
    modules = dict(traced.named_modules())
    calls: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            key = id(modules[node.target])
            calls[key] = calls.get(key, 0) + 1
    plan = _Plan(graph=traced)
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv, norm = modules.get(str(source.target)), modules[node.target]  # none for one that is folded already
        if not _foldable(conv, norm) or len(source.users) != 1 or calls[id(conv)] != 1 or calls[id(norm)] != 1:
            continue
        name = f"folded_{len(plan.pairs)}"
        plan.pairs.append((name, conv, norm))  # type: ignore[arg-type]
        traced.add_submodule(name, plan.pairs[-1][1])
        source.target = name
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    if not plan.pairs:
        return None
    plan.strided = any(node.op == "call_method" and node.target in _STRIDED for node in graph.nodes)
    traced.recompile()
    return plan


# --------------------------------------------------------------------------------------------------------- the copies


def _twin(module: nn.Module, **attributes: Any) -> nn.Module:
    """A shallow copy: the same attributes, parameters, buffers and submodules but for `attributes`."""
    twin: nn.Module = object.__new__(type(module))  # not its own __new__: a GraphModule's makes another class
    twin.__dict__.update(vars(module), **attributes)
    return twin


def _build(module: nn.Module, plan: _Plan, *, whole: bool) -> nn.Module:
    """The folded twin of a module; whole: all of the network is one graph."""
    if plan.graph is None:
        children = {
            name: _build(module.get_submodule(name), child, whole=whole) for name, child in plan.children.items()
        }
        twin = _twin(module, _modules={**module._modules, **children})
        if "forward" in vars(twin):
            del twin.__dict__["forward"]
        return twin
    convolutions = {name: _folded(conv, norm, whole) for name, conv, norm in plan.pairs}
    graph = _twin(plan.graph, _modules={**plan.graph._modules, **convolutions})
    return _twin(module, forward=_ChannelsLast(graph) if whole else graph)


class _ChannelsLast:
    """A network that gets images channels-last where that is faster."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __call__(self, images: Any, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(images, Tensor) and images.ndim == 4:
            kind = images.device.type
            if torch.is_autocast_enabled(kind) or (kind == "cpu" and images.dtype == torch.float32):
                images = images.contiguous(memory_format=torch.channels_last)
        return self._network(images, *arguments, **keywords)


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: Any, channels_last: bool) -> nn.Module:
    """The convolution with the batch norm's scale and shift in its weights; computed in float32 at least."""
    kind = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(kind) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(kind)
    shift = norm.running_mean.to(kind) if conv.bias is None else norm.running_mean.to(kind) - conv.bias.to(kind)
    bias = -shift * scale if norm.bias is None else norm.bias.to(kind) - shift * scale
    weight = (conv.weight.to(kind) * scale[:, None, None, None]).to(conv.weight.dtype)
    if channels_last and (weight.device.type == "cpu" or torch.is_autocast_enabled(weight.device.type)):
        weight = weight.contiguous(memory_format=torch.channels_last)
    # Leaves that ask for a gradient, which nobody computes: autocast casts only such weights once for all steps.
    parameters = {"weight": weight.requires_grad_(), "bias": bias.to(weight.dtype).requires_grad_()}
    return _twin(conv, _parameters=parameters)
