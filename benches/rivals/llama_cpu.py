"""llama.cpp on the file and the tokens of the program `generate`, greedily: the largest
logits after the prompt, the tokens that follow, tokens a second.

    generate --model FILE --trace "Why is the sky blue?" 2> trace
    python -m venv env && . env/bin/activate
    pip install llama-cpp-python
    python llama_cpu.py FILE trace [THREADS] [--repacked]

Weights stay as the file has them, unless `--repacked`: in version 0.3.36 the kernels for
weights that are rearranged for AMX end the program on a CPU that has it.
"""

import sys
import time

import llama_cpp.llama_cpp as low
from llama_cpp import Llama
import numpy as np


def numbers(trace, word):
    """The numbers of the line that starts with a word and a colon."""
    (line,) = [line for line in trace.splitlines() if line.startswith(word + ":")]
    return [int(x) for x in line.partition(":")[2].split()]


def main():
    args = [x for x in sys.argv[1:] if x != "--repacked"]
    trace = open(args[1]).read()
    threads = int(args[2]) if len(args) > 2 else 2
    prompt, theirs = numbers(trace, "prompt tokens"), numbers(trace, "tokens")

    defaults = low.llama_model_default_params

    def params():
        made = defaults()
        made.use_extra_bufts = "--repacked" in sys.argv
        return made

    low.llama_model_default_params = params
    context = -(-(len(prompt) + len(theirs) + 1) // 256) * 256
    model = Llama(args[0], n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    vocabulary = model.n_vocab()

    def logits(tokens):
        model.eval(tokens)
        row = low.llama_get_logits_ith(model.ctx, -1)
        return np.ctypeslib.as_array(row, shape=(vocabulary,)).copy()

    started = time.perf_counter()
    row = logits(prompt)
    prefill = time.perf_counter() - started
    print("logits:", ", ".join(f"{i} {row[i]:.3f}" for i in np.argsort(-row)[:5]))

    tokens, started = [], time.perf_counter()
    while len(tokens) < len(theirs):
        tokens.append(int(row.argmax()))
        row = logits(tokens[-1:])
    decode = time.perf_counter() - started
    alike = next((i for i, (a, b) in enumerate(zip(tokens, theirs)) if a != b), len(theirs))
    print("tokens:", *tokens)
    print(f"the first {alike} of {len(theirs)} tokens are the same")
    print(f"prompt      {len(prompt):>7} tokens {len(prompt) / prefill:>8.1f} a second")
    print(f"generated   {len(tokens):>7} tokens {len(tokens) / decode:>8.1f} a second")


main()
