"""What the graph of a network's operations tells, where torch.fx can trace it.

torch.fx traces networks whose flow does not depend on their input's numbers or sizes
[Reed et al. 2022].
"""

import sys

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ensdistill.attention import Attention
from ensdistill.batch_ensemble import BatchEnsembleLayer
from ensdistill.convert import BatchEnsembleMap, computes_as_known

WHOLE = (_ConvNd, nn.Linear, nn.BatchNorm2d, Attention, BatchEnsembleLayer, BatchEnsembleMap)
"""Modules that are one operation, whatever library has derived them."""
LINEAR = {"timm.layers.conv2d_same.Conv2dSame"}
"""Convolutions that do more than `Conv2d`, but nothing to their weight."""


class _Tracer(fx.Tracer):
    """What timm says to be one operation is one."""

    def __init__(self) -> None:
        timm = sys.modules.get("timm.layers")
        super().__init__(autowrap_functions=tuple(timm.get_notrace_functions()) if timm else ())
        self.whole = tuple(timm.get_notrace_modules()) if timm else ()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, WHOLE + self.whole) or super().is_leaf_module(module, name)


def _graph(network: nn.Module) -> fx.Graph | None:
    """None where it cannot be traced."""
    try:
        return _Tracer().trace(network)
    except Exception:  # whatever a network's own code says of a tensor without numbers
        return None


def norms_behind_convolutions(network: nn.Module) -> list[tuple[str, str]]:
    """Names of every convolution, or BatchEnsemble layer, and the batch normalisation behind it.

    Only such as nothing else uses, that are passed once; none where the network cannot be traced.
    """
    graph = _graph(network)
    if graph is None:
        return []
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    found = []
    for node in graph.nodes:
        if node.op != "call_module" or called.count(node.target) > 1:
            continue  # its statistics are of all its inputs
        norm = network.get_submodule(node.target)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        before = node.all_input_nodes[0]
        if (
            before.op == "call_module"
            and len(before.users) == called.count(before.target) == 1
            and _is_convolution(network.get_submodule(before.target))
        ):
            found.append((before.target, node.target))
    return found


def _is_convolution(module: nn.Module) -> bool:
    """Whether another weight is all that a normalisation behind it takes."""
    if isinstance(module, BatchEnsembleLayer):
        return module.weight.ndim == 4
    kind = getattr(module, "kind", type(module))
    return computes_as_known(module) is nn.Conv2d or f"{kind.__module__}.{kind.__name__}" in LINEAR


def cut_at(network: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """A network's body and head, head(body(x)) = network(x); the head begins with a named module.

    Args:
        network: its modules become modules of the two.
        name: of a module that is passed once, and in front of which all ways meet.

    Raises:
        ValueError: there is no such module, or the head needs more than what the body gives to it.
    """
    graph = _graph(network)
    if graph is None:
        raise ValueError(f"it cannot be cut at {name!r}: torch.fx cannot trace it")
    inside = [
        node
        for node in graph.nodes
        if name in _stack(node) or (node.op == "call_module" and node.target == name)
    ]
    if not inside:
        raise ValueError(f"it cannot be cut at {name!r}: it does not pass it")
    entry = next(
        it for node in inside for it in node.all_input_nodes if it.op != "get_attr"
    )  # what the first operation in it takes
    return _before(network, graph, entry), _after(network, graph, entry, name)


def _stack(node: fx.Node) -> set[str]:
    """Names of the modules in which an operation is."""
    return {path for path, _ in (node.meta.get("nn_module_stack") or {}).values()}


def _before(network: nn.Module, graph: fx.Graph, entry: fx.Node) -> nn.Module:
    body = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        known[node] = body.node_copy(node, lambda it: known[it])
        if node is entry:
            body.output(known[node])
            break
    return _module(network, body)


def _after(network: nn.Module, graph: fx.Graph, entry: fx.Node, name: str) -> nn.Module:
    head = fx.Graph()
    known = {entry: head.placeholder("features")}
    behind = list(graph.nodes)
    for node in behind[behind.index(entry) + 1 :]:
        for it in node.all_input_nodes:
            if it not in known and it.op == "get_attr":
                known[it] = head.node_copy(it)
            elif it not in known:
                raise ValueError(
                    f"it cannot be cut at {name!r}: what is behind uses {it.name!r} in front of it"
                )
        known[node] = head.node_copy(node, lambda it: known[it])
    return _module(network, head)


def _module(network: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A part of a network, without what it does not use."""
    part = fx.GraphModule(network, graph)
    part.graph.eliminate_dead_code()
    part.delete_all_unused_submodules()
    part.recompile()
    return part


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in a named place."""
    parent, _, key = name.rpartition(".")
    network.get_submodule(parent)._modules[key] = module
