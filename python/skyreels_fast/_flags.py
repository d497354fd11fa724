"""The flags of the two commands: what they are called, what they become, how --help teaches them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ._values import UsageError
from .config import DTYPES
from .prompts import read_prompts
from .request import Request

FIELDS = {field.name: field.name for field in dataclasses.fields(Request) if field.init}
# How each command may be called; the first where it goes by another name.
PROGRAMS = {"df": ("generate_video_df.py", "skyreels-fast-df"), "t2v": ("generate_video.py", "skyreels-fast")}
_SCRIPTS = tuple(names[1] for names in PROGRAMS.values())
FIELDS |= {"video": "video_path", "prompts": "prompt_file"}  # field of a Request: flag, where they differ
# Fields inside a message: with a value, with a name that is no English word, or where the message asks for them.
_FLAGGED = [name for name in FIELDS if name not in ("context", "negative_context", "clip_features")]
_NAMES = "|".join(sorted(_FLAGGED, key=len, reverse=True))
_COMPOUNDS = "|".join(sorted((name for name in _FLAGGED if "_" in name), key=len, reverse=True))
_QUOTED = re.compile(r"""((?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*")""")
_MENTION = re.compile(
    rf"(?<![\w./-])(?:(?P<set>{_NAMES})=|(?P<compound>{_COMPOUNDS})(?![\w/=-]|\.\w)"
    rf"|(?P<verb>needs|without|give) (?P<word>{_NAMES})(?![\w/=.-])(?P<more> and width\b)?)"
)

# How many work on a run and how: as well another number of them may go on with it.
ABOUT_USP = ("use_usp", "ulysses_degree", "ring_degree", "cfg_parallel", "no_cfg_parallel")

_DF_EXAMPLES = """examples:
  a try-out with the bundled model, on any machine
    generate_video_df.py --model_id tiny --prompt "a red circle moving right on a black background"
  four seconds from text
    generate_video_df.py --model_id Skywork/SkyReels-V2-DF-14B-540P --prompt "..." --seed 42
  from a first frame, or from a first to a last one
    generate_video_df.py --prompt "..." --image first.png --end_image last.png
  ten seconds, window by window
    generate_video_df.py --prompt "..." --num_frames 257 --overlap_history 17 --addnoise_condition 20
  the same, its frames denoised one after another
    generate_video_df.py --prompt "..." --num_frames 257 --overlap_history 17 --ar_step 5 --causal_block_size 5
  a video, continued
    generate_video_df.py --prompt "..." --video_path in.mp4 --num_frames 121 --overlap_history 17
  a story: a prompt for each window, from a file with one a line
    generate_video_df.py --prompt_file story.txt --num_frames 577 --overlap_history 17
  a run that broke off, continued
    generate_video_df.py --resume result/diffusion_forcing/NAME.run
  on eight GPUs
    torchrun --nproc_per_node=8 generate_video_df.py --use_usp --seed 42 --prompt "..."
"""
_T2V_EXAMPLES = """examples:
  four seconds from text
    generate_video.py --model_id Skywork/SkyReels-V2-T2V-14B-540P --prompt "..." --seed 42
  from a first frame, as recommended for I2V
    generate_video.py --model_id Skywork/SkyReels-V2-I2V-14B-540P --image first.png --guidance_scale 5 --shift 3
  on a GPU that does not hold the model
    generate_video.py --model_id Skywork/SkyReels-V2-T2V-14B-720P --resolution 720P --offload --prompt "..."
  a run that broke off, continued
    generate_video.py --resume result/video_out/NAME.run
  on eight GPUs
    torchrun --nproc_per_node=8 generate_video.py --use_usp --seed 42 --prompt "..."
"""


class Parser(argparse.ArgumentParser):
    """Reports an error by raising UsageError with one line, in place of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parse a command line, values that begin with a minus sign included. Raises UsageError."""
        words: list[str] = []
        for word in argv:
            if words and words[-1] in self._takes_value() and word[:1] == "-" and word[:2] != "--":
                words[-1] += f"={word}"
            else:
                words.append(word)
        args, unknown = self.parse_known_args(words)
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]}; {self._hint(unknown[0].partition('=')[0])}")
        return args

    def _hint(self, word: str) -> str:
        if any(f"--{flag.name}" == word for flags in FLAGS.values() for flag in flags):
            return f"{PROGRAMS['df'][self.prog in _SCRIPTS]} has it"
        near = difflib.get_close_matches(word, self._option_string_actions, 1) if word[:1] == "-" else []
        return f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the flags"

    def _takes_value(self) -> set[str]:
        return {name for name, action in self._option_string_actions.items() if action.nargs is None}


