"""Steps as CUDA graphs, by graphs that are replayed on the CPU (tests/replayed.py): the steps of eager training, what
a capture freezes, and what is done where a graph cannot be. On a card: tests/test_graph_cuda.py."""

import pytest
import tiny
import torch
from close import NEEDS_LIBRARY
from graph_cases import EACH_CASE, assert_same, config_of, trainer_of
from palp_fast import ConfigError, Trainer, batches, graph, previews, train
from replayed import OnCpu, taped

pytestmark = NEEDS_LIBRARY  # the optimizers' own step is needed in a graph


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in tiny.KINDS}


def with_graphs(trainer, monkeypatch):
    """The trainer, and the device of its graphs."""
    device = OnCpu(trainer, monkeypatch)
    trainer.graphs = graph.Graphs(device)
    return trainer, device


@EACH_CASE
def test_replays_are_the_eager_steps(folders, tmp_path, monkeypatch, name):
    """Bit for bit, metrics, optimizer, sampler and loss scale included."""
    eager = trainer_of(folders, tmp_path / "eager", name)
    list(eager)
    replayed, device = with_graphs(trainer_of(folders, tmp_path / "graph", name), monkeypatch)
    list(replayed)
    assert_same(eager, replayed)
    assert (len(device.tapes), device.replays) == graphs_and_replays(replayed)
    assert len(device.tapes) == (1 if replayed.config.grad_accumulation == 1 else 2) + ("two subjects" in name)


def graphs_and_replays(trainer):
    """By the rule: a part is replayed after WARM_UP steps, if it ran before."""
    cfg, known, captured, replays = trainer.config, set(), set(), 0
    for step in range(cfg.steps):
        offsets = [i * cfg.batch_size for i in range(cfg.grad_accumulation)]
        parts = [tuple(trainer.draws.chosen(step, offset)[1]) for offset in offsets]
        for part in parts if len(parts) == 1 else [*parts, "end"]:
            if step >= graph.WARM_UP and part in known:
                captured.add(part)
                replays += 1
            known.add(part)
    return len(captured), replays


@EACH_CASE
def test_a_capture_freezes_nothing_that_differs_between_steps(folders, tmp_path, monkeypatch, name):
    """Two captures of a part at different steps: the same operators with the same numbers on the same memory."""
    trainer = trainer_of(folders, tmp_path / "run", name, steps=100)
    for _ in range(4):
        trainer._train_step()
    many = trainer.config.grad_accumulation > 1
    part = trainer._accumulate if many else trainer._whole
    subjects = trainer.draws.choose(4, 0)
    captures = [described(trainer, step, part, subjects, monkeypatch) for step in (4, later(trainer, subjects))]
    assert captures[0] == captures[1] and len(captures[0]) > 300
    if many:
        ends = [described(trainer, step, trainer._finish, None, monkeypatch) for step in (4, 5)]
        assert ends[0] == ends[1] and len(ends[0]) > 10


def later(trainer, subjects):
    """Another step whose first batch is of the same subjects."""
    return next(step for step in range(5, 100) if trainer.draws.choose(step, 0) == subjects)


def described(trainer, step, part, subjects, monkeypatch):
    trainer.update.zero(keep=trainer.config.grad_accumulation > 1)
    if subjects is None:
        return taped(part, monkeypatch)[0].described()
    trainer.draws.choose(step, 0)
    return taped(lambda: part(subjects), monkeypatch)[0].described()


@pytest.mark.parametrize("leak", ["step", "photos", "rates", "sums", "gradients"])
def test_the_two_tests_above_can_fail(folders, tmp_path, monkeypatch, leak):
    """A value of the host that leaks into a step: what is captured differs, and replays train otherwise."""
    options = {"grad_accumulation": 2, "lr_schedule": "linear"}
    eager = trainer_of(folders, tmp_path / "eager", "palp", **options)
    list(eager)
    trainer, device = with_graphs(trainer_of(folders, tmp_path / "graph", "palp", **options), monkeypatch)
    draws, choose = trainer.draws, trainer.draws.choose

    def chosen(step, offset):
        subjects = choose(step, offset)
        if leak == "step":
            draws.step = step
        else:
            draws._photos = draws._photos.clone()
            kept.append(draws._photos)
        return subjects

    kept = []
    if leak in ("step", "photos"):
        monkeypatch.setattr(draws, "choose", chosen)
    elif leak == "rates":
        monkeypatch.setattr(trainer.update, "refresh", lambda: None)
    elif leak == "sums":
        monkeypatch.setattr(trainer.sums, "start", lambda: None)
    else:
        right = torch._foreach_zero_
        monkeypatch.setattr(torch, "_foreach_zero_", lambda grads: None if trainer.step else right(grads))
    list(trainer)
    assert device.replays
    with pytest.raises(AssertionError):
        assert_same(eager, trainer)
    if leak in ("step", "photos"):
        one, other = (
            described(trainer, step, trainer._accumulate, (0, 0), monkeypatch) for step in (4, 5))
        assert one != other


