"""Bytes alive while a forward and a backward pass run, without tensors: buffers that are counted, and their graph.

Python frees a buffer where it would free a tensor, so code that follows the lines of a model's forward pass counts what
that pass would have alive at every moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


class Ledger:
    """Bytes that are alive, and the most there were since `mark`."""

    def __init__(self):
        self.alive = self.peak = 0

    def mark(self) -> None:
        self.peak = self.alive


class Buffer:
    """Bytes of one allocation, counted while the object lives."""

    __slots__ = ("ledger", "nbytes")

    def __init__(self, ledger: Ledger, nbytes: float):
        self.ledger, self.nbytes = ledger, int(nbytes)
        ledger.alive += self.nbytes
        ledger.peak = max(ledger.peak, ledger.alive)

    def __del__(self):
        self.ledger.alive -= self.nbytes


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of rows x pixels x channels (images, tokens); node: what its gradient goes to, None: it needs none."""

    rows: int
    pixels: int
    channels: int
    buffer: Buffer
    node: Node | None = None


@dataclass(eq=False, slots=True)
class Node:
    """A step of the backward pass. run(gradient) -> one gradient or None for each of `inputs`."""

    nbytes: int
    inputs: list[Node | None]
    run: Callable[[Buffer], list[Buffer | None]] | None
    saved: list[Buffer] = field(default_factory=list)
    gradient: Buffer | None = None

    def receive(self, gradient: Buffer | None, ledger: Ledger) -> None:
        """Adds up; where the sum finds no buffer of its size, it makes one."""
        if self.gradient is None or gradient is None:
            self.gradient = self.gradient or gradient
        elif self.gradient.nbytes != self.nbytes:
            self.gradient = Buffer(ledger, self.nbytes)


class Tape:
    """Runs operators: counts what they make, remembers what they keep for the backward pass, and runs that."""

    def __init__(self, ledger: Ledger, itemsize: int, grad: bool, plain: frozenset[str] = frozenset()):
        self.ledger, self.itemsize, self.grad, self.plain = ledger, itemsize, grad, plain
        self.nodes: list[Node] = []
        self.leaf_gradients: list[Buffer] = []

    def make(self, rows: int, pixels: int, channels: int) -> Value:
        return Value(rows, pixels, channels, Buffer(self.ledger, rows * pixels * channels * self.itemsize))

    def leaf(self, rows: int, pixels: int, channels: int) -> Value:
        """A value that wants a gradient."""
        value = self.make(rows, pixels, channels)
        if self.grad:
            value.node = Node(value.buffer.nbytes, [], None)
        return value

    def apply(
        self, inputs: list[Value], out: tuple[int, int, int], *, keep_inputs=(), keep_out=False, keep: float = 0,
        trained: float = 0, scratch: float = 0, back: float = 0, residual: Value | None = None,
    ) -> Value:
        """An operator on `inputs` -> a value of the sizes `out`.

        Kept for the backward pass: the buffers of keep_inputs, the result if keep_out, and `keep` bytes more. trained:
        bytes of parameters that get a gradient. scratch, back: bytes that it has beside inputs and results, in the
        forward and in the backward pass. residual: added inside; its gradient is the result's.
        """
        made = self.make(*out)
        if scratch:
            Buffer(self.ledger, scratch)
        wanted = [value.node for value in inputs]
        residual_node = residual and residual.node
        if not self.grad or not (trained or residual_node or any(wanted)):
            return made
        sizes = [value.buffer.nbytes for value in inputs]

        def run(gradient: Buffer) -> list[Buffer | None]:
            held = Buffer(self.ledger, back)  # noqa: F841 - lives as long as this call
            if trained:
                self.leaf_gradients.append(Buffer(self.ledger, trained))
            made = [Buffer(self.ledger, size) if node else None for node, size in zip(wanted, sizes)]
            return made if residual_node is None else [*made, gradient]

        saved = [value.buffer for value in keep_inputs] + ([made.buffer] if keep_out else [])
        saved += [Buffer(self.ledger, keep)] if keep else []
        del inputs, keep_inputs, residual
        return self._record(made, [*wanted, residual_node] if residual_node else wanted, run, saved)

    def _record(self, made: Value, inputs: list[Node | None], run, saved=()) -> Value:
        made.node = Node(made.buffer.nbytes, inputs, run, list(saved))
        self.nodes.append(made.node)
        return made

    def added(self, made: Value, more: Value) -> Value:
        """made + more: in the memory of made where nothing is recorded; the gradient goes to both as it is."""
        if not self.grad:
            return made
        out = self.make(made.rows, made.pixels, made.channels)
        if made.node or more.node:
            self._record(out, [made.node, more.node], lambda gradient: [gradient, gradient])
        return out

    def cat(self, values: list[Value]) -> Value:
        """Channels side by side; gradients are views of one."""
        first = values[0]
        out = self.make(first.rows, first.pixels, sum(value.channels for value in values))
        if self.grad and any(value.node for value in values):
            nodes = [value.node for value in values]
            self._record(out, nodes, lambda gradient: [gradient] * len(nodes))
        return out

    def recomputed(self, function: Callable, *values: Value | None) -> tuple[Value, ...]:
        """function(*values) -> values, of which only the inputs are kept; it runs again in the backward pass."""
        if not self.grad:
            return function(*values)
        self.grad = False
        results = function(*values)
        self.grad = True
        there = [value for value in values if value is not None]
        saved = [value.buffer for value in there]
        state = _Again(self, function, values, len(results))
        for i, result in enumerate(results):
            node = Node(result.buffer.nbytes, [value.node for value in there], None, saved)
            node.run = state.runner(i)
            result.node = node
            self.nodes.append(node)
        return results

    def backward(self, value: Value) -> None:
        """From a value to all that was recorded; frees what was kept on the way."""
        value.node.gradient = Buffer(self.ledger, value.buffer.nbytes)
        del value
        self.drain(0)

    def drain(self, first: int) -> None:
        """The backward pass of the nodes that were recorded since number `first`, the last one first."""
        while len(self.nodes) > first:
            node = self.nodes.pop()
            gradient, node.gradient = node.gradient, None
            if gradient is not None:
                for target, passed in zip(node.inputs, node.run(gradient)):
                    if target is not None:
                        target.receive(passed, self.ledger)
                    del passed
            node.saved, node.run = [], None


class _Again:
    """The backward pass of Tape.recomputed: runs once all results have their gradients."""

    def __init__(self, tape: Tape, function: Callable, values: tuple, count: int):
        self.tape, self.function, self.values, self.gradients = tape, function, values, [None] * count

    def runner(self, i: int) -> Callable:
        def run(gradient: Buffer) -> list[Buffer | None]:
            self.gradients[i] = gradient
            return self._run() if i == 0 else []

        return run

    def _run(self) -> list[Buffer | None]:
        leaves = [value and self._leaf(value) for value in self.values]
        first = len(self.tape.nodes)
        for result, gradient in zip(self.function(*leaves), self.gradients):
            if result.node is not None:
                result.node.gradient = gradient
        del result, gradient
        self.values, self.gradients = (), []
        self.tape.drain(first)
        return [leaf.node and leaf.node.gradient for leaf in leaves if leaf is not None]

    def _leaf(self, value: Value) -> Value:
        node = Node(value.buffer.nbytes, [], None) if value.node else None
        return Value(value.rows, value.pixels, value.channels, value.buffer, node)
