"""The optimizer step: clip groups, decay, optimizer state, schedule, fp16 loss scale."""

import math

import pytest
import torch
from palp_fast import TrainConfig, TrainingDiverged
from palp_fast.metrics import NAMES, Recorder, Row
from palp_fast.update import SKIPPED, Update


def update_of(**options):
    fields = {"model": "m", "prompt": "[V]", "output_dir": "o", "device": "cpu", "base_dtype": "fp32", "steps": 10,
              "optimizer": "adamw", "lr": 0.1, "token_lr": 0.2}
    lora = {"a": torch.nn.Parameter(torch.full((4, 300), 0.5)), "b": torch.nn.Parameter(torch.full((300, 4), 0.5))}
    rows = {"token": torch.nn.Parameter(torch.full((1, 300), 0.5))}
    return Update(TrainConfig(**(fields | options)), lora, rows)


def backward(update, lora=1.0, row=1.0):
    update.zero()
    a, b, token = update.named.values()
    update.backward(lora * (a.sum() + b.sum()) + row * token.sum())


def test_each_group_is_clipped_by_its_own_norm():
    update = update_of(max_grad_norm=2.0)
    backward(update, lora=0.01, row=100.0)
    total, norms = update.clip()
    a, b, token = (p.grad for p in update.named.values())
    assert total == pytest.approx(math.hypot(0.01 * math.sqrt(2400), 100 * math.sqrt(300)), rel=1e-5)
    assert list(norms) == ["a", "b", "token"] and norms["token"] == pytest.approx(100 * math.sqrt(300), rel=1e-5)
    assert torch.equal(a, torch.full_like(a, 0.01)) and token.norm() == pytest.approx(2.0, rel=1e-4)
    backward(update, lora=100.0, row=0.01)
    update.clip()
    a, b, token = (p.grad for p in update.named.values())
    assert torch.cat([a.flatten(), b.flatten()]).norm() == pytest.approx(2.0, rel=1e-4)
    assert torch.equal(token, torch.full_like(token, 0.01))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_rows_have_their_own_rate_no_decay_and_fp32_state(optimizer):
    update = update_of(optimizer=optimizer)
    lora, rows = update.optimizer.param_groups
    assert (lora["lr"], rows["lr"], rows["weight_decay"]) == (0.1, 0.2, 0.0)
    backward(update)
    update.clip()
    update.step()
    token = update.named["token"]
    state = update.optimizer.state[token]
    moments = [value for value in state.values() if torch.is_tensor(value) and value.numel() >= token.numel()]
    assert moments and all(moment.dtype == torch.float32 for moment in moments)
    if optimizer != "adamw":
        a = update.optimizer.state[update.named["a"]].values()
        assert any(torch.is_tensor(value) and value.dtype == torch.uint8 for value in a)
    torch.testing.assert_close(token.detach(), torch.full((1, 300), 0.5 - 0.2), rtol=1e-3, atol=1e-3)


def test_rows_without_gradient_do_not_move():
    update = update_of(optimizer="adamw8bit")
    backward(update)
    update.clip()
    update.step()
    before = update.named["token"].detach().clone()
    update.zero()
    update.backward(update.named["a"].sum())
    update.clip()
    update.step()
    assert torch.equal(update.named["token"], before)


def test_the_schedule_ends_at_zero():
    update, rates = update_of(lr_schedule="linear"), []
    for _ in range(10):
        rates.append(update.lr)
        backward(update)
        update.clip()
        update.step()
        update.next_rates()
    assert rates[0] == 0.1 and rates[5] == pytest.approx(0.05) and update.lr == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(optimizer):
    update = update_of(base_dtype="fp16", optimizer=optimizer)
    scale, before = update.scaler.get_scale(), update.named["a"].detach().clone()
    backward(update, lora=float("inf"))
    update.clip()
    update.step()
    assert torch.equal(update.named["a"], before) and update.scaler.get_scale() == scale / 2
    backward(update)
    assert update.gradients() == pytest.approx(math.sqrt(2700), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_the_loss_scale_does_not_change_the_step(optimizer):
    updates = [update_of(base_dtype=dtype, optimizer=optimizer, max_grad_norm=0.5) for dtype in ("fp32", "fp16")]
    for update in updates:
        for lora in (0.3, float("inf"), 0.7) if update.scaler.is_enabled() else (0.3, 0.7):
            backward(update, lora=lora)
            update.clip()
            update.step()
    assert updates[1].scaler.get_scale() > 1
    for plain, scaled in zip(*(update.named.values() for update in updates)):
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer):
    update = update_of(optimizer=optimizer)
    backward(update)
    update.clip()
    update.step()
    before = {name: p.detach().clone() for name, p in update.named.items()}
    backward(update, row=float("nan"))
    update.clip()
    update.step()
    assert all(torch.equal(p, before[name]) for name, p in update.named.items())
    backward(update)
    update.clip()
    update.step()
    assert not any(torch.equal(p, before[name]) for name, p in update.named.items())


