"""Compile what the Triton launchers launch, ahead of time and without a device.

    python tests/triton_kernels/triton_ahead.py shipped sm_90a

The launchers run on tensors without storage, under a driver that knows nothing but its target; the configs that they could
choose are compiled, and one line of JSON a kernel says what came out. "shipped" compiles what `amount_of` says of a target and
a dtype: all configs in bfloat16 of the targets that most run on, and on others of the most used launches; "all" adds uncommon
shapes and compiles everything in all three dtypes.
A process of its own: the interpreter of other tests and the compiler exclude each other.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from stepgraph.triton_kernels import (
    gated_residual,
    launch,
    linear_combination,
    lowrank_delta,
    lowrank_input,
    modulated_norm,
    projection,
)
from stepgraph.triton_kernels.launch import Machine

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.devices import KB, machine_of

# Target, and the shared memory that one program may use on it.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), machine_of("A100")),
    "sm_86": (GPUTarget("cuda", 86, 32), Machine(84, 99 * KB)),
    "sm_89": (GPUTarget("cuda", 89, 32), Machine(128, 99 * KB)),
    "sm_90a": (GPUTarget("cuda", 90, 32), machine_of("H100")),
    "sm_100a": (GPUTarget("cuda", 100, 32), Machine(148, 227 * KB)),
    "sm_120a": (GPUTarget("cuda", 120, 32), Machine(170, 99 * KB)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Machine(304, 64 * KB, hip=True)),
}
# Compiled in full: one target of each maker, which most run on.
USED = ("sm_90a", "gfx942")
# With the instructions of sm_80 and the shared memory of sm_120a.
ALIKE = ("sm_86", "sm_89")
# The most used launches, of which p is stored and corrected in one run.
FEW = ("input", "delta r128", "modulated_norm", "input of few rows", "delta of few rows")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODULES = (lowrank_delta, projection, modulated_norm, gated_residual, linear_combination)
RUN = JITFunction.run
PRODUCTS = ("project_kernel", "delta_kernel", "expand_kernel")
NORMS = ("modulated_norm_kernel", "moments_kernel")
MATRIX = r"mma\.sync\S+|wgmma\.mma_async\S+|tcgen05\.mma\S+|v_mfma_\w+|v_wmma_\w+"


class TargetOnly(DriverBase):
    """A driver that compiles for a target and runs nothing; each target is a device of its own."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def get_current_device(self):
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.name][0]

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("launchers are not built: nothing runs here")

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed without a device")