class Flag(NamedTuple):
    """One flag: what its value stands for (None: it takes none), and whether diffusion forcing alone has it."""

    name: str
    value: str | None
    help: str
    df: bool = False


FLAGS = {
    "what to show": (
        Flag("prompt", "TEXT", "what the video shows (default: the model's example)"),
        Flag("prompt_file", "FILE", "prompts over time: a line for each window (the last stays), or FRAME: PROMPT "
             "lines, each from that frame on; empty lines and # comments are free", df=True),
        Flag("negative_prompt", "TEXT", "what it shall not show (default: the published one)"),
        Flag("prompt_enhancer", None, "first let a language model, Qwen2.5-32B-Instruct, put the prompt into detail"),
        Flag("image", "FILE", "first frame, cropped to the video's shape; a portrait one makes a portrait video"),
        Flag("end_image", "FILE", "last frame; needs --image", df=True),
        Flag("video_path", "FILE", "video to continue, at its own frame rate; needs --overlap_history, frames that "
             "--num_frames counts", df=True),
    ),
    "size and length": (
        Flag("resolution", "NAME", "540P (960x544) or 720P (1280x720) (default: the model's own)"),
        Flag("height", "PIXELS", "a multiple of 16; with --width, in place of --resolution"),
        Flag("width", "PIXELS", "a multiple of 16; with --height, in place of --resolution"),
        Flag("num_frames", "N", "frames of the video, 4k + 1 (default: the model's, else 97)"),
        Flag("base_num_frames", "N", "frames in one window, 4k + 1 (default: the model's, else 97)", df=True),
        Flag("overlap_history", "N", "frames that windows share, 4k + 1, usually 17 or 37; a video longer than "
             "--base_num_frames needs it", df=True),
        Flag("fps", "RATE", "frames a second (default: the model's, else 24)"),
    ),
    "sampling": (
        Flag("seed", "N", "the same seed makes the same video (default: a random one)"),
        Flag("inference_steps", "N", "quality for time; 50 is recommended (default: the model's, else 30)"),
        Flag("guidance_scale", "X", "how closely to follow the prompt; 1 halves the work (default: the model's or 6)"),
        Flag("shift", "X", "how long to stay at high noise (default: the model's, else 8)"),
        Flag("ar_step", "N", "steps that a block of frames is behind the last one; 5 is usual (default: 0)", df=True),
        Flag("causal_block_size", "N", "latent frames in a block; 5 goes with --ar_step 5 (default: 1)", df=True),
        Flag("causal_attention", None, "no block sees a later one; the released models are not made for it", df=True),
        Flag("addnoise_condition", "N", "noise on given frames; 20 steadies long videos (default: 0)", df=True),
    ),
    "faster, with another result": (
        Flag("teacache", None, "pass over steps that change little"),
        Flag("teacache_thresh", "X", "how much change to pass over; 0.3 is faster, 0.1 closer (default: 0.2)"),
        Flag("use_ret_steps", None, "compute the first five steps whatever they change, and judge by the modulation"),
        Flag("teacache_coefficients", "A,B,...", "polynomial for a model without a published one, highest power first"),
    ),
    "model and machine": (
        Flag("model_id", "MODEL", 'directory, Hugging Face id, or "tiny", the bundled model (default: %(default)s)'),
        Flag("device", "NAME", "cuda, cuda:N or cpu (default: cuda where there is one)"),
        Flag("dtype", "TYPE", "bfloat16, float16 or float32 (default: bfloat16 on cuda, float32 on cpu)"),
        Flag("vae_dtype", "TYPE", "the same for the VAE alone (default: bfloat16 on cuda, float32 on cpu)"),
        Flag("attention", "NAME", "fa3, fa4, fa2, cudnn, flash, sdpa, or ref, the formula in plain torch (default: the "
             "fastest there is)"),
        Flag("offload", None, "stream all blocks from host memory: least GPU memory, the same result"),
        Flag("vram", "GIB", "GPU memory to denoise in: blocks that fit stay there, the others are streamed"),
    ),
    "several GPUs": (
        Flag("use_usp", None, "one video from all GPUs that torchrun has started a process for; needs --seed"),
        Flag("ulysses_degree", "N", "GPUs that split the attention heads (default: as many as the heads allow)"),
        Flag("ring_degree", "N", "GPUs that pass keys and values round (default: what --ulysses_degree leaves)"),
        Flag("cfg_parallel", None, "half of the GPUs for each guidance branch (default with an even number)"),
        Flag("no_cfg_parallel", None, "all GPUs for one branch, then for the other"),
    ),
    "output": (
        Flag("save_every", "SECONDS", "how often to save a window in progress (default: 60); a signal saves it, too"),
        Flag("outdir", "NAME", "save as result/NAME/PROMPT_SEED_TIME.mp4 (default: %(default)s)"),
        Flag("output", "FILE", "save as this .mp4 instead, replacing any; the settings go beside it as .json"),
        Flag("resume", "FOLDER", "go on with the broken-off run that left this NAME.run folder beside its NAME.mp4; "
             "other flags are as they were"),
    ),
}  # fmt: skip


