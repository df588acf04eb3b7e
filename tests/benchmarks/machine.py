"""What a machine can do, and what a job needs at least: so that a ratio of times can be judged.

Operations are additions and multiplications of matrix products (two for each multiply-add); norms, activations and
softmax are left out. Bytes are those of weights, read once for every pass over them, in float32; activations are left
out. The counted limit of a ratio is the operations of the slow side over those of the fast one.
"""

import statistics
import time
from dataclasses import dataclass

import torch

_clock = time.perf_counter


def now():
    """The moment, in seconds of whatever clock is in use."""
    return _clock()


def count_processor_time():
    """From here on one thread, timed by the processor: for a machine that others use too, whose clock says little."""
    global _clock
    _clock = time.process_time
    torch.set_num_threads(1)


def seconds(function):
    """Time of one call, and what it gives."""
    start = now()
    result = function()
    return now() - start, result


@dataclass(frozen=True)
class Machine:
    """Measured rates: float32 products in GFLOP/s, reading in GB/s, with so many threads."""

    matmul: float
    bandwidth: float
    threads: int

    def averaged(self, other):
        """The means of two measurements, such as those before and after a job on a machine that others use too."""
        matmul, bandwidth = (self.matmul + other.matmul) / 2, (self.bandwidth + other.bandwidth) / 2
        return Machine(matmul, bandwidth, self.threads)

    def __str__(self):
        return (
            f"machine: {self.matmul:.0f} GFLOP/s of float32 products, {self.bandwidth:.1f} GB/s read, "
            f"{self.threads} threads"
        )


@torch.inference_mode()
def measure_machine(n_repeats=5, size=2048, n_bytes=512 * 2**20):
    """The best of several products of square matrices, and of several sums of a matrix beyond any cache by rows."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    large = torch.ones(n_bytes // 4 // 8192, 8192)
    vector = torch.ones(8192)
    a @ b, torch.mv(large, vector)  # warm-up
    product = min(seconds(lambda: a @ b)[0] for _ in range(n_repeats))
    read = min(min(seconds(lambda: torch.mv(large, vector))[0], seconds(large.sum)[0]) for _ in range(n_repeats))
    return Machine(2 * size**3 / product / 1e9, n_bytes / read / 1e9, torch.get_num_threads())


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs, grouped heads and tied embeddings."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int

    @property
    def layer_weights(self):
        """Numbers in the matrices of a layer: queries, keys, values, output; gate, up, down."""
        attention = 2 * (self.n_heads + self.n_key_value_heads) * self.d_head * self.d_model
        return attention + 3 * self.d_model * self.d_mlp

    @property
    def mlp_weights(self):
        """Numbers in the matrices of an MLP."""
        return 3 * self.d_model * self.d_mlp

    @property
    def vocabulary_weights(self):
        """Numbers in the unembedding."""
        return self.d_model * self.d_vocab

    def layer(self, n_keys):
        """Operations of one token in one layer: its weights, and scores and values over ``n_keys`` keys."""
        return 2 * self.layer_weights + 4 * n_keys * self.n_heads * self.d_head

    @property
    def unembedding(self):
        """Operations of one row of logits."""
        return 2 * self.vocabulary_weights


@dataclass(frozen=True)
class Count:
    """Operations and bytes of weights of a job."""

    operations: float
    bytes: float

    def __add__(self, other):
        return Count(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, n):
        return Count(n * self.operations, n * self.bytes)

    __rmul__ = __mul__

    def shares(self, machine, spent):
        """Shares of the machine's product rate and of its bandwidth reached in so many seconds."""
        return self.operations / spent / 1e9 / machine.matmul, self.bytes / spent / 1e9 / machine.bandwidth

    def least(self, machine):
        """Seconds at the machine's rates, whichever is the slower one."""
        return max(self.operations / machine.matmul, self.bytes / machine.bandwidth) / 1e9


def whole_pass(shape, n_rows, n_pos, n_read=None):
    """All tokens through all layers, causal attention (half of the keys on average), ``n_read`` rows of logits."""
    n_read = n_rows if n_read is None else n_read
    operations = n_rows * n_pos * shape.n_layers * shape.layer((n_pos + 1) / 2) + n_read * shape.unembedding
    return Count(operations, 4 * (shape.n_layers * shape.layer_weights + shape.vocabulary_weights * (n_read > 0)))


def suffix_pass(shape, n_tokens, n_layers, n_pos, n_read):
    """So many tokens through the last layers over ``n_pos`` keys each, ``n_read`` rows of logits."""
    operations = n_tokens * n_layers * shape.layer(n_pos) + n_read * shape.unembedding
    return Count(operations, 4 * (n_layers * shape.layer_weights + shape.vocabulary_weights * (n_read > 0)))


def effects_by_passes(shape, n_prompts, n_pos):
    """One whole pass a head and one without a patch, each unembedding the last position."""
    return (1 + shape.n_layers * shape.n_heads) * whole_pass(shape, n_prompts, n_pos)


