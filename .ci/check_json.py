"""Whether what the examples print with --json is what their docs promise."""

import json
import pathlib
import subprocess
import sys

ATLAS = {
    "mechanism": str, "family": str, "source": str, "dtype": str,
    "max_error": float, "bound": float, "kernel_ms": float, "reference_ms": float,
}
ROOFLINE = {
    "mechanism": str, "shape": str, "threads": int, "isa": str, "dtype": str,
    "ms": float, "gflops": float, "gbs": float,
    "fma_gflops": float, "tile_gflops": float, "read_gbs": float, "limit": str, "percent": float,
}

examples = pathlib.Path(sys.argv[1])
for program, keys in [(["atlas", "--filter", "causal"], ATLAS), (["roofline", "--filter", "short", "--threads", "1"], ROOFLINE)]:
    command = [str(examples / program[0]), *program[1:], "--json"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines, f"{program}: nothing printed"
    for line in lines:
        found = json.loads(line)
        assert list(found) == list(keys), f"{program}: {list(found)}"
        for key, kind in keys.items():
            assert type(found[key]) is kind, f"{program}: {key} is {found[key]!r}"
    print(f"{program[0]} --json: {len(lines)} lines, well formed")
