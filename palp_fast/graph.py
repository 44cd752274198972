"""Parts of a training step as CUDA graphs: run eagerly at first, then captured, then replayed, with the same result.

A part is a function without arguments whose operators are the same at every call: what differs between steps lies in
memory that stays in place (batches.Draws, batches.Sums, the optimizers' rates), and nothing in it waits for the device.
Eager calls of a part are training as much as replays are; a capture runs nothing, the replay after it does.

A model that cannot be captured says why as `graph_obstacle` (palp_fast/predict.py, palp_fast/teacher.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from palp_fast import backend

WARM_UP = 2  # steps before the first capture: kernels are compiled, state is made, libraries take their workspaces
NONE_ON_CPU = "there are none on a CPU"
MOST = 16  # graphs; with several subjects there is one for each combination of them in a batch


class CaptureFailed(RuntimeError):
    """A part could not be captured; nothing of it has run. out_of_memory: whether that was why."""

    def __init__(self, reason: str, out_of_memory: bool):
        super().__init__(reason)
        self.out_of_memory = out_of_memory


class Graphs:
    """Runs parts of steps: eagerly, or by graphs where `device` makes them.

    device: None, or an object like Cuda. Graphs hold addresses; whoever moves what they point to calls `drop`, and so
    does whoever needs their memory: they keep that of a whole step.
    """

    def __init__(self, device: Cuda | None):
        self._device, self._steps, self._told = device, 0, False
        self._known: set[Hashable] = set()
        self._places: list[int] = []
        self._graphs: dict[Hashable, tuple[Callable[[], None], Any]] = {}

    @property
    def are_on(self) -> bool:
        """Whether parts are, or will be, replayed."""
        return self._device is not None

    @property
    def held(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def begin(self, places: list[int]) -> None:
        """A step begins. places: addresses of what is trained; graphs that hold others are dropped."""
        if places != self._places:
            self.drop()
            self._places = places
        self._steps += 1

    def run(self, key: Hashable, part: Callable[[], Any]) -> Any:
        """part(), or the result of its capture, whose tensors a replay has written anew.

        key: parts with the same one are the same; each runs eagerly once, which makes what it keeps for later calls.
        Raises CaptureFailed; then the step may be run again from its start.
        """
        if self._device is None:
            return part()
        if key not in self._graphs:
            if self._steps <= WARM_UP or key not in self._known or not self._has_room():
                result = self._device.eager(part)
                self._known.add(key)
                return result
            self._graphs[key] = self._captured(part)
        replay, result = self._graphs[key]
        replay()
        return result

    def _has_room(self) -> bool:
        if len(self._graphs) < MOST:
            return True
        if not self._told:
            print(f"{MOST} CUDA graphs are held: steps with other combinations of subjects run without", flush=True)
            self._told = True
        return False

    def _captured(self, part: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        try:
            return self._device.capture(part)
        except Exception as error:  # whatever it was: the same part runs eagerly, and shows there if it is at fault
            first = _first(error).with_traceback(None)  # whose frames hold tensors
        self._device.free()
        text = (str(first).splitlines() or [""])[0]
        raise CaptureFailed(f"{type(first).__name__}: {text}", isinstance(first, torch.OutOfMemoryError))

    def drop(self) -> None:
        """Lets go of all graphs and their memory; the next step captures anew."""
        if self._graphs:
            self._device.synchronize()
            self._graphs = {}
            self._device.free()

    def stop(self, reason: str) -> None:
        """No graph from here on."""
        self.drop()
        self._device.free()
        self._device = None
        print(f"going on without CUDA graphs: {reason}", flush=True)


class Cuda:
    """Captures on a stream of its own, every graph from one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device):
        self._device, self._stream, self._pool = device, torch.cuda.Stream(device), None

    def eager(self, part: Callable[[], Any]) -> Any:
        """part() on that stream, so that nothing it leaves behind belongs to another one."""
        with self._aside():
            return part()

    def capture(self, part: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, what part() returned: its tensors are written by every replay)."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with self._aside(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = part()
        return graph.replay, result

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            before.wait_stream(self._stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def free(self) -> None:
        """The memory of graphs that are gone goes back to the card."""
        self._pool = None
        torch.cuda.empty_cache()


def obstacle(device: str) -> str | None:
    """Why steps on a device can be no CUDA graphs, by what is known before any work; None if they can."""
    if device == "cpu":
        return NONE_ON_CPU
    reason = backend.obstacle("adamw", torch.device(device), "cuda")
    return None if reason is None else f"the optimizers' own kernels are needed in a graph: {reason}"


def graphs_of(asked: bool | str, device: str, models: list) -> Graphs:
    """Those of a run by these models (predict.adapted); asked: the config's field.

    One line says why there are none, except on a CPU, where nobody expects them.
    """
    reasons = ["cuda_graph is False" if asked is False else obstacle(device), *(each.graph_obstacle for each in models)]
    reason = next(filter(None, reasons), None)
    if reason is None:
        return Graphs(Cuda(torch.device(device)))
    if reason != NONE_ON_CPU:
        print(f"steps without CUDA graphs: {reason}", flush=True)
    return Graphs(None)


def _first(error: BaseException) -> BaseException:
    """The error that led to others: a capture that failed fails once more where it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return error