def effects_by_suffix(shape, n_prompts, n_pos):
    """One whole pass, then one token a head through the rest of its own layer and those above it.

    In its own layer a head costs its slice of the output projection and the MLP. All heads go up together, so that
    each layer's weights are read once more.
    """
    own = 2 * (shape.d_head * shape.d_model + shape.mlp_weights)
    above = sum(range(shape.n_layers)) * shape.layer(n_pos)
    cells = n_prompts * shape.n_heads * (shape.n_layers * own + above)
    unembedding = n_prompts * shape.n_layers * shape.n_heads * shape.unembedding
    again = 4 * (shape.n_layers * shape.layer_weights + shape.vocabulary_weights)
    return whole_pass(shape, n_prompts, n_pos) + Count(cells + unembedding, again)


def changes_by_passes(shape, n_rows, n_pos, n_changes):
    """One whole pass a change over ``n_rows`` prompts, the last position unembedded."""
    return n_changes * whole_pass(shape, n_rows, n_pos)


def sweep_by_suffix(shape, n_rows, n_pos, n_suffix=1.0):
    """One whole pass, then a row a layer joining at its layer: ``L - 1 - l`` layers for a vector behind layer l.

    ``n_suffix`` is the mean number of suffix tokens a prompt: those of the answer, its last one aside, and the
    prompt's last one. Each is unembedded.
    """
    tokens = n_rows * n_suffix
    operations = tokens * (sum(range(shape.n_layers)) * shape.layer(n_pos) + shape.n_layers * shape.unembedding)
    again = 4 * ((shape.n_layers - 1) * shape.layer_weights + shape.vocabulary_weights)
    return whole_pass(shape, n_rows, n_pos) + Count(operations, again)


def controls_by_suffix(shape, n_rows, n_pos, layer, n_changes, n_suffix=1.0):
    """One whole pass, then a row for each change through the layers above ``layer``."""
    above = shape.n_layers - 1 - layer
    tokens = n_rows * n_suffix * n_changes
    return whole_pass(shape, n_rows, n_pos) + suffix_pass(shape, tokens, above, n_pos, tokens)


def training_by_passes(shape, layer, steps, scorings):
    """Whole passes of a training; backward only above ``layer``, through activations (as many operations as forward).

    Args:
        steps, scorings: (rows, positions with padding, answer tokens read) of each step, and of each scoring.
    """
    above = shape.n_layers - 1 - layer
    total = Count(0, 0)
    for n_rows, n_pos, n_read in steps:
        total += whole_pass(shape, n_rows, n_pos, n_read)
        total += suffix_pass(shape, n_rows * n_pos, above, (n_pos + 1) / 2, n_read)
    for n_rows, n_pos, n_read in scorings:
        total += whole_pass(shape, n_rows, n_pos, n_read)
    return total


def training_by_suffix(shape, layer, steps, scorings):
    """The same over kept prefixes: only the answer tokens read, through the layers above ``layer`` there and back.

    The one pass that keeps the prefixes belongs to the training, not to an epoch, and is left out.
    """
    above = shape.n_layers - 1 - layer
    total = Count(0, 0)
    for _, n_pos, n_read in steps:
        total += 2 * suffix_pass(shape, n_read, above, n_pos, n_read)
    for _, n_pos, n_read in scorings:
        total += suffix_pass(shape, n_read, above, n_pos, n_read)
    return total


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its name, the seconds of the whole job, what was timed, and what is counted."""

    name: str
    seconds: float
    timed: str
    count: Count | None = None


@dataclass(frozen=True)
class Comparison:
    """A row of the table: how often the slow side's time holds the fast side's, and what that should be."""

    title: str
    fast: Side
    slow: Side
    bar: float
    notes: tuple[str, ...] = ()

    @property
    def ratio(self):
        return self.slow.seconds / self.fast.seconds

    def report(self, machine):
        """The row in words."""
        lines = [f"\n{self.title}: {self.ratio:.2f} times (bar {self.bar:g})"]
        for side in (self.fast, self.slow):
            lines.append(f"  {side.name:34} {side.seconds:9.3f} s   {side.timed}")
            if side.count is not None:
                products, reading = side.count.shares(machine, side.seconds)
                lines.append(
                    f"  {'':34} {side.count.operations / 1e9:9.1f} GFLOP ({products:.0%} of the matmul rate), "
                    f"{side.count.bytes / 1e9:.2f} GB of weights ({reading:.0%} of the bandwidth)"
                )
        if self.fast.count is not None and self.slow.count is not None:
            least = self.fast.count.least(machine)
            lines.append(
                f"  counted limit {self.slow.count.operations / self.fast.count.operations:.1f} by operations; "
                f"{self.slow.seconds / least:.1f} were the fast side at the machine's rates ({least:.3f} s)"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def in_turns(n_turns, **sides):
    """Call each side once a turn, so that a busy machine slows all; the times and results of each.

    Each side takes the number of the turn, from 0 on.
    """
    times, results = {name: [] for name in sides}, {name: [] for name in sides}
    for turn in range(n_turns):
        for name, side in sides.items():
            spent, result = seconds(lambda side=side, turn=turn: side(turn))
            times[name].append(spent)
            results[name].append(result)
    return times, results


def median(values):
    """The median of some times."""
    return statistics.median(values)
