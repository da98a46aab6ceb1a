"""What the autograd graph says before anything runs: who reaches what, and what must be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

__all__ = ["GraphSurvey", "survey"]

# Whatever modes the import runs in: under inference_mode no tensor has a graph.
with torch.inference_mode(mode=False), torch.enable_grad():
    _ACCUMULATE = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
# Nodes that hand a sparse gradient straight to a leaf, and the attribute that says whether.
_SPARSE_FLAGS = {
    "EmbeddingBackward0": "_saved_sparse",
    "EmbeddingBagBackward0": "_saved_sparse",
    "GatherBackward0": "_saved_sparse_grad",
}
# torch frees a chain of nodes that Python has looked at recursively: at 50,000 in a row the process
# runs out of stack (measured with torch 2.15; 20,000 survived). So deeper graphs are not looked at.
_MAX_DEPTH = 10_000
# In the names of nodes that talk to other processes.
_COMMUNICATING = ("SyncBatchNorm", "AllReduce", "AllGather", "ReduceScatter", "AlltoAll")
# Nodes written in Python whose inputs are all they reach: what torch.compile makes, and what
# DistributedDataParallel puts on the outputs.
_TRANSPARENT = {"CompiledFunctionBackward", "_DDPSinkBackward"}


@dataclass
class GraphSurvey:
    """Result of `survey`; sets of tasks are bit masks (bit t: task t)."""

    retain: list[bool]
    """Whether task t's backward must keep its graph, because a later task shares a part of it."""
    leaves: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """id(leaf) -> the leaf and the tasks that reach it."""
    opaque: int = 0
    """Tasks with a node that may run another backward inside (reentrant checkpointing,
    reversible layers): they can reach leaves that the graph does not show."""
    reentrant: int = 0
    """Tasks of these whose node surely does: it accepts no choice of leaves."""
    communicates: bool = False
    """Whether a node talks to other processes in its backward pass (synchronised batch norm)."""
    complete: bool = True
    """False for a graph too deep to look at, of which only `opaque` says anything."""
    sparse: list[Tensor] = field(default_factory=list)
    """Leaves that will get a sparse gradient."""
    doubtful: set[int] = field(default_factory=set)
    """ids of leaves that may get one: something further up makes one."""
    stopped: dict[int, int] = field(default_factory=dict)
    """Index of a tensor at which the walk stopped -> the tasks that came by."""

    def tasks_of(self, leaf: Tensor) -> int:
        """The tasks whose graph shows that they reach the leaf."""
        return self.leaves.get(id(leaf), (leaf, 0))[1]


def survey(losses: Sequence[Tensor | None], stops: Sequence[Tensor] = ()) -> GraphSurvey:
    """Walk the graphs of all losses once: O(nodes), whatever the number of tasks.

    Args:
        losses: roots; None: nothing of that task is here.
        stops: tensors of the graph beyond which nobody looks.
    """
    edges = [get_gradient_edge(tensor) for tensor in stops]
    ends = {(edge.node, edge.output_nr): index for index, edge in enumerate(edges)}
    masks: dict[Node, int] = {}
    for task, loss in enumerate(losses):
        if loss is None:
            continue
        root = get_gradient_edge(loss).node
        masks[root] = masks.get(root, 0) | 1 << task
    order = _topological_order(list(masks), ends)
    if order is None:
        # As careful as can be: keep every graph for the next task, and expect anything.
        everything = (1 << len(losses)) - 1
        retain = [True] * (len(losses) - 1) + [False]
        return GraphSurvey(retain=retain, opaque=everything, reentrant=everything, complete=False)
    result = GraphSurvey(retain=[])
    kept = 0
    below_sparse: set[Node] = set()
    for node in order:
        mask = masks[node]
        if isinstance(node, _ACCUMULATE):
            leaf: Tensor = node.variable  # type: ignore[attr-defined]
            result.leaves[id(leaf)] = (leaf, mask)
            if node in below_sparse:
                result.doubtful.add(id(leaf))
            continue
        # Every task but the last one that comes by has to leave the node's buffers in place.
        kept |= mask ^ (1 << (mask.bit_length() - 1))
        if _is_opaque(node):
            result.opaque |= mask
            result.reentrant |= mask if _is_reentrant(node) else 0
            result.communicates |= any(word in node.name() for word in _COMMUNICATING)
        for following, output in node.next_functions:
            if following is None:
                continue
            end = ends.get((following, output)) if ends else None
            if end is None:
                masks[following] = masks.get(following, 0) | mask
            else:
                result.stopped[end] = result.stopped.get(end, 0) | mask
        makes_sparse = _makes_sparse(node)
        if makes_sparse:
            direct = [n for n, _ in node.next_functions if isinstance(n, _ACCUMULATE)]
            result.sparse.extend(n.variable for n in direct)  # type: ignore[attr-defined]
        if makes_sparse or node in below_sparse:
            below_sparse.update(n for n, _ in node.next_functions if n is not None)
    result.retain = [bool(kept >> task & 1) for task in range(len(losses))]
    return result


def _topological_order(
    roots: list[Node], ends: Mapping[tuple[Node, int], int]
) -> list[Node] | None:
    """Every node before all those that it leads to (depth first, without recursion).

    What lies beyond `ends` stays out. None where the graph is deeper than `_MAX_DEPTH`.
    """
    finished: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    entered: set[Node] = set()
    depth = 0
    while stack:
        node, done = stack.pop()
        if done:
            finished.append(node)
            depth -= 1
            continue
        if node in entered:
            continue
        entered.add(node)
        depth += 1
        if depth > _MAX_DEPTH:
            return None
        stack.append((node, True))
        for following, output in node.next_functions:
            if following is None or following in entered:
                continue
            if not ends or (following, output) not in ends:
                stack.append((following, False))
    finished.reverse()
    return finished


def _is_opaque(node: Node) -> bool:
    written_in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    return written_in_python and node.name() not in _TRANSPARENT


def _is_reentrant(node: Node) -> bool:
    """By its name: torch's CheckpointFunction, and the reversible blocks of several libraries."""
    name = node.name().lower()
    return "checkpoint" in name or "reversible" in name


def _makes_sparse(node: Node) -> bool:
    flag = _SPARSE_FLAGS.get(type(node).__name__)
    return flag is not None and bool(getattr(node, flag, False))
