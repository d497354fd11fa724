"""What the bundled model can be asked for: its prompts, the combinations held out from training, its tokenizer."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

# sRGB, 0..255; object colours lie at least 100 apart, and each at least 110 from every background.
COLOURS = {
    "red": (215, 25, 30),
    "green": (30, 190, 50),
    "blue": (40, 90, 240),
    "yellow": (255, 235, 40),
    "magenta": (225, 40, 205),
    "cyan": (40, 220, 230),
    "orange": (255, 140, 0),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star")
# Unit steps (x, y) with y downwards.
MOTIONS = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "standing still": (0, 0),
}
BACKGROUNDS = {"black": (12, 12, 12), "gray": (105, 105, 105), "dark green": (10, 70, 30), "dark blue": (15, 25, 90)}

PAD, EOS, UNK = 0, 1, 2
SPECIALS = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK}


class Scene(NamedTuple):
    """One combination of the four attributes, by name."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} on a {self.background} background"


ALL_SCENES = tuple(Scene(*names) for names in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS))


def _heldout_scenes() -> tuple[Scene, ...]:
    """Two of the twenty (motion, background) pairs of every (colour, shape) pair: 64 of 640 combinations.

    A Latin-square rule spreads them: every colour is held out 8 times, every shape and background 16,
    every motion 12 or 13, so each attribute and each pair of attributes is still seen in training.
    """
    motions, backgrounds = tuple(MOTIONS), tuple(BACKGROUNDS)
    scenes = []
    for (c, colour), (s, shape), k in itertools.product(enumerate(COLOURS), enumerate(SHAPES), range(2)):
        motion = motions[(c + 2 * s + 3 * k) % len(motions)]
        background = backgrounds[(c // 2 + s + 2 * k) % len(backgrounds)]
        scenes.append(Scene(colour, shape, motion, background))
    return tuple(scenes)


HELDOUT_SCENES = _heldout_scenes()
TRAIN_SCENES = tuple(scene for scene in ALL_SCENES if scene not in set(HELDOUT_SCENES))

_PATTERN = re.compile(
    f"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)}) on a ({'|'.join(BACKGROUNDS)}) background"
)


def parse(prompt: str) -> Scene:
    """The attributes a prompt names.

    Raises ValueError when it is not one of the 640 prompts.
    """
    found = _PATTERN.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if found is None:
        raise ValueError(f"prompt {prompt!r} does not read 'a COLOUR SHAPE MOTION on a BACKGROUND background'")
    return Scene(*found.groups())


def vocabulary() -> dict[str, int]:
    """Word to token id: the three special tokens, then the prompts' words in alphabetical order."""
    words = sorted({word for scene in ALL_SCENES for word in scene.prompt.split()})
    return SPECIALS | {word: len(SPECIALS) + i for i, word in enumerate(words)}


_VOCABULARY = vocabulary()


def token_ids(prompt: str) -> list[int]:
    """What the saved tokenizer gives: lower case, words and runs of punctuation apart, `</s>` at the end."""
    return [_VOCABULARY.get(word, UNK) for word in re.findall(r"\w+|[^\w\s]+", prompt.lower())] + [EOS]


def save_tokenizer(directory: str | Path) -> None:
    """Write a word-level tokenizer that transformers.AutoTokenizer loads from `directory`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "special_tokens_map.json", special)
    write_json(directory / "tokenizer_config.json", config)


def write_json(path: Path, values: dict) -> None:
    """Write a model directory's JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