def test_no_gradient_is_as_large_as_the_vocabulary(folders, tmp_path, monkeypatch):
    trainer = trainer_of(folders, tmp_path / "run", "palp")
    trainer._train_step()
    table = trainer.components.text_encoders[0].get_input_embeddings().weight
    trainer.update.zero()
    tape, _ = taped(lambda: trainer._whole(trainer.draws.choose(1, 0)), monkeypatch)
    shapes = [tensor.shape for *_, new in tape.calls for tensor in new]
    assert shapes and not any(len(table) in shape for shape in shapes) and table.grad is None


def scale_from(trainer, scale):
    """The loss scale starts there and grows after two good steps."""
    scaler = trainer.update.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "growth_interval": 2})


def test_the_loss_scale_moves_as_in_eager_steps(folders, tmp_path, monkeypatch):
    """Down at planted overflows, up after two good steps; the skipped steps change nothing."""
    scales = {}
    for kind in ("eager", "graph"):
        trainer = trainer_of(folders, tmp_path / kind, "fp16", steps=12)
        if kind == "graph":
            trainer, device = with_graphs(trainer, monkeypatch)
        scale_from(trainer, 64.0)
        factor = torch.ones(())
        lora_b = next(trainer.named_lora())[2]
        lora_b.register_hook(lambda grad, factor=factor: grad * factor)
        scales[kind] = []
        for step in range(12):
            factor.fill_(float("inf") if step in (4, 5, 8) else 1.0)
            before = [parameter.detach().clone() for parameter in trainer.update.named.values()]
            trainer._train_step()
            same = [torch.equal(*pair) for pair in zip(before, trainer.update.named.values())]
            assert all(same) if step in (4, 5, 8) else not any(same)
            scales[kind].append((trainer.update.scaler.get_scale(), int(trainer.update.optimizer.skipped_steps)))
    assert device.replays == 10 and scales["eager"] == scales["graph"]
    assert [scale for scale, _ in scales["graph"]] == [64, 128, 128, 256, 128, 64, 64, 128, 64, 64, 128, 128]


def test_a_resumed_run_with_graphs_ends_in_the_same_bytes(folders, tmp_path, monkeypatch):
    """Cut between replays and gone on from step 4, beside a run without graphs."""
    config = config_of(folders, tmp_path / "whole", "accumulation", steps=8, checkpoint_every=4)
    whole = train(config)
    cut, device = with_graphs(Trainer(config.replace(output_dir=str(tmp_path / "cut"))), monkeypatch)
    for metrics in cut:
        if metrics["step"] == 6:
            break
    assert device.replays
    resumed, device = with_graphs(
        Trainer(config.replace(output_dir=str(tmp_path / "cut"), resume="must")), monkeypatch)
    assert resumed.step == 4
    list(resumed)
    result = resumed.save()
    assert device.replays and result.lora.read_bytes() == whole.lora.read_bytes()
    assert [path.read_bytes() for path in result.embedding.values()] == [
        path.read_bytes() for path in whole.embedding.values()]


@pytest.mark.parametrize("name", ["palp", "accumulation"])
def test_pictures_and_gradients_beside_graphs(folders, tmp_path, monkeypatch, name):
    """Both let the graphs go, whose memory they may need; the steps after them are captured anew, and the same."""
    monkeypatch.setattr(previews, "_STEPS", 2)
    eager = trainer_of(folders, tmp_path / "eager", name, steps=8)
    list(eager)
    trainer, device = with_graphs(trainer_of(folders, tmp_path / "graph", name, steps=8, sample_every=5), monkeypatch)
    for metrics in trainer:
        if metrics["step"] == 5:
            assert not trainer.graphs.held
        if metrics["step"] == 7:
            assert trainer.graphs.held
            latents, noise = torch.randn(2, 2, 4, 8, 8)
            trainer.gradients(latents, torch.tensor([20, 400]), noise)
            assert not trainer.graphs.held
    assert_same(eager, trainer)
    assert len(device.tapes) == 3 * (1 if name == "palp" else 2)


