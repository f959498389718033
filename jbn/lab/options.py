"""The options of the commands, each written once: what is typed, what options.json keeps, what the rooms read."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from jbn.lab.kinds import (
    ADDRESS,
    DEVICES,
    EPOCHS,
    FILE_ENDS,
    FILES,
    NOT_NEGATIVE,
    OUT,
    POSITIVE,
    SEED,
    SHARE,
    WARMUP,
    choice,
    file_name,
    whole_number,
)

# One step of gradient descent moves a logit by about learning_rate * |features|^2, and 64x64 positions
# instead of 8x8 give 64 times as many features: at 0.1 the first steps of ``conv64`` are far too long.
DEMO_RATES = {
    "digits": {"dense": 0.1, "conv": 0.1, "conv64": 0.1 / 64},
    "mnist": {"dense": 0.1, "conv": 0.1 * 8**2 / 28**2, "conv64": 0.1 / 64},
}
RATES = {"sgd": 0.05, "adamw": 1e-3}
CHECKPOINT = "The --out of jbn train, for its last checkpoint, or one of its checkpoints: DIR/checkpoints/100."


def option(
    default: Any, help: str, kind: dict[str, Any] | None = None, *, kept: dict[str, Any] | None = None, **more: Any
) -> Any:
    """Return a field that is an option of a command.

    ``kept`` is the kind of what a file of a run may hold of it, where that is more than what one types.
    """
    return field(
        default=default, metadata={"typer": {"help": help, **(kind or {}), **more}, "kept": kept or kind or {}}
    )


def argument(default: Any, help: str, kind: dict[str, Any]) -> Any:
    """Return a field that is the argument of a command; it may be left out where there is a default."""
    return field(default=default, metadata={"typer": {"help": help, "show_default": False} | kind, "argument": True})


def words(value: object) -> str:
    """Return the value of an option, as one types it."""
    return (" ".join(value) or "none") if isinstance(value, tuple) else str(value).removesuffix(".0")


@dataclass(frozen=True)
class Options:
    """What determines the result of a run; the help of a field says what it is."""

    def effect(self, name: str) -> str:
        """Return in words what an option stands for; its default may depend on other options."""
        return words(getattr(self, name))


@dataclass(frozen=True)
class Place:
    """How a run is carried out: its result is the same for any of it; the help of a field says what it is.

    Attributes:
        typed: the names of all options that the command was given, those of ``Options`` too.
    """

    typed: frozenset[str] = field(default=frozenset(), kw_only=True)


@dataclass(frozen=True)
class DemoOptions(Options):
    """What determines the result of ``jbn demo``."""

    model: tuple[str, ...] = option(
        ("dense", "conv"),
        "What to train; may be repeated. dense: two hidden layers. conv: one 3x3 convolution. "
        "conv64: the same on the images enlarged to 64x64x3, which takes minutes.",
        choice(*DEMO_RATES["digits"], "all"),
    )
    data: str = option("digits", "digits: 1797 images of 8x8. mnist: 5000 of MNIST's, of 28x28.", choice(*DEMO_RATES))
    learning_rate: float | None = option(
        None, "Default: 0.1, of a convolution less where images are larger: 0.1/64 for conv64.", POSITIVE
    )
    steps: int = option(400, "Steps per network.", whole_number(1, 100_000))
    # One image has no batch statistics, and of MNIST there are 3000 training images.
    batch_size: int = option(128, "Images per step, 2 to 1077, of mnist to 3000.", whole_number(2, 3000))
    seed: int = option(0, "Seed of the data split, the weights and the order of images.", SEED)

    def __post_init__(self) -> None:
        """Put the models into their order: it does not matter how they were typed."""
        object.__setattr__(
            self, "model", tuple(name for name in DEMO_RATES["digits"] if {name, "all"} & set(self.model))
        )

    def rate(self, model: str) -> float:
        """Return the learning rate of a model."""
        return self.learning_rate or DEMO_RATES[self.data][model]

    def effect(self, name: str) -> str:
        """Return in words what an option stands for."""
        rates = ", ".join(f"{self.rate(model):g} for {model}" for model in self.model)
        return rates if name == "learning_rate" else super().effect(name)


@dataclass(frozen=True)
class DemoPlace(Place):
    """How ``jbn demo`` is carried out."""

    out: Path = option(
        Path("jbn-demo"),
        "Folder of checkpoints, results and figure; must not hold a run already, unless --resume.",
        OUT,
    )
    devices: int = option(
        1, "Devices that share each batch, 1 to 64, simulated on a CPU. The result is the same to rounding.", DEVICES
    )
    resume: bool = option(False, "Go on with the run in --out.")


@dataclass(frozen=True)
class TrainOptions(Options):
    """What determines the result of ``jbn train``, and of one network of the demo.

    Attributes:
        fingerprint: of the data. This and what follows is no option: the data and the demo decide it.
        image_shape: height, width and channels of its images; empty in files of earlier versions, like what follows.
        classes: its largest label and one.
        kind: what its files hold, see ``jbn.lab.data.images.Form``.
        batch_norm: whether ``dense`` and ``conv`` have it.
        momentum: of ``sgd``.
        steps: after which the run ends; None where ``epochs`` tell.
        record: whether it is one for a figure: looked at every few steps, and not ended by a loss that is not finite.
    """

    model: str = option(
        "resnet",
        "dense, conv: the networks of the demo; resnet: three residual blocks.",
        choice("dense", "conv", "resnet"),
        kept=choice(*DEMO_RATES["digits"], "resnet"),
    )
    data: str = option(
        "digits",
        "digits, mnist: as in the demo; or a folder of .npz files with images (n, h, w) or (n, h, w, c), uint8 or "
        "float, and labels (n,).",
        file_name(str, "digits|mnist|DIR", tuple(DEMO_RATES)),
    )
    validation: str | None = option(None, "Folder of images to evaluate on, beside --data.", file_name(str, "DIR"))
    epochs: int = option(10, "Times through the data.", whole_number(1, EPOCHS))
    batch_size: int = option(
        128,
        "Images a step, on all devices together. It decides the result; the number of devices does not.",
        whole_number(2, 2**24),
    )
    optimizer: str = option("sgd", "sgd has Nesterov's momentum 0.9.", choice(*RATES))
    learning_rate: float | None = option(None, "Default: 0.05 for sgd, 0.001 for adamw.", POSITIVE)
    schedule: str = option(
        "cosine", "The learning rate after its warmup: falling to 0, or the same.", choice("cosine", "constant")
    )
    warmup_epochs: float = option(1.0, "Epochs in which the rate grows from 0.", WARMUP)
    weight_decay: float = option(1e-4, "Pulls kernels towards 0; scale and bias are left.", NOT_NEGATIVE, metavar="W")
    augment: tuple[str, ...] = option((), "Change images at random; may be repeated.", choice("shift", "flip"))
    ema: float = option(0.0, "Keep an average of weights too, such as 0.999; 0: none.", SHARE)
    dtype: str = option(
        "float32", "Of the arithmetic; weights and statistics are float32.", choice("float32", "bfloat16")
    )
    seed: int = option(0, "Seed of weights, order and augmentation.", SEED)
    fingerprint: str = ""
    image_shape: tuple[int, ...] = field(default=(), metadata={"kept": whole_number(1, 2**31 - 1)})
    classes: int = 0
    kind: str = ""
    batch_norm: bool = True
    momentum: float = 0.9
    steps: int | None = None
    record: bool = False

    def __post_init__(self) -> None:
        """Put the augmentations into an order: it does not matter how they were typed.

        Files of earlier versions have null where the digits were trained with.
        """
        object.__setattr__(self, "data", self.data or "digits")
        object.__setattr__(self, "augment", tuple(sorted(set(self.augment))))

    @property
    def title(self) -> str:
        """What is trained, in words."""
        return f"{self.model} {'with' if self.batch_norm else 'without'} batch norm"

    @property
    def rate(self) -> float:
        """The learning rate, that of the optimizer unless given."""
        return self.learning_rate or RATES[self.optimizer]

    def effect(self, name: str) -> str:
        """Return in words what an option stands for."""
        return f"{self.rate:g}" if name == "learning_rate" else super().effect(name)


@dataclass(frozen=True)
class TrainPlace(Place):
    """How ``jbn train`` is carried out."""

    out: Path = option(Path("jbn-train"), "Folder of checkpoints, metrics and results; shared by all machines.", OUT)
    devices: int | None = option(None, "Devices of this process, simulated on a CPU. Default: all.", DEVICES)
    coordinator: str | None = option(
        None,
        "Where process 0 is reached, for a run of several processes. At an address of its own, or localhost, it "
        "listens there alone; at a name, which others may know by another address, everywhere.",
        ADDRESS,
    )
    num_processes: int | None = option(None, "How many processes there are.", whole_number(1, 100_000))
    process_id: int | None = option(None, "Which of them this is, from 0 on.", whole_number(0, 99_999))
    cluster: bool = option(
        False, "Learn --coordinator, --num-processes and --process-id from SLURM, Open MPI or the TPU slice."
    )
    timeout: int = option(100, "After which a silent process is taken for lost.", whole_number(5, 3600, "SECONDS"))
    save_every: int = option(100, "Steps between checkpoints.", whole_number(1, 2**31 - 1))
    keep: int = option(3, "Checkpoints to keep.", whole_number(1, 1000))
    resume: bool = option(False, "Go on with the run in --out.")
    at: int | None = option(
        None, "With --resume: from this checkpoint, not the last.", whole_number(1, 2**31 - 1, "STEP")
    )


@dataclass(frozen=True)
class CheckOptions:
    """The options of ``jbn check``; the help of a field says what it is."""

    devices: int | None = option(None, "Devices to check, simulated on a CPU. Default: all.", DEVICES)


@dataclass(frozen=True)
class EvaluateOptions:
    """The argument and the options of ``jbn evaluate``; the help of a field says what it is."""

    checkpoint: Path = argument(MISSING, CHECKPOINT, file_name(Path, "CHECKPOINT"))
    data: str | None = option(
        None,
        "Other images to evaluate on: a folder, as for jbn train, or the test images of digits or mnist. "
        "Default: those of the validation.",
        file_name(str, "digits|mnist|DIR", tuple(DEMO_RATES)),
    )
    batch_size: int | None = option(None, "Images at once. Default: a batch of the run.", whole_number(2, 2**24))


@dataclass(frozen=True)
class ExportOptions:
    """The arguments and the options of ``jbn export``; the help of a field says what it is."""

    checkpoint: Path = argument(MISSING, CHECKPOINT, file_name(Path, "CHECKPOINT"))
    files: tuple[Path, ...] = argument(MISSING, f"What to write: a name that ends in {FILE_ENDS}.", FILES)
    average: bool = option(False, "The average of weights of a run with --ema, not the last ones.")
    force: bool = option(False, "Write over files that are there.")


@dataclass(frozen=True)
class DiagnoseOptions:
    """The argument and the options of ``jbn diagnose``; the help of a field says what it is."""

    checkpoint: Path = argument(MISSING, CHECKPOINT, file_name(Path, "CHECKPOINT"))
    batch_size: int | None = option(None, "Training images to look at. Default: a batch.", whole_number(2, 2**24))
    seed: int = option(0, "Seed of the choice of images.", SEED)
    figure: Path | None = option(None, "Draw the statistics of every channel too.", file_name(Path, "FILE.png"))


@dataclass(frozen=True)
class StudyOptions(Options):
    """What determines the result of a study.

    Attributes:
        versions: of packages, and the device. This and what follows is no option: machine and study decide it.
        plan: of the cells, short for their settings.
    """

    name: str | None = argument(None, "Which study, or all of them. Without it they are listed.", {"metavar": "NAME"})
    size: str = option(
        "default",
        "quick: a minute, decides nothing. default: at most ten minutes a study on two cores. full: larger.",
        choice("quick", "default", "full"),
    )
    versions: str = ""
    plan: str = ""


@dataclass(frozen=True)
class StudyPlace(Place):
    """How ``jbn study`` is carried out."""

    out: Path = option(Path("jbn-study"), "Folder of results; each study has one of its own in it.", OUT)


@dataclass(frozen=True)
class ReportOptions:
    """The options of ``jbn report``; the help of a field says what it is."""

    out: Path = option(Path("jbn-study"), "Folder of results, the --out of jbn study.", OUT)
    page: Path | None = option(None, "Where the page goes. Default: DIR/report.html.", file_name(Path, "FILE.html"))


def options_of(record: type[Any]) -> list[Field[Any]]:
    """Return the fields of a record that are options."""
    return [field for field in fields(record) if "typer" in field.metadata]


def check(options: Options) -> None:
    """Raise ``ValueError`` where options that a file holds are none that a command writes."""
    hints = get_type_hints(type(options))
    for each in fields(options):
        value, parse = getattr(options, each.name), each.metadata.get("kept", {}).get("parser")
        if value == each.default:
            continue
        try:
            parts = value if isinstance(value, tuple) else (value,)
            fits = all(parse(str(part)) == part for part in parts) if parse else isinstance(value, hints[each.name])
        except typer.BadParameter:
            fits = False
        if not fits:
            raise ValueError(f"{each.name} is {value!r}")


def flag(name: str) -> str:
    """Return the option of a field, as one types it."""
    return "--" + name.replace("_", "-")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Let a function of records be a command of Typer whose options are their fields, in this order."""
    records = list(get_type_hints(function).values())[:-1]  # the last one is that of the result

    @functools.wraps(function)
    def call(context: typer.Context, **values: Any) -> None:
        typed = {name for name in values if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
        made = []
        for record in records:
            own = {field.name: values[field.name] for field in options_of(record)}
            own |= {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
            made.append(record(**own, typed=frozenset(typed)) if issubclass(record, Place) else record(**own))
        function(*made)

    parameters = [_parameter(record, field) for record in records for field in options_of(record)]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    call.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    return call


def _parameter(record: type[Any], field: Field[Any]) -> inspect.Parameter:
    """Return what Typer reads of a field."""
    type_, shown = get_type_hints(record)[field.name], field.metadata["typer"]
    default: Any = field.default
    if get_origin(type_) is tuple:  # Typer takes what may be repeated as a list
        type_, default = list[str], default if default is MISSING else list(default)
        shown = {"show_default": bool(default)} | shown
    if isinstance(default, float):
        shown = {"show_default": words(default)} | shown
    if default is MISSING:
        default = inspect.Parameter.empty
    info = typer.Argument(**shown) if field.metadata.get("argument") else typer.Option(flag(field.name), **shown)
    annotation = Annotated[type_, info]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