def cases(dtype: torch.dtype, amount: str):
    """Name and call of each launch.

    "least": one of every kind; "few": the most used; "most": every config; "shipped": with lower ranks and without modulation
    too, which take fewer registers and less shared memory; "all": uncommon shapes too.
    """

    def new(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    def delta(tokens, ranks, channels=1152, fused=True):
        x, y, out = new(2, tokens, channels), [new(2, tokens, channels) for _ in ranks], sum(ranks)
        more = {}
        if fused:
            more = {"scale": new(2, channels), "shift": new(2, channels)}
            more |= {"gate": new(2, channels), "residual": new(2, tokens, channels)} if len(ranks) == 1 else {}
        p = new(2, tokens, out, of=torch.float32)
        return lambda: lowrank_delta.lowrank_delta(x, y, p, [new(channels, r) for r in ranks], new(out, channels), **more)

    def stream(count):
        x, values = new(2, 4096, 1152), [new(2, 4096, 1152) for _ in range(count)]
        return lambda: gated_residual.gated_residual(x, [new(2, 1152) for _ in values], values)

    yield "input", lambda: lowrank_input.lowrank_input(new(2, 16384, 1152), new(128, 1152))
    yield "delta r128", delta(16384, (128,))
    yield "modulated_norm", lambda: modulated_norm.modulated_norm(new(2, 4096, 1152), new(2, 1152), new(2, 1152))
    if amount == "least":
        return
    yield "input of few rows", lambda: lowrank_input.lowrank_input(new(2, 128, 1152), new(128, 1152))
    yield "delta of few rows", delta(128, (128,))
    if amount == "few":
        return
    for rank in (64, 256, 512):
        yield f"delta r{rank}", delta(16384, (rank,))
    yield "gated_residual", stream(1)
    yield (
        "linear_combination",
        lambda: linear_combination.linear_combination([new(2, 4, 64, 64) for _ in range(3)], new(4, of=torch.float32)),
    )
    if amount == "most":
        return
    yield "delta r32", delta(16384, (32,))
    yield "delta plain", delta(16384, (128,), fused=False)
    if amount == "shipped":
        return
    yield "delta qkv", delta(16384, (128, 128, 64))
    yield "delta qkv of few rows", delta(128, (128, 128, 64))
    yield "delta split", delta(2048, (128,))
    yield "modulated_norm wide", lambda: modulated_norm.modulated_norm(new(1, 64, 12288), new(12288), new(12288))
    yield "gated_residual 8", stream(8)


def resources(kernel) -> dict[str, object]:
    """Registers, spills and the kinds of matrix instructions of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        read = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": read["vgpr_count"], "spilled": read["vgpr_spill_count"], "matrix": kinds(text)}
    text = dumped(kernel, "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local, "matrix": kinds(kernel.asm["ptx"])}


def dumped(kernel, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def contracted(kernel) -> int | None:
    """How many products and sums the assembler made one operation, without the rounding between, beside those that are
    written so; None where that is not known.
    """
    if "cubin" not in kernel.asm:
        return None
    return len(re.findall(r"\bFFMA\b", dumped(kernel, "-sass"))) - len(re.findall(r"\bfma\.rn\.f32\b", kernel.asm["ptx"]))


def kinds(text: str) -> list[str]:
    return sorted(set(re.findall(MATRIX, text)))


def faults(row: dict[str, object]) -> list[str]:
    """What must not be: no matrix instructions in a product of 16-bit numbers, spills, more shared memory than there is."""
    found = []
    if row["dtype"] != "fp32" and row["kernel"] in PRODUCTS and not row["matrix"]:
        found.append("no matrix instructions")
    if row["spilled"]:
        found.append(f"{row['spilled']} bytes or registers spilled")
    if row["shared"] > row["limit"]:
        found.append("too much shared memory")
    return found


def reduced(kernel) -> list[str]:
    """Layouts of what is summed up, which decide the order of the sum."""
    text = kernel.asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = (#ttg\.[^\n]*)$", text, re.MULTILINE))
    layouts = re.findall(r'"tt\.reduce"\([\s\S]*?\}\) : \(tensor<[^>]*?, (#\w+)>', text)
    return [named.get(layout, layout) for layout in layouts]


def takes_every_config(target: str, case: str, amount: str) -> bool:
    """Whether more than the best guess is compiled: of the most used launches, and on targets that most run on."""
    return amount != "least" and (target in USED or amount != "most" or case in FEW)


def compile_all(name: str, dtype: str, amount: str) -> None:
    """Print a row for each kernel that is launched."""
    machine = TARGETS[name][1]
    triton.runtime.driver.set_active(TargetOnly(name))
    compiled: list[tuple[str, object]] = []

    def record(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, RUN(self, *args, grid=grid, warmup=True, **kwargs)))

    def each(key, candidates, make, trial):
        if takes_every_config(name, case, amount):
            for candidate in candidates[1:]:
                make(candidate)(*trial())
        return make(candidates[0])

    JITFunction.run = record
    for module in MODULES:
        for function, instead in (("machine", lambda device: machine), ("fastest", each)):
            if hasattr(module, function):
                setattr(module, function, instead)
    launch.machine = lambda device: machine
    for case, call in cases(DTYPES[dtype], amount):
        compiled.clear()
        launch.forget()
        call()
        for kernel_name, kernel in compiled:
            row = {"target": name, "dtype": dtype, "case": case, "kernel": kernel_name, "shared": kernel.metadata.shared}
            row |= {"warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages, "limit": machine.shared}
            row |= resources(kernel) | {"reduced": reduced(kernel)}
            if kernel_name in NORMS:
                row["contracted"] = contracted(kernel)
            print(json.dumps(row | {"faults": faults(row)}), flush=True)


def amount_of(target: str, dtype: str) -> str:
    """What of "shipped" is compiled. float16 has the code of bfloat16 with other products."""
    if dtype == "bf16" and target not in ALIKE:
        return "shipped" if target in USED else "most"
    return "least" if dtype == "fp16" and target not in USED else "few"


if __name__ == "__main__":
    shipped = sys.argv[1] == "shipped"
    for target in sys.argv[2:] or TARGETS:
        for dtype in ("bf16",) if shipped and target in ALIKE else DTYPES:
            compile_all(target, dtype, amount_of(target, dtype) if shipped else sys.argv[1])