def test_what_moved_is_captured_anew(folders, tmp_path, monkeypatch):
    trainer, device = with_graphs(trainer_of(folders, tmp_path / "run", "accumulation", steps=20), monkeypatch)
    for _ in range(4):
        trainer._train_step()
    parameter = next(iter(trainer.update.named.values()))
    for move in (lambda: parameter.__setattr__("grad", parameter.grad.clone()),
                 lambda: parameter.__setattr__("data", parameter.data.clone())):
        tapes = len(device.tapes)
        trainer._train_step()
        assert len(device.tapes) == tapes
        kept = parameter.grad, parameter.data  # so that the addresses are not taken again
        move()
        trainer._train_step()
        assert len(device.tapes) == tapes + 2
        del kept


class FakeDevice:
    """Captures parts as themselves."""

    def __init__(self):
        self.log = []

    def eager(self, part):
        self.log.append("eager")
        return part()

    def capture(self, part):
        self.log.append("capture")
        result = part()
        return lambda: self.log.append("replay"), result

    def synchronize(self):
        self.log.append("wait")

    def free(self):
        self.log.append("free")


def test_a_part_runs_eagerly_then_by_its_graph(capsys, monkeypatch):
    device = FakeDevice()
    graphs = graph.Graphs(device)

    def step(key, places=(1,)):
        device.log.clear()
        graphs.begin(list(places))
        assert graphs.run(key, lambda: key) == key
        return device.log

    assert step("a") == ["eager"] and step("a") == ["eager"] and graphs.held == 0
    assert step("a") == ["capture", "replay"] and step("a") == ["replay"]
    assert step("b") == ["eager"] and step("b") == ["capture", "replay"] and graphs.held == 2
    assert step("a", places=(2,)) == ["wait", "free", "capture", "replay"] and graphs.held == 1
    with pytest.raises(ZeroDivisionError):
        graphs.run("never ran to its end", lambda: 1 / 0)
    assert step("never ran to its end", (2,)) == ["eager"]
    graphs.drop()
    device.log.clear()
    graphs.drop()
    assert device.log == [] and step("b", (2,)) == ["capture", "replay"]
    monkeypatch.setattr(graph, "MOST", 2)
    assert step("a", (2,)) == ["capture", "replay"]
    assert [step("c", (2,)) for _ in range(3)] == [["eager"]] * 3 and step("a", (2,)) == ["replay"]
    assert capsys.readouterr().out.count("2 CUDA graphs are held") == 1


def chained():
    """As torch raises where a capture that has failed ends."""
    try:
        try:
            raise torch.OutOfMemoryError("a small card")
        except torch.OutOfMemoryError:
            raise RuntimeError("the capture was invalidated")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(("fails", "memory", "mode", "words"), [
    ([RuntimeError("not permitted when stream is capturing")], "auto", "fast",
     ["going on without CUDA graphs: RuntimeError: not permitted when stream is capturing"]),
    ([chained(), torch.OutOfMemoryError("still")], "auto", "low",
     ["in mode 'fast': going on in 'balanced'", "in mode 'balanced': going on in 'low'"]),
    ([chained()], "fast", "fast", ["going on without CUDA graphs: OutOfMemoryError: a small card"]),
], ids=["failed", "memory", "memory, mode asked for"])
def test_where_no_graph_can_be_made(folders, tmp_path, monkeypatch, capsys, fails, memory, mode, words):
    """The step that was to be captured runs all the same, once."""
    eager = trainer_of(folders, tmp_path / "eager", "fp16", steps=8)
    trainer, device = with_graphs(trainer_of(folders, tmp_path / "graph", "fp16", steps=8, memory=memory), monkeypatch)
    right, left = device.capture, list(fails)

    def capture(part):
        if left:
            trainer.update.scaler.unscale_(trainer.update.optimizer)  # cut off in the middle
            raise left.pop(0)
        return right(part)

    device.capture = capture
    list(trainer)
    assert trainer.predictions.memory == mode and trainer.graphs.are_on == (mode == "low")
    shown = capsys.readouterr().out
    assert all(text in shown for text in words)
    if mode == "fast":
        list(eager)
        assert_same(eager, trainer)
    # In each mode a step runs eagerly before one is captured.
    assert trainer.step == 8 and device.replays == (4 if mode == "low" else 0)


