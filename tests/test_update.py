"""The optimizer step: clip groups, decay, optimizer state, schedule, fp16 loss scale."""

import math

import pytest
import torch
from palp_fast import TrainConfig, TrainingDiverged
from palp_fast.update import Update


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
    total = update.clip()
    a, b, token = (p.grad for p in update.named.values())
    assert total == pytest.approx(math.hypot(0.01 * math.sqrt(2400), 100 * math.sqrt(300)), rel=1e-5)
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
    assert rates[0] == 0.1 and rates[5] == pytest.approx(0.05) and update.lr == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(optimizer):
    update = update_of(base_dtype="fp16", optimizer=optimizer)
    scale, before = update.scaler.get_scale(), update.named["a"].detach().clone()
    backward(update, lora=float("inf"))
    norm = update.clip().item()
    update.check(1, {"loss": 1.0, "rec_loss": 1.0, "residual_norm": 1.0, "grad_norm": norm})
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


def test_what_is_not_finite_is_named():
    update = update_of()
    fine = {"loss": 1.0, "rec_loss": 1.0, "residual_norm": 1.0, "grad_norm": 1.0}
    update.check(7, fine)
    backward(update, row=float("nan"))
    for name, words in (("rec_loss", "prediction"), ("residual_norm", "residual"), ("grad_norm", "gradient of token")):
        with pytest.raises(TrainingDiverged, match=f"step 7.*{words}"):
            update.check(7, fine | {name: float("nan")})
    with torch.no_grad():
        update.named["b"].fill_(float("inf"))
    with pytest.raises(TrainingDiverged, match="step 7: b is not finite"):
        update.check_parameters(7)
