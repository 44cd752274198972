"""Every wrong input gives one clear error before any work: no weights loaded, nothing written."""

import os

import pytest
import tiny
from PIL import Image

import palp_fast
from palp_fast import ConfigError, DataError, Subject


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def inputs(tmp_path, model):
    """A folder of good and bad photos, and the fields of a run that is right."""
    for name in ("photos", "empty", "broken"):
        (tmp_path / name).mkdir()
    for i, photo in enumerate(tiny.photos(2)):
        photo.save(tmp_path / "photos" / f"{i}.png")
        photo.save(tmp_path / "broken" / f"{i}.png")
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    (tmp_path / "broken" / "1.png").write_bytes((tmp_path / "broken" / "1.png").read_bytes()[:40])
    (tmp_path / "file").write_text("in the way")
    fields = {"model": str(model), "images": str(tmp_path / "photos"), "class_noun": "owl", "prompt": "a sketch of [V]"}
    return {**fields, "output_dir": str(tmp_path / "out"), "steps": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Any attempt to load weights fails the test with an error of another kind."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("palp_fast.models.load_components", refuse)


def snapshot(folder):
    files = {}
    for root, folders, names in os.walk(folder):
        files |= {os.path.join(root, name): None for name in folders}
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                files[path] = (os.stat(path).st_mtime_ns, file.read())
    return files


def two_subjects(folder, placeholder):
    both = [Subject(folder, "owl", "[V1]"), Subject(folder, "cat", placeholder, f"a photo of {placeholder}")]
    return {"images": None, "class_noun": None, "subjects": both, "prompt": "[V1] and [V2]"}


CASES = {
    "missing folder": (lambda t: {"images": str(t / "nowhere")}, ConfigError, r"^images: .*nowhere' does not exist"),
    "missing file": (lambda t: {"images": [str(t / "no.png")]}, ConfigError, r"^images: .*no.png' does not exist"),
    "no image": (lambda t: {"images": str(t / "empty")}, ConfigError, "^images: no image in folder .*empty"),
    "no photos at all": (lambda t: {"images": []}, ConfigError, "^images: the list is empty"),
    "unreadable image": (lambda t: {"images": str(t / "broken")}, DataError, r"image .*broken.1\.png' cannot be read"),
    "no placeholder": (lambda t: {"prompt": "a sketch"}, ConfigError, r"^prompt: no placeholder \[V\] in 'a sketch'"),
    "unknown placeholder": (lambda t: {"prompt": "a [W]"}, ConfigError, r"^prompt: unknown placeholder \[W\]"),
    "repeated placeholder": (lambda t: {"prompt": "[V] [V]"}, ConfigError, r"^prompt: placeholder \[V\] is repeated"),
    "placeholder defined twice": (
        lambda t: two_subjects(str(t / "photos"), "[V1]"), ConfigError, r"^subjects: placeholder '\[V1\]'"),
    "placeholder not defined": (
        lambda t: two_subjects(str(t / "photos"), "[V3]"), ConfigError, r"^prompt: unknown placeholder \[V2\]"),
    "prompt too long": (lambda t: {"prompt": "a [V]" + " and a cat" * 9}, ConfigError, "^prompt: .* at most 16"),
    "subject prompt too long": (
        lambda t: {"subject_prompt": "[V]" + " photo" * 20}, ConfigError, "^subject_prompt: .* at most 16"),
    "clean prompt too long": (lambda t: {"clean_prompt": "owl " * 20}, ConfigError, "^clean_prompt: .* at most 16"),
    "negative prompt too long": (
        lambda t: {"method": "nfsd", "negative_prompt": "owl " * 20}, ConfigError, "^negative_prompt: .* at most 16"),
    "alpha zero": (lambda t: {"alpha": 0}, ConfigError, "^alpha: 0 is not allowed; allowed: a finite number > 0"),
    "alpha negative": (lambda t: {"alpha": -7.5}, ConfigError, "^alpha: -7.5 is not allowed"),
    "rank zero": (lambda t: {"rank": 0}, ConfigError, "^rank: 0 is not allowed; allowed: an integer >= 1"),
    "unknown field": (lambda t: {"batch": 2}, ConfigError, "^batch: unknown field .* .did you mean 'batch_size'"),
    "output under a file": (
        lambda t: {"output_dir": str(t / "file" / "out")}, ConfigError, "^output_dir: .*file' is not a folder"),
    "output is a file": (lambda t: {"output_dir": str(t / "file")}, ConfigError, "^output_dir: .* is not a folder"),
    "unknown model": (lambda t: {"model": "emoji-46"}, ConfigError, "^model: unknown model 'emoji-46'; did you"),
    "folder without a model": (lambda t: {"model": str(t / "photos")}, ConfigError, "^model: .*photos' is neither"),
    "unknown preset": (lambda t: {"preset": "papers"}, ConfigError, "^preset: 'papers' is not allowed; allowed: N"),
    "token the model knows": (lambda t: {"token": "owl"}, ConfigError, "^token: 'owl'"),
    "resolution the model has not": (lambda t: {"resolution": 12}, ConfigError, "^resolution: 12"),
    "nothing to resume": (lambda t: {"resume": "must"}, ConfigError, "^resume: 'must'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error_and_nothing_written(inputs, tmp_path, case):
    change, kind, message = CASES[case]
    before = snapshot(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        palp_fast.train(**{**inputs, **change(tmp_path)})
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("field", ["model", "prompt", "output_dir"])
def test_missing_fields(inputs, tmp_path, field):
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=f"^{field}: missing"):
        palp_fast.train(**{name: value for name, value in inputs.items() if name != field})
    assert snapshot(tmp_path) == before


def test_the_same_checks_with_a_config_object(inputs, tmp_path):
    config = palp_fast.TrainConfig(**inputs)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="^prompt: no placeholder"):
        palp_fast.train(config, prompt="a sketch")
    with pytest.raises(ConfigError, match="^rank: 0"):
        palp_fast.train(config, rank=0)
    with pytest.raises(DataError, match="PIL image of 4 x 4"):
        palp_fast.Trainer(config.replace(images=[BrokenImage()]))
    assert snapshot(tmp_path) == before


class BrokenImage(Image.Image):
    """A picture whose file turned out to be cut off when its pixels were wanted."""

    size = property(lambda self: (4, 4))
    mode = "RGB"

    def load(self):
        raise OSError("image file is truncated")


def test_the_right_input_gets_as_far_as_loading(inputs):
    with pytest.raises(AssertionError, match="weights were loaded"):
        palp_fast.train(**inputs)