def test_a_lack_of_memory_drops_the_graphs_before_it_changes_the_mode(folders, tmp_path, monkeypatch, capsys):
    options = {"steps": 8, "seed": 1}  # the second subject comes when there is a graph of the first
    eager = trainer_of(folders, tmp_path / "eager", "two subjects", **options)
    list(eager)
    trainer = trainer_of(folders, tmp_path / "graph", "two subjects", **options, memory="auto")
    trainer, device = with_graphs(trainer, monkeypatch)
    right, tight = trainer._accumulate, []

    def accumulate(subjects):
        if trainer.graphs.held and not tight:
            tight.append(subjects)
            raise torch.OutOfMemoryError("beside the memory of graphs")
        right(subjects)

    monkeypatch.setattr(trainer, "_accumulate", accumulate)
    right_capture = device.capture

    def capture(part):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "_accumulate", right)
            return right_capture(part)

    device.capture = capture
    list(trainer)
    assert tight and trainer.graphs.held == 2 and trainer.predictions.memory == "fast"
    assert_same(eager, trainer)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_that_ran_out_of_memory_is_captured_anew(folders, tmp_path, monkeypatch, passes):
    """With the loss scale where it was."""
    options = {"grad_accumulation": passes, "steps": 9}
    eager, trainer = (trainer_of(folders, tmp_path / kind, "fp16", **options) for kind in ("eager", "graph"))
    trainer, device = with_graphs(trainer, monkeypatch)
    choose, left = trainer.draws.choose, [1]

    def fail_once(step, offset):
        if step == 5 and offset == 2 * (passes - 1) and left:
            raise torch.OutOfMemoryError(f"a small card, {left.pop()}")
        return choose(step, offset)

    monkeypatch.setattr(trainer.draws, "choose", fail_once)
    for each in (eager, trainer):
        scale_from(each, 64.0)
        list(each)
    assert not left and len(device.tapes) == 2 * passes
    assert_same(eager, trainer)


def test_a_lack_of_memory_in_the_update_ends_the_run(folders, tmp_path, monkeypatch):
    """The step could not be run again as it was."""
    trainer = trainer_of(folders, tmp_path / "run", "palp", memory="auto")

    def fail(*_):
        raise torch.OutOfMemoryError("a small card")

    monkeypatch.setattr(trainer.draws.sampler, "update", fail)
    with pytest.raises(RuntimeError, match="out of memory in the optimizer's step: a small card"):
        trainer._train_step()
    assert trainer.predictions.memory == "fast"


def test_one_line_says_why_there_is_no_graph(folders, tmp_path, capsys, monkeypatch):
    Trainer(tiny.config(folders["sd"], tmp_path / "run"))
    assert "CUDA graphs" not in capsys.readouterr().out  # nobody expects them on a CPU
    Trainer(tiny.config(folders["sd"], tmp_path / "run", cuda_graph=False))
    assert "steps without CUDA graphs: cuda_graph is False\n" in capsys.readouterr().out
    monkeypatch.setattr(graph, "obstacle", lambda device: None)
    Trainer(tiny.config(folders["sd"], tmp_path / "run"), lean=False)
    assert "steps without CUDA graphs: diffusers' own modules train" in capsys.readouterr().out


def test_a_graph_that_cannot_be_is_refused_before_any_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("palp_fast.models.load_components", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="cuda_graph: True is not allowed here: there are none on a CPU"):
        Trainer(tiny.config(folders["sd"], tmp_path / "run", cuda_graph=True))
    monkeypatch.setattr(graph, "obstacle", lambda device: None)
    with pytest.raises(ConfigError, match="cuda_graph: True needs the lean UNet"):
        Trainer(tiny.config(folders["sd"], tmp_path / "run", cuda_graph=True), lean=False)
    assert not (tmp_path / "run").exists()


def test_sums_put_each_sample_in_its_place():
    sums = batches.Sums(4, torch.device("cpu"))
    for step in range(2):
        sums.start()
        for offset in (2, 0):
            numbers = torch.tensor([offset, offset + 1])
            stats = torch.stack([numbers, -numbers], dim=1).float()
            sums.add(torch.tensor(offset), torch.tensor(0.5), numbers + 10 * step, stats)
        assert sums.loss == 1 and sums.t.tolist() == [10 * step + i for i in range(4)]
        assert sums.stats[:, 1].tolist() == [0, -1, -2, -3]
