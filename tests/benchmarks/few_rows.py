"""Products of few rows as the plain one and turned over, with a gradient to the rows, on the shape of SmolLM2-135M.

    python tests/benchmarks/few_rows.py [ROWS]

Every weight is read once a turn, 20 layers of them, as in a training step: none is still in a cache.
"""

import sys
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

WIDTHS = {"queries, keys, values": (576, 960), "output": (576, 576), "gate, input": (576, 3072), "down": (1536, 576)}
N_LAYERS, N_TURNS = 20, 15


def median_of(job: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    """Milliseconds of a product with each weight."""
    times = []
    for _ in range(N_TURNS):
        start = perf_counter()
        for weight in weights:
            job(weight)
        times.append(1000 * (perf_counter() - start))
    return sorted(times[1:])[len(times) // 2 - 1]


def main(n_rows: int = 5) -> None:
    generator = torch.Generator().manual_seed(0)
    print(f"{torch.cpu.get_capabilities().get('cpu_name')}, {torch.get_num_threads()} threads, {n_rows} rows")
    for name, (n_in, n_out) in WIDTHS.items():
        kept = [torch.randn(n_out, n_in, generator=generator) for _ in range(N_LAYERS)]  # [out in]
        own = [weight.T.contiguous() for weight in kept]  # [in out], as the model has it
        x = torch.randn(n_rows, n_in, generator=generator)
        gradient = torch.randn(n_rows, n_out, generator=generator)
        turned = gradient.T.contiguous()
        plain = median_of(lambda w, x=x: x @ w.T, kept), median_of(lambda w, g=gradient: g @ w, kept)
        over = median_of(lambda w, x=x: (w @ x.T).T, kept), median_of(lambda w, g=turned: (w @ g).T, own)
        print(
            f"{name:22} plain {plain[0]:6.2f} and {plain[1]:6.2f} ms, turned over {over[0]:6.2f} and {over[1]:6.2f} "
            f"ms, gradients second; plain takes {sum(plain) / sum(over):.2f} times as long"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