def recorded(update, recorder, step, **values):
    """The metrics of a step with gradients of `backward` and these values, all others 1."""
    recorder.start()
    total, norms = update.clip()
    values = {name: torch.tensor(float(values.get(name, 1.0))) for name in NAMES} | {"grad_norm": total}
    return recorder.record(step, 0.1, Row.of(values, norms))


def test_what_is_not_finite_is_named():
    update, recorder, bad = update_of(), Recorder("cpu", 1), float("nan")
    for values, gradients, words in (
            ({}, {}, None), ({"rec_loss": bad, "loss": bad}, {}, "the student's prediction"),
            ({"residual_norm": bad}, {"row": bad}, "the residual"), ({"loss": float("inf")}, {}, "the loss"),
            ({}, {"lora": bad}, "the gradient of a"), ({}, {"row": bad}, "the gradient of token")):
        backward(update, **gradients)
        assert recorded(update, recorder, 7, **values).diverged == words


def test_training_has_diverged_after_twenty_steps_in_a_row():
    update, recorder = update_of(), Recorder("cpu", 1)

    def steps(first, count, row):
        for step in range(first, first + count):
            backward(update, row=row)
            update.check(recorded(update, recorder, step))

    steps(1, SKIPPED - 1, float("nan"))
    steps(20, 1, 1.0)
    update.check_end()
    steps(21, SKIPPED - 1, float("nan"))
    with pytest.raises(TrainingDiverged, match="step 21: the gradient of token is not finite, nor .* 19 steps after"):
        steps(40, 1, float("nan"))
    steps(41, 1, float("nan"))
    with pytest.raises(TrainingDiverged, match="step 41: the gradient of token is not finite. The"):
        update.check_end()
    update.check_end()


def test_a_run_may_end_while_the_loss_scale_settles_but_not_with_a_prediction_that_is_not_finite():
    update, recorder = update_of(base_dtype="fp16"), Recorder("cpu", 1)
    backward(update, row=float("inf"))
    update.check(recorded(update, recorder, 9))
    update.check_end()
    update.step()
    backward(update)
    update.check(recorded(update, recorder, 10, rec_loss=float("nan")))
    with pytest.raises(TrainingDiverged, match="step 9: the gradient of token"):
        update.check_end()


def test_metrics_are_read_together_when_the_ring_is_full_or_when_asked_for():
    update, recorder = update_of(), Recorder("cpu", 3)
    made = []
    for step in range(1, 6):
        backward(update, row=float(step))
        made.append(recorded(update, recorder, step, loss=step))
    assert [one.is_read for one in made] == [True] * 3 + [False] * 2
    assert recorder.take() == made[:3] and recorder.take() == []
    assert made[4]["step"] == 5 and made[4]["lr"] == 0.1 and not made[4].is_read
    assert made[4]["loss"] == 5.0 and made[3].is_read and [one["loss"] for one in made] == [1, 2, 3, 4, 5]
    assert recorder.take() == made[3:] and all(one["seconds"] > 0 for one in made)
    assert {**made[0]} == dict(made[0]) and "loss" in repr(made[0]) and len(made[0]) == 9


def test_what_diverged_reaches_no_file():
    update = update_of()
    with torch.no_grad():
        update.named["b"].fill_(float("inf"))
    with pytest.raises(TrainingDiverged, match="step 7: b is not finite"):
        update.check_parameters(7)
