"""What the CPU, TPU and GPU compilers make of a program, on a machine that needs neither a TPU nor a GPU.

`compile` hands a function to the real compiler of a target and returns a `Program`, from which one reads
bytes and passes over memory, collectives, conditionals and peak memory:

    x = jax.ShapeDtypeStruct((256, 56, 56, 256), jnp.bfloat16)
    compile(f, x, on="tpu-v5e").passes(x)    # sweeps over x, in the dtype of x

    m = mesh("gpu-h200", data=4)             # several devices: shard the arguments over a mesh from here
    x = jax.ShapeDtypeStruct((256, 56, 56, 256), jnp.bfloat16, sharding=NamedSharding(m, P("data")))
    compile(f, x, on=m).collectives

How it counts:

- Bytes are XLA's own cost analysis of the optimized program of one device, by the same code for all targets:
  every operand read once and every result written once, a fused slice only as far as it is read, tile padding
  left out. Custom calls, such as cuDNN's convolutions, are 0 there: their operands and results are added.
- Bytes are those of the path taken: of each conditional one branch counts, the others are left out. By
  default that is branch 0, which `lax.cond` takes where its predicate is false: a guard that does not fire.
- A conditional that the compiler turned into a select is none any more: all of its branches run, and count.
- The body of a loop counts once, however often it runs.
- On TPU keep arrays above 128 MB a device: smaller ones are staged in VMEM, and the copies are counted too.
- GPU programs are compiled without autotuning: the temporaries lack the workspace of convolutions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jaxlib.xla_client
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jbn.version import install

# XLA's GpuTargetConfig, in those fields that every jax up to 0.12 knows.
_GPU_CONFIG = """gpu_device_info { %s
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
    shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 }
    platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }"""
_HOPPER = """core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
    shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
    cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"""
_GPUS = {
    "gpu-h200": f"{_HOPPER} memory_bandwidth: 4800000000000 device_memory_size: 151397597184",
    "gpu-h100": f"{_HOPPER} memory_bandwidth: 3352320000000 device_memory_size: 84942979072",
    "gpu-a100": """core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040
        shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
        cuda_compute_capability { major: 8 feature_extension: NONE }
        memory_bandwidth: 2039040000000 device_memory_size: 85100068864""",
}

TARGETS = ("cpu", "tpu-v5e", "tpu-v6e", *_GPUS)
"""The names of the targets."""


def missing(target: str) -> str | None:
    """Say why this environment cannot compile for a target; None where it can.

    Args:
        target: one of `TARGETS`.
    """
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}; there are {', '.join(TARGETS)}")
    if target in _GPUS and jax.__version_info__ < (0, 9):
        return f"{target} needs jax 0.9: the GPU compiler of jax {jax.__version__} does not show its program"
    needed = {"cpu": (), "tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")}
    absent = " and ".join(name for name in needed[target[:3]] if not _installed(name))
    return f"{target} needs {absent}: {install('compilers')}" if absent else None


def mesh(target: str, /, *, explicit: bool = False, **axes: int) -> Mesh:
    """Return a mesh over devices that exist only for the compiler.

    Args:
        target: one of `TARGETS`.
        explicit: whether the axes are Explicit, not Auto.
        **axes: the size of every axis, in order: `mesh("tpu-v5e", data=4, model=2)`.
    """
    sizes = tuple(axes.values())
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = np.array(_devices(target, int(np.prod(sizes))), dtype=object)
    return Mesh(devices.reshape(sizes), tuple(axes), axis_types=(kind,) * len(axes))


def compile(f: Callable[..., Any], *args: Any, on: str | Mesh) -> Program:
    """Compile `f` for a target; nothing runs.

    Args:
        f: a function, jitted or not.
        *args: its arguments, trees of arrays or of `jax.ShapeDtypeStruct`, replicated unless sharded.
        on: one of `TARGETS`, for one device of it, or a mesh from `mesh`.
    """
    over = mesh(on, device=1) if isinstance(on, str) else on

    def place(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            sharding = NamedSharding(over, PartitionSpec())  # type: ignore[no-untyped-call]
        if sharding.mesh != over:
            raise ValueError(f"an argument is sharded over {sharding.mesh}, not over {over}, compiled for")
        struct: Any = jax.ShapeDtypeStruct
        return struct(leaf.shape, leaf.dtype, sharding=sharding)

    jitted = f if hasattr(f, "lower") else jax.jit(f)
    with warnings.catch_warnings():
        # Where programs are cached on disk JAX writes those for devices that are not here too, and cannot read them.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        compiled = jitted.lower(*jax.tree.map(place, args)).compile()
    memory = compiled.memory_analysis()
    return Program(
        text=compiled.as_text(),
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )


class Collective(NamedTuple):
    """One collective: its opcode, and the bytes that one device puts into it."""

    opcode: str
    bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled program, as one device sees it.

    Attributes:
        text: its optimized HLO.
        temporaries: bytes that it needs besides arguments and outputs, at its peak (XLA's temp size).
        arguments: bytes of its arguments.
        outputs: bytes of its outputs, without those written over a donated argument.
    """

    text: str
    temporaries: int = 0
    arguments: int = 0
    outputs: int = 0

    @property
    def peak(self) -> int:
        """Peak memory in bytes: arguments, outputs and temporaries.

        XLA has a field of this name, but on CPU it leaves the temporaries out.
        """
        return self.arguments + self.outputs + self.temporaries

    def bytes(self, branch: int = 0) -> float:
        """Bytes read and written on the path taken.

        Args:
            branch: the branch of every conditional, numbered as by `lax.switch` (`lax.cond`: 0 is False).
        """
        path = _follow(self.text, branch)
        return _analyzed_bytes(path) + sum(_traffic(i) for i in _executed(path) if i.opcode == "custom-call")

    def passes(self, x: Any, branch: int = 0) -> float:
        """Bytes on the path taken, in sweeps over one device's part of x.

        Args:
            x: an array or `jax.ShapeDtypeStruct`, sharded as in the program.
            branch: as in `bytes`.
        """
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if isinstance(sharding, NamedSharding) else x.shape
        return self.bytes(branch) / (int(np.prod(shape)) * int(x.dtype.itemsize))

    @property
    def collectives(self) -> list[Collective]:
        """The collectives that always run; those that the compiler combined into one are one."""
        return _collectives(self.text)

    @property
    def guarded_collectives(self) -> list[Collective]:
        """The collectives in the branches of conditionals."""
        every = Counter(_collectives(self.text, branches=True))
        return list((every - Counter(self.collectives)).elements())

    @property
    def conditionals(self) -> int:
        """How many conditionals always run: those of the entry computation and of what it calls."""
        return sum(i.opcode == "conditional" for i in _executed(self.text))


