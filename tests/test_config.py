"""TrainConfig: fields, checks, presets, resolution, TOML, fingerprint."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from palp_fast.config import NFSD_NEGATIVE_PROMPT, Subject, TrainConfig
from palp_fast.errors import ConfigError
from palp_fast.resolve import compute_dtype

# The public interface: a changed name or default here breaks users.
DEFAULTS = {
    "teacher": None, "images": None, "class_noun": None, "subject_prompt": "a photo of [V]", "subjects": None,
    "token": None, "clean_prompt": None, "method": "palp", "alpha": 15.0, "beta": 7.5,
    "negative_prompt": NFSD_NEGATIVE_PROMPT, "residual_weight": 0.1, "rescale": True, "same_noise": True,
    "same_timestep": True, "loss_space": "model", "rank": 32, "lora_alpha": None, "lora_targets": "attention",
    "learn_token": True, "token_vectors": 1, "token_norm": "free", "steps": 500, "batch_size": 1,
    "grad_accumulation": 4, "lr": 1e-4, "token_lr": 5e-4, "lr_schedule": "constant", "optimizer": "adamw8bit",
    "max_grad_norm": 1.0,
    "timesteps": "stratified", "subject_sampling": "image", "resolution": None, "memory": "auto", "base_dtype": "auto",
    "teacher_base_dtype": None, "teacher_offload": False,
    "seed": 0, "device": "auto", "cuda_graph": "auto", "checkpoint_every": 100, "sample_every": 0, "resume": "auto",
    "preset": None, "backend": "auto",
}  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def make(photos, tmp_path):
    def config(**changes):
        fields = {"model": "emoji-64", "images": str(photos), "class_noun": "owl", "prompt": "a sketch of [V]"}
        return TrainConfig(**{**fields, "output_dir": str(tmp_path / "out"), "device": "cpu", **changes})

    return config


def several(photos, make, **changes):
    subjects = [Subject(str(photos), "owl"), Subject(str(photos), "cat", "[V2]", **changes)]
    return make(images=None, class_noun=None, subjects=subjects, prompt="[V1] and [V2]")


def test_fields_and_defaults():
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    required = {name for name, default in fields.items() if default is dataclasses.MISSING}
    assert required == {"model", "prompt", "output_dir"}
    assert {name: default for name, default in fields.items() if name not in required} == DEFAULTS
    subject = {f.name: f.default for f in dataclasses.fields(Subject)}
    assert list(subject) == ["images", "class_noun", "placeholder", "prompt", "token", "class_phrase"]
    assert list(subject.values())[2:] == ["[V1]", "a photo of [V1]", None, None]


def test_config_is_frozen(make):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().rank = 3


WRONG = [
    ("rank", [0, -1, True, 1.5, "8", None, float("nan")]),
    ("alpha", [0, -1.0, float("nan"), float("inf"), True, "15", None]),
    ("beta", [-0.1, float("nan"), False]),
    ("residual_weight", [-1, float("inf")]),
    ("lora_alpha", [0, -4, True]),
    ("lr", [0, float("nan"), "1e-4"]),
    ("steps", [0, 1.0, True]),
    ("seed", [-1, 2**63, 0.0]),
    ("checkpoint_every", [-1, False]),
    ("resolution", [0, 4, 100, 512.0]),
    ("rescale", [0, 1, "true", None]),
    ("method", ["PALP", "", None, 3]),
    ("timesteps", ["logit"]),
    ("memory", ["balance", "tiny"]),
    ("base_dtype", ["int4", "float32"]),
    ("cuda_graph", [0, 1, "yes"]),
    ("teacher", ["", 3]),
    ("teacher_base_dtype", ["auto", "int4", 8]),
    ("teacher_offload", [1, "cpu", None]),
    ("preset", ["5gb", "papers"]),
    ("backend", ["triton", "cuda", "gpu"]),
    ("device", ["tpu", "cuda:x", 0]),
    ("token", ["two words", "[V]", "Owl", "1st", ""]),
    ("prompt", ["", "  ", None, 3]),
    ("model", ["", None, 3]),
    ("output_dir", ["", None, b"out"]),
    ("subjects", [[], "cats", {"images": "x"}, [3]]),
    ("negative_prompt", [None]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG for value in values])
def test_wrong_values_name_field_value_and_what_is_allowed(make, field, value):
    with pytest.raises(ConfigError) as caught:
        make(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: {value!r} is not ") and "; allowed: " in message and "\n" not in message


def test_not_yet_available_is_said(make):
    with pytest.raises(ConfigError, match="backend: 'cuda' is not available in this version; allowed: 'auto'"):
        make(backend="cuda")


def test_unknown_fields_get_the_nearest_name(make):
    with pytest.raises(ConfigError, match="xyz: unknown field of TrainConfig; allowed: model, teacher, images"):
        make(xyz=1)
    with pytest.raises(ConfigError, match=r"batchsize: unknown field of TrainConfig \(did you mean 'batch_size'\?\)"):
        make(batchsize=1)
    with pytest.raises(ConfigError, match=r"imags: unknown field of Subject \(did you mean 'images'\?\)"):
        Subject(imags="x", class_noun="cat")
    with pytest.raises(ConfigError, match="prompt: missing"):
        TrainConfig(model="emoji-64", output_dir="out")


def test_numbers_are_normalised(make):
    cfg = make(alpha=15, rank=np.int64(8), lr=np.float32(0.5), output_dir=make().output_dir)
    assert (type(cfg.alpha), type(cfg.rank), type(cfg.lr)) == (float, int, float)


def test_replace_checks_and_keeps_the_rest(make):
    cfg = make(rank=4)
    assert cfg.replace(steps=3) == make(rank=4, steps=3)
    with pytest.raises(ConfigError, match="rank: 0"):
        cfg.replace(rank=0)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        cfg.replace(step=3)


def test_copies_and_pickles_are_equal_and_leave_the_same_to_presets(make):
    cfg = make(preset="paper", steps=7)
    for other in (copy.copy(cfg), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg)), cfg.replace()):
        assert other == cfg and other.given == cfg.given and hash(other) == hash(cfg)
        assert other.resolved().lr == 5e-5


def test_resolution_fills_everything(make, photos):
    cfg = make().resolved()
    (subject,) = cfg.subjects
    assert subject == Subject((photos / "0.png", photos / "1.png"), "owl", "[V]", "a photo of [V]", "my_owl")
    assert (cfg.images, cfg.class_noun, cfg.token) == (None, None, None)
    assert cfg.clean_prompt == "a sketch of an owl"
    assert (cfg.lora_alpha, cfg.memory, cfg.cuda_graph, cfg.base_dtype) == (32.0, "fast", False, "fp32")


@pytest.mark.parametrize("changes", [{}, {"method": "nfsd"}, {"method": "sds"}, {"preset": "paper"}, {"rank": 3}])
def test_resolution_is_idempotent(make, changes):
    once = make(**changes).resolved()
    assert once.resolved() == once
    assert once.fingerprint() == make(**changes).fingerprint()


def test_several_subjects_resolve(make, photos):
    cfg = several(photos, make).resolved()
    assert [s.token for s in cfg.subjects] == ["my_owl", "my_cat"]
    assert [s.prompt for s in cfg.subjects] == ["a photo of [V1]", "a photo of [V2]"]
    assert cfg.clean_prompt == "an owl and a cat"
    assert cfg.resolved() == cfg


def test_class_noun_loses_its_article(make):
    assert make(class_noun="an Owl ").resolved().subjects[0].class_noun == "Owl"
    assert make(class_noun="a snowy owl").resolved().subjects[0].token == "my_snowy_owl"


def test_token_words_do_not_collide(make, photos):
    twice = [Subject(str(photos), "owl"), Subject(str(photos), "owl", "[V2]")]
    cfg = make(images=None, class_noun=None, subjects=twice, prompt="[V1] and [V2]")
    assert [s.token for s in cfg.resolved().subjects] == ["my_owl", "my_owl2"]
    clash = [twice[0].replace(token="owlet"), twice[1].replace(token="owlet_1")]
    with pytest.raises(ConfigError, match="token: 'owlet_1' names two subjects"):
        cfg.replace(subjects=clash, token_vectors=2).resolved()
    assert cfg.replace(subjects=clash).resolved().subjects[1].token == "owlet_1"


def test_methods_bring_their_defaults(make):
    nfsd = make(method="nfsd").resolved()
    assert (nfsd.alpha, nfsd.beta, nfsd.rescale) == (7.5, 1.0, False)
    given = make(method="nfsd", alpha=15.0, rescale=True).resolved()
    assert (given.alpha, given.rescale) == (15.0, True)
    sds = make(method="sds").resolved()
    assert (sds.alpha, sds.beta, sds.rescale) == (15.0, 1.0, True)
    assert make(method="nfsd", preset="paper").resolved().alpha == 7.5


def test_preset_gives_way_to_given_fields_even_at_their_default(make):
    paper = make(preset="paper").resolved()
    assert (paper.lr, paper.token_lr, paper.timesteps, paper.optimizer) == (5e-5, 5e-5, "uniform", "adamw")
    assert (paper.residual_weight, paper.batch_size * paper.grad_accumulation, paper.steps) == (1.0, 32, 500)
    given = make(preset="paper", lr=1e-4, timesteps="stratified", batch_size=8).resolved()
    assert (given.lr, given.timesteps, given.optimizer) == (1e-4, "stratified", "adamw")
    assert (given.batch_size, given.grad_accumulation) == (8, 4)
    assert make(preset="paper", grad_accumulation=4).resolved().batch_size == 8
    both = make(preset="paper", batch_size=2, grad_accumulation=3).resolved()
    assert (both.batch_size, both.grad_accumulation) == (2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images: missing"),
        ({"class_noun": None}, "class_noun: missing"),
        ({"images": "no_such_folder"}, "images: 'no_such_folder' does not exist"),
        ({"prompt": "a sketch"}, r"prompt: no placeholder \[V\]"),
        ({"lora_targets": "none", "learn_token": False}, "lora_targets: 'none' with learn_token False"),
        ({"device": "cuda:77"}, "device: 'cuda:77' is not allowed"),
        ({"subjects": [Subject("x", "cat")]}, "images: .* beside subjects"),
        ({"teacher_base_dtype": "int8"}, "teacher_base_dtype: 'int8' without a teacher; .* alone: None"),
        ({"teacher_offload": True}, "teacher_offload: True without a teacher; .* alone: False"),
        ({"images": None, "class_noun": None, "subjects": [Subject("x", "a")], "subject_prompt": "x"}, "subject_pro"),
    ],
)
def test_checks_across_fields(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes).resolved()


def test_output_dir_under_a_file_is_refused(make, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(ConfigError, match="output_dir: .* is not a folder"):
            make(output_dir=folder).resolved()
    before = sorted(tmp_path.rglob("*"))
    make(output_dir=tmp_path / "new" / "deeper").resolved()
    assert sorted(tmp_path.rglob("*")) == before


def test_toml_round_trip(make, photos, tmp_path):
    awkward = 'a "sketch" of [V]\n\\ \x7f é 🦉'
    for cfg in (
        make(),
        make(prompt=awkward, lr=1e-5, alpha=3, rescale=False, preset="paper", cuda_graph=False, lora_alpha=None),
        make(images=[photos / "0.png", str(photos / "1.png")]),
        several(photos, make, token="owlet", class_phrase="the cat"),
        make().resolved(),
    ):
        cfg.to_toml(tmp_path / "c.toml")
        again = TrainConfig.from_toml(tmp_path / "c.toml")
        assert again.resolved() == cfg.resolved() and again.fingerprint() == cfg.fingerprint()
        assert {k: v for k, v in cfg.given.items() if v is not None}.keys() == again.given.keys()


def test_toml_cannot_hold_pictures(make, tmp_path):
    with pytest.raises(ConfigError, match="images: .* cannot be written to TOML"):
        make(images=[Image.new("RGB", (2, 2))]).to_toml(tmp_path / "c.toml")
    assert not (tmp_path / "c.toml").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config file .*c.toml' cannot be read"),
        ("rank = ", "config file .*c.toml' is not valid TOML"),
        ("model = 'm'\nprompt = 'p'\noutput_dir = 'o'\nrnak = 3", "did you mean 'rank'"),
        ("model = 'm'\nprompt = 'p'\noutput_dir = 'o'\nrank = true", "rank: True is not allowed"),
        ("model = 'm'\nprompt = 'p'\noutput_dir = 'o'\n[[subjects]]\nimages = 'x'", "class_noun: missing"),
    ],
)
def test_wrong_toml(tmp_path, content, message):
    if content is not None:
        (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_toml(tmp_path / "c.toml")


def test_the_teachers_dtype_is_the_models_where_it_is_not_given(make):
    own = make(teacher="t", base_dtype="int8").resolved()
    assert own.teacher_base_dtype == "int8" and own.resolved() == own
    assert make(teacher="t", base_dtype="int8", teacher_base_dtype="int8").fingerprint() == own.fingerprint()
    assert make(teacher="t", base_dtype="int8", teacher_base_dtype="nf4").fingerprint() != own.fingerprint()
    assert make(teacher="t", base_dtype="int8", teacher_offload=True).fingerprint() == own.fingerprint()
    assert make().resolved().teacher_base_dtype is None


@pytest.mark.parametrize(("own", "theirs", "expected"), [
    ("fp16", "int8", "fp16"), ("bf16", "nf4", "bf16"), ("fp16", "bf16", "bf16"), ("int8", "fp16", "fp16"),
    ("int8", "nf4", "fp32"), ("bf16", "fp32", "fp32"), ("bf16", None, "bf16"),
])
def test_the_teacher_computes_in_its_own_dtype_quantised_in_the_models(make, own, theirs, expected):
    cfg = make(teacher="t", base_dtype=own, teacher_base_dtype=theirs).resolved()
    assert compute_dtype(cfg, teacher=True) == expected


def test_fingerprint_follows_what_decides_the_result(make, photos, tmp_path):
    base = make().fingerprint()
    assert len(base) == 64 and base == make().fingerprint()
    for same in (
        {"output_dir": str(tmp_path / "elsewhere")}, {"resume": "never"}, {"sample_every": 5}, {"checkpoint_every": 7},
        {"rank": 32}, {"token": "my_owl"}, {"images": [photos / "0.png", photos / "1.png"]},
        {"clean_prompt": "a sketch of an owl"},
    ):  # fmt: skip
        assert make(**same).fingerprint() == base, same
    for other in (
        {"rank": 16}, {"seed": 1}, {"prompt": "a drawing of [V]"}, {"class_noun": "bird"}, {"token": "owlet"},
        {"preset": "paper"}, {"images": [photos / "0.png"]}, {"steps": 501}, {"method": "sds"},
    ):  # fmt: skip
        assert make(**other).fingerprint() != base, other
    Image.new("RGB", (8, 8), "white").save(photos / "0.png")
    assert make().fingerprint() != base
