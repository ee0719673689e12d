"""Compiles the Triton kernel for several GPU generations, without a GPU, and prints the resources that it needs.

Run it in a process of its own: where kernels are interpreted, none can be compiled.
"""

import json
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_attentiondrop.functional.hard.top_scores import KEYS_PER_TILE, QUERIES_PER_TILE, _find_top_scores, _precision


POINTERS = {"mask": "*u8", "index": "*i32"}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def resources(capability: int, dtype: torch.dtype, size: int, has_mask: bool) -> dict[str, int]:
    """Returns registers per thread, stack bytes per thread, and bytes of shared memory; with a mask, or causal."""
    constants = {
        "SIZE": size,
        "PADDED_SIZE": triton.next_power_of_2(size),
        "K": 5,
        "PADDED_K": 8,
        "IS_CAUSAL": not has_mask,
        "HAS_MASK": has_mask,
        "PRECISION": _precision(dtype),
        "ROWS": QUERIES_PER_TILE[dtype],
        "COLUMNS": KEYS_PER_TILE,
        "query_stride_d": 1,
        "key_stride_d": 1,
        "mask_stride_k": 1,
    }
    pointers = POINTERS | dict.fromkeys(("query", "key"), f"*{NAMES[dtype]}")
    arguments = _find_top_scores.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in arguments}
    aligned = [name for name in arguments if name in pointers or ("stride" in name and name not in constants)]
    source = ASTSource(
        _find_top_scores,
        signature,
        {(arguments.index(name),): value for name, value in constants.items()},
        {(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared}


if __name__ == "__main__":
    for capability in (80, 90):
        for dtype, size, has_mask in [
            (torch.bfloat16, 64, False),
            (torch.bfloat16, 128, True),
            (torch.float32, 64, True),
        ]:
            row = {"capability": capability, "dtype": NAMES[dtype], "size": size, "has_mask": has_mask}
            print(json.dumps(row | resources(capability, dtype, size, has_mask)))