# Reading optimized HLO text.


class _Instruction(NamedTuple):
    opcode: str
    result: str  # its shape
    operands: list[str]  # their shapes
    attributes: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=(?:\{([^}]*)\}|%([\w.$-]+))")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=([^\s,]+))")
_CONDITIONAL = re.compile(r"^(\s+(?:ROOT )?%?[\w.$-]+ = .+? )conditional\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|token|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(-start)?"
)
_TILED = re.compile(r"\{([\d,]*):[A-Z][^{}]*\}")
_NAME = re.compile(r"%[\w.$-]+")


def _split(rest: str) -> tuple[str, str]:
    """Split what follows an instruction's opening parenthesis into operands and attributes."""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:end], rest[end + 1 :]
    raise ValueError(f"unbalanced parentheses: {rest[:200]}")


def _branches(attributes: str) -> list[str]:
    """List a conditional's branches in the order of `lax.switch`: of a boolean predicate, False first."""
    found = _BRANCHES.search(attributes)
    if found is None:
        raise ValueError(f"a conditional without branches: {attributes[:200]}")
    listed, true, false = found.groups()
    return _NAME.findall(listed if listed is not None else f"{false} {true}")


@functools.lru_cache(maxsize=8)
def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """Return the entry computation's name and every computation's instructions."""
    entry, computations, shapes = "", dict[str, list[_Instruction]](), dict[str, str]()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            shapes = {}
            instructions = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif computations and (found := _LINE.match(line)):
            name, result, opcode, rest = found.groups()
            operands, attributes = _split(rest)
            shapes[name] = result
            read = [shapes[o[1:]] for o in _NAME.findall(operands) if o[1:] in shapes]
            instructions.append(_Instruction(opcode, result, read, attributes))
    return entry, computations