def parser(program: str, mode: str) -> Parser:
    """The flags of generate_video_df.py (mode "df") or generate_video.py ("t2v"), under the name `program`."""
    df = mode == "df"
    made = Parser(
        prog=program,
        usage="%(prog)s [--prompt TEXT] [--model_id MODEL] [flags]",
        description=f"Render a video with a SkyReels-V2 {'diffusion forcing' if df else 'T2V or I2V'} model.",
        epilog=_examples(program, mode),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = {"N": _whole, "PIXELS": _whole, "X": _real, "RATE": _real, "A,B,...": _reals}
    kinds |= {"TYPE": _dtype, "GIB": _gib, "SECONDS": _seconds}
    for title, flags in FLAGS.items():
        group = made.add_argument_group(title)
        for flag in flags:
            if flag.df and not df:
                continue
            if flag.value is None:
                group.add_argument(f"--{flag.name}", action="store_true", default=None, help=flag.help)
            else:
                kind = kinds.get(flag.value, str)
                group.add_argument(f"--{flag.name}", type=kind, metavar=flag.value, help=flag.help)
    made.set_defaults(
        outdir="diffusion_forcing" if df else "video_out",
        model_id=f"Skywork/SkyReels-V2-{'DF-1.3B' if df else 'T2V-14B'}-540P",
        offload=False,
    )
    return made


def _examples(program: str, mode: str) -> str:
    """The examples under the name that the command was called by."""
    script, by_torchrun = PROGRAMS[mode][0], " ".join(_for_torchrun(program))
    examples = _DF_EXAMPLES if mode == "df" else _T2V_EXAMPLES
    return examples.replace(f"    {script}", f"    {program}").replace(f"8 {script}", f"8 {by_torchrun}")


def _for_torchrun(program: str) -> list[str]:
    return [program] if program.endswith(".py") else ["--no-python", program]


def with_flags(message: str) -> str:
    """A message about fields as one about flags: `video='x.mp4': needs image` is `--video_path 'x.mp4': needs --image`.

    What stands in quotes is the user's and stays, as does what a model's file says.
    """
    if message.startswith("generation_config.json "):
        return message
    head = re.match(rf"({_NAMES})(?=: )", message)
    start = f"--{FIELDS[head[1]]}" if head else ""
    parts = _QUOTED.split(message[head.end() :] if head else message)
    return start + "".join(part if i % 2 else _MENTION.sub(_as_flag, part) for i, part in enumerate(parts))


def _as_flag(found: re.Match[str]) -> str:
    if found["set"]:
        return f"--{FIELDS[found['set']]} "
    if found["compound"]:
        return f"--{FIELDS[found['compound']]}"
    return f"{found['verb']} --{FIELDS[found['word']]}{' and --width' if found['more'] else ''}"


def check_together(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that exclude each other."""
    check_usp(args)
    if args.prompt_enhancer and getattr(args, "prompt_file", None):
        raise UsageError("--prompt_enhancer works on --prompt alone: enhance the lines of --prompt_file beforehand "
                         "with python -m skyreels_fast.enhance")  # fmt: skip
    if args.resume and args.output:
        raise UsageError("--resume goes on with the run's own video: leave out --output")


def launched(program: str) -> list[str]:
    """How this program was started: by python or by itself, or by torchrun with as many processes as there are."""
    here, hosts = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    if not here:
        return ["python", program] if program.endswith(".py") else [program]
    endpoint = f"--rdzv_endpoint={os.environ.get('MASTER_ADDR', 'HOST')}:29500"
    hosts = [f"--nnodes={hosts}", "--rdzv_backend=c10d", endpoint, "--rdzv_id=1"] if hosts > 1 else []
    return ["torchrun", *hosts, f"--nproc_per_node={here}", *_for_torchrun(program)]


def check_usp(args: argparse.Namespace) -> None:
    """Raises UsageError where several processes, or the flags about them, do not go with the others."""
    about = [name for name in ABOUT_USP if name != "use_usp" and getattr(args, name)]
    if not args.use_usp:
        if about:
            raise UsageError(f"--{about[0]} needs --use_usp")
        if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
            raise UsageError(f"{processes} processes would each render the same video; give --use_usp, or leave out "
                             "torchrun")  # fmt: skip
        return
    for name in ("ulysses_degree", "ring_degree"):
        if isinstance(degree := getattr(args, name), str):
            raise UsageError(f"--{name} {degree!r}: must be a whole number of 1 or more")
    if args.cfg_parallel and args.no_cfg_parallel:
        raise UsageError("--cfg_parallel and --no_cfg_parallel exclude each other; leave one out")
    if args.seed is None and not args.resume:
        raise UsageError("--use_usp needs --seed: all GPUs must start from the same noise")
    if args.prompt_enhancer:
        raise UsageError("--use_usp and --prompt_enhancer exclude each other: enhance the prompt beforehand with "
                         "python -m skyreels_fast.enhance")  # fmt: skip


def request_values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Request that a command line gives. Raises RequestError for a prompt file that is wrong."""
    values = {field: getattr(args, flag, None) for field, flag in FIELDS.items()}
    # The reference's own default for "no file" is an empty string.
    absent = {"image": "", "end_image": "", "video": ""}
    values = {name: value for name, value in values.items() if value is not None and absent.get(name) != value}
    if "prompts" in values:
        values["prompts"] = read_prompts(values["prompts"])
    return values


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text  # Request says what is wrong with it

    return convert


_whole, _real = _number(int), _number(float)


def _reals(text: str) -> Any:
    values = tuple(_real(item.strip()) for item in text.split(","))
    return text if any(isinstance(value, str) for value in values) else values


def _seconds(text: str) -> float:
    value = _real(text)
    if isinstance(value, str) or not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, 0 or more")
    return value


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return text


def _gib(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB") from None
