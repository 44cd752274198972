"""The end-to-end benchmark: its providers' gradients are those of the plain baseline, and a wrong one is not timed."""

import dataclasses

import numpy as np
import pytest
import tiny
from bench import end_to_end, step_gate
from bench.baselines import plain
from bench.end_to_end import Case, Stopped, Worker, measure

SAME = [*(f"palp_fast {memory}" for memory in ("fast", "balanced", "low")), "tuned eager"]


@pytest.fixture(scope="module", autouse=True)
def short_prompt():
    """The demo's target is too long for a tiny text encoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "TARGET", "a sketch of {}")
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case("sd15", str(tiny.model_folder(tmp_path_factory.mktemp("sd"), "sd")), 8, "fp32", "cpu", 1)


@pytest.fixture(scope="module")
def truth(case):
    return gradients("plain", case)


def gradients(provider, case):
    make, _ = end_to_end.PROVIDERS[provider](case)
    return make().gradients(4, case.side, "cpu")


@pytest.mark.parametrize("provider", SAME)
def test_providers_give_the_gradient_of_plain(case, truth, provider):
    assert step_gate.error(gradients(provider, case), truth) < 1e-4 < step_gate.LIMITS["fp32"]


@pytest.mark.parametrize("provider", ["palp_fast fast", "tuned eager"])
def test_16_bit_gradients_pass(case, provider):
    half = dataclasses.replace(case, dtype="bf16")
    assert step_gate.error(gradients(provider, half), gradients("plain", half)) < step_gate.LIMITS["bf16"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_plain_in_16_bits_is_near_fp32(case, truth, dtype):
    """fp16 by a loss scale: without one, latents of real size leave little of its gradient."""
    assert step_gate.error(gradients("plain", dataclasses.replace(case, dtype=dtype)), truth) < 0.1


def test_a_step_without_its_residual_is_found(case, truth):
    assert step_gate.error(gradients("dreambooth", case), truth) > step_gate.LIMITS["fp32"]


def test_a_step_without_guidance_is_found(case, truth, monkeypatch):
    monkeypatch.setattr(plain, "guided_apart", lambda eps, condition, empty, scale: eps(condition))
    assert step_gate.error(gradients("plain", case), truth) > step_gate.LIMITS["fp32"]


def test_zeros_and_numbers_that_are_not_finite_are_found(truth):
    for value in (0.0, float("nan")):
        found = truth | {"lora_b": truth["lora_b"] * value}
        assert step_gate.error(found, truth) > step_gate.LIMITS["bf16"]
    assert step_gate.error(truth | {"token rows": truth["token rows"][:0]}, truth) == float("inf")


class Fake(Worker):
    """A worker without a process; "tuned blocks" has gradients of zeros; in the second step of "palp_fast low", or the
    first of "palp_fast balanced", comes the signal to end."""

    started = []

    def __init__(self, provider, case, lora_steps, start_limit):
        self.provider, self.dtype, self.samples, self.problem, self.peak = provider, case.dtype, [], None, 0
        self.gradients = {"lora_b": np.full(3, float(provider != "tuned blocks"))}
        self.lora_seconds = 9.0
        self.started.append(provider)

    def wait(self):
        pass

    def step(self):
        if self.provider == "palp_fast balanced" or self.provider == "palp_fast low" and self.samples:
            raise Stopped
        self.samples.append(0.5)
        self.peak = 7

    def finish(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(end_to_end, "Worker", Fake)
    Fake.started.clear()


def test_a_wrong_provider_is_not_timed(case, fake):
    found = {row.provider: row for row in measure(["tuned blocks", "plain", "dreambooth"], case, 3, 2, True, 1.0)}
    assert Fake.started[0] == "plain"
    wrong = found["tuned blocks"]
    assert wrong.status == "wrong" and wrong.note == "relative error of the gradient 1.0e+00, allowed 2.0e-03"
    assert wrong.step_s == wrong.peak_bytes == wrong.lora_s == "" and "wrong: " in end_to_end.show(wrong)
    for name in ("plain", "dreambooth"):
        assert found[name].status == "ok" and found[name].rounds == "3" and found[name].lora_s == "9.00"


def test_ours_alone_is_compared_with_plain_too(case, fake):
    (row,) = measure(["palp_fast fast"], case, 1, 0, False, 1.0)
    assert Fake.started == ["plain", "palp_fast fast"] and row.status == "ok" and row.peak_bytes == "7"


def test_stopped_it_gives_what_it_has(case, fake):
    found = {row.provider: row for row in measure(["plain", "palp_fast low"], case, 9, 0, False, 1.0)}
    assert found["palp_fast low"].rounds == "1" and found["plain"].rounds == "2"
    assert [row.provider for row in measure(["palp_fast balanced", "plain"], case, 9, 0, False, 1.0)] == ["plain"]
    assert list(measure(["palp_fast balanced", "palp_fast fast"], case, 9, 0, True, 1.0)) == []


def test_a_start_that_takes_too_long_is_given_up(case):
    worker = Worker("plain", case, 0, 0.01)
    worker.wait()
    worker.finish()
    assert worker.problem == ("unavailable", "not ready after 0 s") and not worker.process.is_alive()