def _executed(text: str, branches: bool = False) -> Iterator[_Instruction]:
    """Yield every instruction that runs, those in branches of conditionals only if asked for."""
    entry, computations = _parse(text)

    def walk(name: str) -> Iterator[_Instruction]:
        for instruction in computations[name]:
            yield instruction
            # The other end of an asynchronous pair names the same computation once more.
            if instruction.opcode in ("async-update", "async-done"):
                continue
            for listed, single in _CALLED.findall(instruction.attributes):
                for called in _NAME.findall(listed) or [f"%{single}"]:
                    yield from walk(called[1:])
            if branches and instruction.opcode == "conditional":
                for called in _branches(instruction.attributes):
                    yield from walk(called[1:])

    return walk(entry)


def _follow(text: str, branch: int) -> str:
    """Replace every conditional by a call of one of its branches."""

    def call(found: re.Match[str]) -> str:
        operands, attributes = _split(found[2])
        names, branches = _NAME.findall(operands)[1:], _branches(attributes)
        if "true_computation" in attributes:
            names.reverse()
        taken = min(branch, len(branches) - 1)
        return f"{found[1]}call({names[taken]}), to_apply={branches[taken]}"

    return _CONDITIONAL.sub(call, text)


def _size(shape: str) -> int:
    """Bytes of an array or tuple shape in HLO's notation."""
    total = 0
    for kind, bits, dimensions in _ARRAY.findall(shape):
        width = 0 if kind == "token" else int(bits or 8)
        total += (int(np.prod([int(d) for d in dimensions.split(",") if d])) * width + 7) // 8
    return total


def _traffic(call: _Instruction) -> int:
    """Bytes read and written by a custom call."""
    if 'custom_call_target="AllocateBuffer"' in call.attributes:
        return 0
    return _size(call.result) + sum(map(_size, call.operands))


def _collectives(text: str, branches: bool = False) -> list[Collective]:
    """List the collectives of a program, those in branches of conditionals only if asked for."""
    return [
        Collective(found[1], sum(map(_size, instruction.operands)))
        for instruction in _executed(text, branches)
        if (found := _COLLECTIVE.fullmatch(instruction.opcode))
    ]


# Everything that is private in jax or jaxlib is below this line.


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _devices(target: str, count: int) -> list[Any]:
    """Return the first `count` devices of a target."""
    if reason := missing(target):
        raise ModuleNotFoundError(reason)
    if target == "cpu":
        # A client of its own: that of jax.devices() has as many devices as the process chose when it started.
        make_client: Any = jaxlib.xla_client.make_cpu_client
        return list(make_client(num_devices=count).devices())
    if target in _GPUS:
        return _gpu_devices(_GPU_CONFIG % _GPUS[target], count)
    if count > 8:
        raise ValueError(f"{target}: at most 8 devices, the chips of one host; got {count}")
    # libtpu reads both when it is loaded. Without the second, a process that compiles locks out all others.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{target.removeprefix('tpu-')}:{'2x2' if count <= 4 else '2x4'}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count])


def _gpu_devices(config: str, count: int) -> list[Any]:
    options = {"target_config": config, "topology": f"1x1x{count}"}

    def describe() -> list[Any]:
        return list(topologies.get_topology_desc("", "cuda", **options).devices)

    # Settles the backends first: a CUDA plugin that arrives later cannot become the default of this process.
    jax.devices()
    try:
        return describe()
    except NotImplementedError:
        # Not registered, because jax looked for cuDNN and its kin in vain; the compiler needs none of them.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        try:
            importlib.import_module("jax_plugins.xla_cuda12").initialize()
        finally:
            del os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"]
        return describe()


def _analyzed_bytes(text: str) -> float:
    """Bytes accessed by an HLO program, custom calls left out."""
    # Since jax 0.10 a module of its own has the parser.
    hlo: Any = importlib.import_module("jaxlib._hlo" if _installed("jaxlib._hlo") else "jaxlib._jax")
    analyze: Any = importlib.import_module("jaxlib._jax").hlo_module_cost_analysis
    # Some versions count the padding of TPU tiles, some do not: leave the tiles out.
    untiled = _TILED.sub(lambda layout: f"{{{layout[1]}}}" if layout[1] else "", text)
    return float(analyze(_devices("cpu", 1)[0].client, hlo.hlo_module_from_text(untiled))["bytes accessed"])
