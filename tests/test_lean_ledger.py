"""Bytes kept by the lean UNet at full SD1.x and SDXL size: regression limits, exact on any machine."""

import ledger
import pytest

MIB = 2**20
LIMITS = {
    "SD1.x 512": {"fast": 465, "balanced": 230, "low": 110},
    "SDXL 1024": {"fast": 3500, "balanced": 1500, "low": 350},
}


@pytest.mark.parametrize("memory", ["fast", "balanced", "low"])
@pytest.mark.parametrize("shape", LIMITS)
def test_bytes_kept(shape, memory):
    found = ledger.saved(shape, memory)
    total = sum(found.values()) / MIB
    for kind, nbytes in found.most_common():
        print(f"{shape} | {memory} | {kind} | {nbytes / MIB:.1f}")
    print(f"{shape} | {memory} | all | {total:.1f}")
    assert total <= LIMITS[shape][memory]
