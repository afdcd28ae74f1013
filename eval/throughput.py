"""How fast is it? Measures the parts of a training job side by side with what they replace, in one run.

    python eval/throughput.py data --data shards/train                          about two minutes on two cores
    python eval/throughput.py data --data shards/train --enlarge 375 --workers 0,2,4,8 --figure loading.png
    python eval/throughput.py kernels --suite full --figure kernels.png         about seven minutes on one GPU
    python eval/throughput.py step --data shards/train --compile true --workers 14 --figure step.png     one GPU
    python eval/throughput.py scaling --processes 1,2,4,8 --figure scaling.png                          eight GPUs
    python eval/throughput.py attack --figure attack.png                        some minutes on one GPU
    python eval/throughput.py attack --device cpu                               four minutes on one CPU core
    python eval/throughput.py certify --device cpu                              three minutes on one CPU core
    python eval/throughput.py visualize --device cpu                            six minutes on one CPU core
    python eval/throughput.py forecast --images_per_second 4500                 at once; a model of 8, 64, 512 GPUs
    python eval/throughput.py probe --figure probe.png                          about a minute on one GPU
    python eval/throughput.py probe --device cpu --heads 48 --precision fp32    ten minutes on one CPU core

`data` compares decoding one image at a time (one thread, images per CPU second of one core):
    published   Pillow, then torchvision's RandomResizedCrop, flip, ToTensor and Normalize on the CPU, as the papers do
    pil         data/transforms.py with decoder `pil`: the bit-exact reference; uint8 out
    ours        data/transforms.py as it is by default; uint8 out
and whole pipelines from shards on disk to batches, for each number of workers (images per second of wall time, and per
CPU second of all processes together):
    webdataset  WebDataset, shuffle buffer and DataLoader, with the same decoding as `ours`
    ours        data/stream.py
further reading without decoding, and the PSNR of `ours` against `pil` with equal crops. The competitors take turns
within each round and ratios are formed within a round, so that a busy machine slows both sides of a ratio; the figures
are medians over rounds with the 20th and 80th percentile. Every worker runs one thread. Needs Linux (reads /proc).

`kernels` compares the fused operations of kernels/ with eager PyTorch, torch.compile and their peers, each against a
floor computed from the device's measured rates and against its targets; kernels/bench.py says how. Ends with 1 if ours
failed anywhere. With --device cpu it only rehearses, on small shapes.

`step` compares a whole optimiser step of distillation, taken by the code of train/distill.py, with one written as the
published code has it (float32, channels first, the loss read at every step), on synthetic images and, with --data, on
streamed ones, after checking that both have the same losses. It says what share each part takes, what share of the
measured rate of matrix products the step reaches (MFU), how long the device waits for data, what a checkpoint costs.

`scaling` takes the same step on several processes of this machine: efficiency, what the exchange of gradients costs
beside the backward pass, the vote before each step. `forecast` computes from such figures what 8, 64 and 512 GPUs need.

`attack` compares PGD of several steps (attacks/pgd.py) with the loops of torchattacks and of the SmoothAdv code, after
checking that all make the same attack; eval/attacking.py says how. `certify` compares randomised smoothing
(attacks/smoothing.py) with the original's loop at several batch sizes, on one image, after checking that both networks
say the same about noisy copies; eval/certifying.py says how. `visualize` compares the search for the images of 64
channels (eval/activation.py) with the published one, channel by channel; eval/visualizing.py says how.

`probe` compares a grid of linear heads trained at once (train/heads.py) with the same heads trained one after the other
from the same cached features, with torch.optim.AdamW as it is by default and fused, after checking that both give the
same weights; by CPU time of one thread, or by wall time on a GPU. It also writes, opens and reads a cache of a tenth of
ImageNet's size (--cache_samples).

Each number becomes a row of --rows, with its provenance; the table and the figure are made from the same rows.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, restricted_string_type

from data.command import Parser
from eval import attacking, certifying, forecast, loading, operations, scaling, stepping, sweep, visualizing
from eval.common import run_script

WorkerCounts = restricted_string_type("WorkerCounts", r"^[0-9]+(,[0-9]+)*$", "numbers such as 0,1,2")
Counts = restricted_string_type("Counts", r"^[1-9][0-9]*(,[1-9][0-9]*)*$", "numbers such as 8,52")
_MODELS, _ATTACKS = ("|".join(names) for names in (attacking.SIZES["cuda"], attacking.ATTACKS))
ModelNames = restricted_string_type("ModelNames", rf"^({_MODELS})(,({_MODELS}))*$", "names of attacked models")
AttackNames = restricted_string_type("AttackNames", rf"^({_ATTACKS})(,({_ATTACKS}))*$", "names of attacks")


def parse(arguments: Sequence[str] | None = None) -> Any:
    """Reads the command line; a wrong one exits with 2 and one line."""
    parser = Parser(
        prog="eval/throughput.py", description="Measures parts of a training job against what they replace."
    )
    commands = parser.add_subcommands()
    commands.add_subcommand("data", _data())
    commands.add_subcommand("kernels", _kernels())
    commands.add_subcommand("probe", _probe())
    commands.add_subcommand("attack", _attack())
    commands.add_subcommand("certify", _certify())
    commands.add_subcommand("visualize", _visualize())
    commands.add_subcommand("step", _step())
    commands.add_subcommand("scaling", _scaling())
    commands.add_subcommand("forecast", _forecast())
    return parser.parse_args(arguments)


def _command(description: str, default: object) -> tuple[Parser, Callable[[str, Any, str], None]]:
    """A subcommand, and what adds a flag to it by name, type and help; defaults are fields of `default`."""
    command = Parser(description=description)

    def add(name: str, kind: Any, text: str) -> None:
        command.add_argument(f"--{name}", type=kind, default=getattr(default, name), help=text)

    return command, add


def _data() -> Parser:
    default = loading.Config()
    command = Parser(description="Image loading against the published pipeline and plain webdataset.")
    command.add_argument("--data", type=str, default=default.data, help="shards, or `demo` for the built-in digits")
    command.add_argument("--workers", type=WorkerCounts, default="0,1,2", help="numbers of worker processes to measure")
    command.add_argument("--images", type=PositiveInt, default=default.images, help="images in each run")
    command.add_argument("--rounds", type=PositiveInt, default=default.rounds, help="runs of each competitor, in turns")
    command.add_argument("--size", type=PositiveInt, default=default.size, help="side of the decoded images, pixels")
    command.add_argument(
        "--enlarge",
        type=NonNegativeInt,
        default=default.enlarge,
        help="short side in pixels to re-encode at first, quality 95 (0: as they are)",
    )
    command.add_argument("--rows", type=str, default=default.rows, help="file that the results are appended to")
    command.add_argument("--figure", type=str, default=default.figure, help="image file to draw (empty: none)")
    return command


def _kernels() -> Parser:
    command, add = _command(
        "Fused operations against eager PyTorch, torch.compile and their peers.", operations.Config()
    )
    add("operation", Literal["all", "distill_loss", "pgd_step", "probe_loss"], "operation to measure")
    add("suite", Literal["full", "quick"], "all shapes, or the few that tell most; a CPU has the quick one only")
    add("device", Literal["cuda", "cpu"], "where; a CPU runs small shapes")
    add("compile", Literal["auto", "yes", "no"], "whether torch.compile takes part (auto: on a GPU)")
    add("max_autotune", bool, "whether its mode max-autotune takes part too: half a minute for each case")
    add("rounds", PositiveInt, "runs of each competitor, in turns")
    add("minutes", PositiveFloat, "no case is begun after that many")
    add("rows", str, "file that the results are appended to")
    add("figure", str, "image file to draw, .png, .pdf or .svg (empty: none)")
    return command


def _probe() -> Parser:
    command, add = _command(
        "A grid of linear heads against the same heads trained one after the other.", sweep.Config()
    )
    add("device", Literal["cuda", "cpu"], "where; a CPU's one thread")
    command.add_argument("--heads", type=Counts, default="8,52", help="sizes of the grid, a measurement each")
    command.add_argument(
        "--precision", type=Literal["both", "fp32", "bf16"], default="both", help="types of the products"
    )
    add("classes", PositiveInt, "classes of a head")
    add("width", PositiveInt, "features of a sample")
    add("batch_size", PositiveInt, "rows of a step")
    add("steps", PositiveInt, "steps of a training")
    add("rounds", PositiveInt, "runs of each competitor, in turns")
    add("cache_samples", NonNegativeInt, "samples of the cache that is written and read (0: none)")
    add("rows", str, "file that the results are appended to")
    add("figure", str, "image file to draw, .png, .pdf or .svg (empty: none)")
    return command


def _attack() -> Parser:
    command, add = _command("Whole PGD attacks against the loops of torchattacks and SmoothAdv.", attacking.Config())
    add("device", Literal["cuda", "cpu"], "where; a CPU's one thread, on small batches")
    default = attacking.Config()
    models, attacks = ",".join(default.models), ",".join(default.attacks)
    command.add_argument("--models", type=ModelNames, default=models, help=f"of {', '.join(attacking.SIZES['cuda'])}")
    command.add_argument("--attacks", type=AttackNames, default=attacks, help=f"of {', '.join(attacking.ATTACKS)}")
    add("steps", PositiveInt, "steps of an attack")
    add("batch_size", NonNegativeInt, "images of a batch (0: as many as suit model and device)")
    add("bf16", Literal["auto", "yes", "no"], "whether bf16 takes part (auto: where the processor multiplies it)")
    add("compile", Literal["auto", "yes", "no"], "whether torch.compile takes part, with bf16 (auto: on a GPU)")
    add("rounds", PositiveInt, "runs of each competitor, in turns")
    add("rows", str, "file that the results are appended to")
    add("figure", str, "image file to draw, .png, .pdf or .svg (empty: none)")
    return command


def _certify() -> Parser:
    command, add = _command("Certification of an image against the loop of Cohen et al.", certifying.Config())
    add("device", Literal["cuda", "cpu"], "where; a CPU's one thread")
    add("model", Literal["cifar_resnet20", "cifar_resnet110", "cifar_resnet18"], "network; weights are random")
    add("n0", PositiveInt, "noisy copies that select the class")
    add("n", PositiveInt, "noisy copies that are counted")
    command.add_argument("--batch_sizes", type=Counts, default="25,50,100", help="of the original's loop")
    add("bf16", Literal["auto", "yes", "no"], "whether bf16 takes part (auto: where the processor multiplies it)")
    add("compile", bool, "whether torch.compile takes part")
    add("rounds", PositiveInt, "runs of each competitor, in turns")
    add("rows", str, "file that the results are appended to")
    return command


def _visualize() -> Parser:
    command, add = _command("Feature visualisation against the published loop.", visualizing.Config())
    add("device", Literal["cuda", "cpu"], "where; a CPU's one thread")
    add("model", str, "network for images in colour, as for eval/visualize.py; without /FILE its weights are random")
    add("channels", PositiveInt, "channels of the last convolution")
    add("share", PositiveInt, "the published searches take one in so many of their steps, and their time is multiplied")
    add("steps", PositiveInt, "of the default search")
    add("rounds", PositiveInt, "runs of each competitor, in turns")
    add("rows", str, "file that the results are appended to")
    return command


def _step() -> Parser:
    command, add = _command("A whole step of distillation against the published one.", stepping.Config())
    add("teacher", str, "teacher architecture; weights are random, speed does not depend on them")
    add("student", str, "student architecture (empty: the teacher's)")
    add("data", str, "shards to stream, `demo` for the built-in digits (empty: synthetic images only)")
    add("device", Literal["cuda", "cpu"], "where; a CPU's one thread")
    add("precision", Literal["bf16", "no"], "mixed precision of ours; the published step is float32")
    add("compile", bool, "torch.compile of teacher and student of ours")
    add("batch_size", PositiveInt, "images of a step")
    add("workers", NonNegativeInt, "decoding processes")
    add("steps", PositiveInt, "timed steps of a run")
    add("rounds", PositiveInt, "runs of each way, in turns")
    add("rows", str, "file that the results are appended to")
    add("figure", str, "image file to draw, .png, .pdf or .svg (empty: none)")
    return command


def _scaling() -> Parser:
    command, add = _command("The same step on several processes of this machine.", scaling.Config())
    command.add_argument("--processes", type=Counts, default="1,2", help="numbers of processes, 1 among them")
    add("teacher", str, "architecture of teacher and student; weights are random")
    add("device", Literal["cuda", "cpu"], "where; on a CPU one thread for each process")
    add("precision", Literal["bf16", "no"], "mixed precision")
    add("batch_size", PositiveInt, "images of a step on each process")
    add("steps", PositiveInt, "timed steps of a run")
    add("rounds", PositiveInt, "starts of each number of processes")
    add("rows", str, "file that the results are appended to")
    add("figure", str, "image file to draw, .png, .pdf or .svg (empty: none)")
    return command


def _forecast() -> Parser:
    command, add = _command("Where a job of many GPUs is bound, from what one machine measured.", forecast.Config())
    command.add_argument("--gpus", type=Counts, default="8,64,512", help="numbers of GPUs")
    add("gpus_per_node", PositiveInt, "GPUs of a machine")
    add("images_per_second", PositiveFloat, "rate of one GPU (`step`)")
    add("batch_size", PositiveInt, "images of a step on each GPU")
    add("parameters", PositiveFloat, "trained parameters")
    add("cores", PositiveInt, "CPU cores for each GPU")
    add("decoded_per_core", PositiveFloat, "images that a core decodes in a second (`data`)")
    add("image_kb", PositiveFloat, "mean size of an image file, kB")
    add("images", PositiveInt, "images of the training set")
    add("shards", PositiveInt, "its shards")
    add("store_gb", PositiveFloat, "what the store of shards gives in all, GB/s")
    add("nvlink_gb", PositiveFloat, "all-reduce bandwidth within a machine, GB/s (`scaling`)")
    add("network_gb", PositiveFloat, "bandwidth between two machines, GB/s")
    add("message_ms", PositiveFloat, "a small message between two processes, ms (half of a vote of two, `scaling`)")
    add("disk_mb", PositiveFloat, "rate at which a checkpoint is written, MB/s (`step`)")
    add("save_every", PositiveInt, "steps between checkpoints")
    add("gpu_hours_per_failure", PositiveFloat, "GPU hours between two failures")
    add("restart_minutes", PositiveFloat, "minutes from a failure until the job steps again")
    return command


def main(arguments: Sequence[str] | None = None) -> object:
    """Runs one measurement."""
    parsed = parse(arguments)
    options = parsed[parsed.subcommand].as_dict()
    if parsed.subcommand == "kernels":
        return operations.main(operations.Config(**options))
    if parsed.subcommand == "forecast":
        gpus = tuple(sorted({int(count) for count in options.pop("gpus").split(",")}))
        return forecast.main(forecast.Config(gpus=gpus, **options))
    if parsed.subcommand == "scaling":
        processes = tuple(sorted({int(count) for count in options.pop("processes").split(",")}))
        return scaling.main(scaling.Config(processes=processes, **options))
    if parsed.subcommand == "step":
        return stepping.main(stepping.Config(**options))
    if parsed.subcommand == "probe":
        heads = tuple(dict.fromkeys(int(count) for count in options.pop("heads").split(",")))
        precision = ("fp32", "bf16") if options["precision"] == "both" else (options["precision"],)
        return sweep.main(sweep.Config(heads=heads, **{**options, "precision": precision}))
    if parsed.subcommand == "attack":
        models, attacks = (tuple(dict.fromkeys(options.pop(name).split(","))) for name in ("models", "attacks"))
        return attacking.main(attacking.Config(models=models, attacks=attacks, **options))
    if parsed.subcommand == "certify":
        sizes = tuple(sorted({int(size) for size in options.pop("batch_sizes").split(",")}))
        return certifying.main(certifying.Config(batch_sizes=sizes, **options))
    if parsed.subcommand == "visualize":
        return visualizing.main(visualizing.Config(**options))
    workers = tuple(sorted({int(count) for count in options.pop("workers").split(",")}))
    return loading.main(loading.Config(workers=workers, **options))


if __name__ == "__main__":
    run_script(main)
