"""Bytes of all tensors on the CPU while a function runs, by the allocations that torch's profiler records."""

import gc
from itertools import accumulate

import torch


def alive():
    """Bytes of all tensors that are there."""
    gc.collect()
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors()}.values())


def peak(function):
    """The most bytes alive while function() runs, those that are alive before included."""
    before = alive()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [(event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    return before + max(accumulate(nbytes for _, nbytes in sorted(events, key=lambda event: event[0])))


def _tensors():
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            yield thing
