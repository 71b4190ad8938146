"""Times ONNX Runtime's CPU operators on shapes of `roofline`: GroupQueryAttention over
f32, int8 and int4 caches (`--filter cache-`), and SparseAttention.

    python -m venv env && . env/bin/activate
    pip install numpy onnx onnxruntime
    python onnxruntime_cpu.py [THREADS]
"""

import statistics
import sys
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 2
TYPES = {np.float32: TensorProto.FLOAT, np.int32: TensorProto.INT32, np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8}


def measure(name, operator, inputs, outputs, attributes):
    """Median milliseconds. `inputs` in the operator's order; an array of None is left out."""
    fed = {key: x for key, x in inputs.items() if x is not None}
    node = helper.make_node(
        operator, [key if key in fed else "" for key in inputs], outputs, domain="com.microsoft", **attributes
    )
    described = [helper.make_tensor_value_info(key, TYPES[x.dtype.type], x.shape) for key, x in fed.items()]
    cache = TYPES[inputs["past_key"].dtype.type]
    made = [helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, None)]
    made += [helper.make_tensor_value_info(key, cache, None) for key in outputs[1:]]
    graph = helper.make_graph([node], "attention", described, made)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    # Past and present share their memory, as they do in a decode loop.
    binding = session.io_binding()
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(x) for key, x in fed.items()}
    for key, value in values.items():
        binding.bind_ortvalue_input(key, value)
    binding.bind_output(outputs[0])
    for past, present in zip(("past_key", "past_value"), outputs[1:]):
        binding.bind_ortvalue_output(present, values[past])
    session.run_with_iobinding(binding)
    times, begun = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < 2 and len(times) < 400:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{name:28} {statistics.median(times):9.3f} ms, {THREADS} threads", flush=True)


def decode(name, cache, bits):
    heads, kv_heads, dim, length = 32, 8, 128, 16384
    random = np.random.default_rng(1)
    packed = dim if bits != 4 else dim // 2
    low, high = (-127, 128) if cache == np.int8 else (0, 256)

    def past():
        shape = (1, kv_heads, length, packed)
        if cache == np.float32:
            return random.standard_normal(shape, dtype=np.float32)
        return random.integers(low, high, shape).astype(cache)

    quantised = cache != np.float32
    scale = np.full((kv_heads * dim,), 0.02, np.float32) if quantised else None
    new = lambda n: random.standard_normal((1, 1, n * dim), dtype=np.float32)
    inputs = {
        "query": new(heads), "key": new(kv_heads), "value": new(kv_heads),
        "past_key": past(), "past_value": past(),
        "seqlens_k": np.array([length - 1], np.int32), "total_sequence_length": np.array(length, np.int32),
        "cos_cache": None, "sin_cache": None, "position_ids": None, "attention_bias": None, "head_sink": None,
        "k_scale": scale, "v_scale": scale,
    }
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads}
    if quantised:
        attributes |= {"kv_cache_bit_width": bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    measure(name, "GroupQueryAttention", inputs, ["out", "present_key", "present_value"], attributes)


def sparse(length, block, local, stride):
    """Causal, `local` blocks before each and every `stride`-th, as S2-Attention has them."""
    heads, dim = 4, 128
    random = np.random.default_rng(1)
    blocks = length // block
    row, column = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
    layout = (column <= row) & ((row - column < local) | ((column + 1) % stride == 0))
    rows = np.concatenate([[0], np.cumsum(layout.sum(1))]).astype(np.int32)[None]
    columns = np.nonzero(layout)[1].astype(np.int32)[None]
    new = lambda: random.standard_normal((1, length, heads * dim), dtype=np.float32)
    past = lambda: np.zeros((1, heads, length, dim), np.float32)
    inputs = {
        "query": new(), "key": new(), "value": new(), "past_key": past(), "past_value": past(),
        "block_row_indices": rows, "block_col_indices": columns,
        "total_sequence_length": np.array([length], np.int32),
        "key_total_sequence_lengths": np.array([length], np.int32),
    }
    attributes = {"num_heads": heads, "kv_num_heads": heads, "sparse_block_size": block}
    measure(f"sparse-{length}-{block}-{local}-{stride}", "SparseAttention", inputs,
            ["out", "present_key", "present_value"], attributes)


for case in [("cache-f32-16k", np.float32, 32), ("cache-int8-16k", np.int8, 8), ("cache-int4-16k", np.uint8, 4)]:
    try:
        decode(*case)
    except Exception as error:  # what this version does not have
        print(f"{case[0]:28} {str(error)[:200]}")
try:
    sparse(8192, 64, 16, 16)
except Exception as error:
    print(f"sparse {str(error)[:300]}")
