"""The judges of the emoji-64 world: what style, background and subjects does a picture show, and does a text say so?

Two networks, trained apart from the generator and never used in its training or sampling. They have seen every
subject, the held-out ones too. `python -m palp_fast.zoo.judge --cache DIR` trains both and measures their ceilings.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from palp_fast.data import pixels
from palp_fast.zoo.judge_nets import JudgeNet, Words, halves
from palp_fast.zoo.render import SIDE
from palp_fast.zoo.world import BACKGROUNDS, STYLES

FOLDER = Path(__file__).parent / "judges"
# name -> (image encoder, seed); the first is what evaluate(encoder="emoji-64") means
JUDGES = {"emoji-64": ("convolutions", 0), "emoji-64-second": ("mixer", 1)}


@dataclass(frozen=True)
class Reading:
    """What a judge sees in n pictures.

    style, background: names, n each; subject: logits [n, judge.subjects]; halves: the same of the left and the right
    half, [n, 2, judge.subjects], where two subjects stand; embedding: unit vectors [n, width].
    """

    style: list[str]
    background: list[str]
    subject: Tensor
    halves: Tensor
    embedding: Tensor


class Judge:
    """A judge: `.images` and `.text` as palp_fast.evaluate wants them, `.read` for the read-outs.

    subjects: names, in the order of the logits; ceilings: its scores on true pictures, palp_fast/zoo/ceilings.py;
    digest: SHA-256 (hex) of its weights.
    """

    def __init__(self, net: JudgeNet, words: Words, subjects: list[str], facts: dict, *, device="cpu", batch=64):
        self.net, self.words = net.eval().requires_grad_(False).to(device), words
        self.subjects, self.device, self.batch = subjects, torch.device(device), batch
        self.ceilings, self.digest = facts.get("ceilings", {}), facts.get("digest", "")

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image] | np.ndarray) -> Reading:
        """Read PIL pictures of any size, or uint8 [n, H, W, 3]."""
        tensors = self._tensors(pictures)
        whole, halved = self._run(tensors), self._run(halves(tensors).flatten(0, 1))
        return Reading(
            _named(STYLES, whole["style"]), _named(BACKGROUNDS, whole["background"]), whole["cell"].logsumexp(2),
            halved["cell"].logsumexp(2).unflatten(0, (-1, 2)), whole["embedding"])

    def _tensors(self, pictures: Sequence[Image.Image] | np.ndarray) -> Tensor:
        return torch.stack([
            pixels(Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.convert("RGB"), SIDE, SIDE)
            for picture in pictures])

    def _run(self, tensors: Tensor) -> dict[str, Tensor]:
        parts = [self.net(part.to(self.device)) for part in tensors.split(self.batch)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """Unit vectors [n, width], fp32 on the CPU."""
        return self._run(self._tensors(pictures))["embedding"]

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [n, width], fp32 on the CPU; words that no caption of the world has count as one."""
        return self.net.embed_text(self.words(prompts).to(self.device)).cpu()


def _named(names: Sequence[str], logits: Tensor) -> list[str]:
    return [names[place] for place in logits.argmax(1).tolist()]


def available(folder: Path = FOLDER) -> list[str]:
    """The judges that were trained and are there."""
    return [name for name in JUDGES if (folder / f"{name}.safetensors").exists()]


def load(name: str = "emoji-64", folder: Path = FOLDER, *, device="cpu", batch: int = 64) -> Judge:
    """The trained judge of that name. Raises FileNotFoundError when it was not trained yet."""
    if name not in available(folder):
        raise FileNotFoundError(f"judge {name!r} is not in {folder}; python -m palp_fast.zoo.judge trains it")
    facts = json.loads((folder / f"{name}.json").read_text())
    net = JudgeNet(facts["encoder"], len(facts["subjects"]), len(Words(facts["words"])))
    weights = folder / f"{name}.safetensors"
    facts["digest"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    state = load_file(weights)
    net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return Judge(net, Words(facts["words"]), facts["subjects"], facts, device=device, batch=batch)


def save(name: str, encoder: str, net: JudgeNet, words: Words, subjects: list[str], folder: Path, **facts) -> None:
    """Write <name>.safetensors (fp16) and <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.half().contiguous() if value.is_floating_point() else value
             for key, value in net.state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")
    known = {"encoder": encoder, **facts, "subjects": subjects, "words": words.vocabulary}
    (folder / f"{name}.json").write_text(json.dumps(known, indent=0) + "\n")


def main() -> None:
    from palp_fast.zoo.judge_training import build

    parser = argparse.ArgumentParser(description="Train both judges and measure their ceilings.")
    parser.add_argument("--cache", type=Path, required=True, help="folder for downloads, pictures and checkpoints")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write the judges to")
    parser.add_argument("--only", choices=tuple(JUDGES), help="train this one alone")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # tiny gradients would slow every pass over them
    for name in [args.only] if args.only else JUDGES:
        build(name, args.cache, args.output)


if __name__ == "__main__":
    main()
