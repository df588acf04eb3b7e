"""What an open block of inject or ablate leaves alone, and what is left when it ends."""

import inspect

import pytest
import torch
from conftest import random_model
from steering import Fixed, by_hand, generated, last_logits, normal, padded, pristine, rows_of

from fvlens.interventions import ablate, inject, resid_hook, z_hook
from fvlens.interventions._context import _Dispatcher

pytestmark = pytest.mark.usefixtures("left_clean")


def test_no_tensor_of_the_caller_is_written_to(tiny, generator):
    vector, z = normal(32, generator=generator), normal(4, 8, generator=generator)
    tokens, mask = padded(tiny, rows_of(tiny))
    kept = [t.clone() for t in (vector, z, tokens, mask)]
    seen: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []

    def look(x, hook):
        seen.append(x)
        copies.append(x.clone())

    with tiny.hooks(fwd_hooks=[(resid_hook(1), look), (z_hook(1), look)]):
        with inject(tiny, Fixed({resid_hook(1): vector, z_hook(1): z}), scale=2.0), ablate(tiny, [(1, 0)]):
            tiny(tokens, attention_mask=mask)
            generated(tiny, tokens)
    assert all(torch.equal(a, b) for a, b in zip((vector, z, tokens, mask), kept, strict=True))
    assert len(seen) > 4 and all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


def test_the_global_generator_is_left_alone(tiny, generator):
    torch_state = torch.get_rng_state()
    with inject(tiny, Fixed({resid_hook(1): normal(32, generator=generator)})), ablate(tiny, [(0, 0)], positions="all"):
        generated(tiny, padded(tiny, rows_of(tiny))[0])
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_train_mode_is_left_alone(generator):
    own = random_model().train()
    with inject(own, Fixed({resid_hook(1): normal(32, generator=generator)})):
        own(torch.tensor([[1, 2]]))
    assert own.training


def test_hooks_of_the_user_stay_and_ours_go(generator):
    own = random_model()
    calls: list[str] = []

    def note(name):
        def hook(x, hook):
            calls.append(name)

        return hook

    own.add_hook(resid_hook(1), note("before"))
    own.add_perma_hook(resid_hook(1), note("permanent"))
    own.add_hook(resid_hook(1), note("backward"), dir="bwd")
    steering = Fixed({resid_hook(1): normal(32, generator=generator)})
    with inject(own, steering):
        own.add_hook(resid_hook(1), note("inside"))
        with own.hooks(fwd_hooks=[(resid_hook(1), note("context"))]):
            own(torch.tensor([[1, 2]])).sum().backward()
    assert calls == ["before", "permanent", "inside", "context", "backward"]
    calls.clear()
    own(torch.tensor([[1, 2]])).sum().backward()
    assert calls == ["before", "permanent", "inside", "backward"]
    point = own.hook_dict[resid_hook(1)]
    foreign = [hook for hook in point._forward_hooks.values() if not isinstance(hook, _Dispatcher)]
    assert len(point.fwd_hooks) == len(foreign) == 3 and len(point.bwd_hooks) == 1


def test_reset_hooks_inside_does_not_end_the_block(tiny, generator):
    tokens = torch.tensor([[1, 2, 3]])
    plain = tiny(tokens)
    with inject(tiny, Fixed({resid_hook(1): normal(32, generator=generator)})):
        steered = tiny(tokens)
        tiny.reset_hooks()
        tiny.run_with_cache(tokens)
        assert torch.equal(tiny(tokens), steered)
        tiny.reset_hooks(including_permanent=True)  # by another thread, say: the block is not its own to end
        assert torch.equal(tiny(tokens), steered) and not torch.equal(steered, plain)
    assert torch.equal(tiny(tokens), plain)


def test_the_cache_shows_the_steered_activation(tiny, generator):
    vector = normal(32, generator=generator)
    tokens = torch.tensor([[1, 2, 3]])
    _, before = tiny.run_with_cache(tokens)
    with inject(tiny, Fixed({resid_hook(0): vector})):
        _, after = tiny.run_with_cache(tokens)
    torch.testing.assert_close(after[resid_hook(0)][0, -1], before[resid_hook(0)][0, -1] + vector)
    assert torch.equal(after[resid_hook(0)][0, :-1], before[resid_hook(0)][0, :-1])


def test_a_generate_of_the_user_is_put_back(generator):
    own = random_model()
    inner = own.generate
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    own.generate = counted
    steering = Fixed({resid_hook(1): normal(32, generator=generator)})
    want = by_hand(own, torch.tensor([[3, 4]]), steering.tensors[resid_hook(1)], every=False)[0]
    with inject(own, steering):
        assert own.generate is not counted
        assert torch.equal(generated(own, torch.tensor([[3, 4]]))[0], want)
    assert own.generate is counted and calls == [1]


def test_a_generate_put_there_inside_the_block_stays(generator):
    own = random_model()
    with inject(own, Fixed({resid_hook(1): normal(32, generator=generator)})):
        wrapper = own.generate

        def outer(*args, **kwargs):
            return wrapper(*args, **kwargs)

        own.generate = outer
        generated(own, torch.tensor([[3, 4]]))
    assert own.generate is outer
    unsteered = generated(own, torch.tensor([[3, 4]]))[1]
    del own.generate
    assert torch.equal(generated(own, torch.tensor([[3, 4]]))[1], unsteered)


def test_a_generating_method_that_is_an_attribute_keeps_its_signature(tiny, generator):
    before = inspect.signature(tiny.generate)
    with inject(tiny, Fixed({resid_hook(1): normal(32, generator=generator)})):
        assert inspect.signature(tiny.generate) == before
        tiny(torch.tensor([[1]]))


# --- leaving the block ---


@pytest.mark.parametrize("make", [lambda m, v: inject(m, Fixed({resid_hook(1): v})), lambda m, v: ablate(m, [(1, 2)])])
def test_an_exception_passes_and_nothing_stays(tiny, generator, make):
    tokens = torch.tensor([[1, 2, 3]])
    want = tiny(tokens)
    with pytest.raises(KeyError, match="mine"), make(tiny, normal(32, generator=generator)):  # no forward: still mine
        raise KeyError("mine")
    assert pristine(tiny) and torch.equal(tiny(tokens), want)


def test_an_exception_in_generate_does_not_spoil_the_next_run(tiny, generator):
    vector = normal(32, generator=generator)
    tokens = torch.tensor([[1, 2, 3]])
    want = by_hand(tiny, tokens, vector, every=False)
    n_runs = 0

    def fail_late(x, hook):
        nonlocal n_runs
        n_runs += 1
        if n_runs == 3:
            raise KeyError("third token")

    with inject(tiny, Fixed({resid_hook(1): vector})):
        with pytest.raises(KeyError, match="third token"), tiny.hooks(fwd_hooks=[(resid_hook(2), fail_late)]):
            generated(tiny, tokens)
        torch.testing.assert_close(tiny(tokens)[:, -1], want[1][:, 0])
        got = generated(tiny, tokens)
    assert torch.equal(got[0], want[0])


def test_an_interrupted_inner_block_leaves_the_outer_one(tiny, generator):
    steering = Fixed({resid_hook(0): normal(32, generator=generator)})
    with inject(tiny, steering):
        want = last_logits(tiny, rows_of(tiny))
        with pytest.raises(KeyboardInterrupt), inject(tiny, steering):
            raise KeyboardInterrupt
        assert torch.equal(last_logits(tiny, rows_of(tiny)), want)


def test_blocks_may_end_in_another_order(tiny, generator):
    a, b = normal(32, generator=generator), normal(32, generator=generator)
    tokens = torch.tensor([[3, 4, 5]])
    first, second = inject(tiny, Fixed({resid_hook(1): a})), inject(tiny, Fixed({resid_hook(1): b}))
    first.__enter__()
    second.__enter__()
    both = generated(tiny, tokens)
    first.__exit__(None, None, None)
    rest = generated(tiny, tokens, use_past_kv_cache=False)
    second.__exit__(None, None, None)
    assert pristine(tiny)
    torch.testing.assert_close(both[1], by_hand(tiny, tokens, a + b, every=False)[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rest[1], by_hand(tiny, tokens, b, every=False)[1], atol=1e-4, rtol=1e-4)


def test_a_hook_that_never_ran_is_an_error(tiny, generator):
    steering = Fixed({resid_hook(0): normal(32, generator=generator), z_hook(2): normal(4, 8, generator=generator)})
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError, match=r"inject: blocks\.0\.hook_resid_post, blocks\.2\.attn\.hook_z never ran"):
        with inject(tiny, steering):
            pass
    with pytest.raises(RuntimeError, match=r"^inject: blocks\.2\.attn\.hook_z never ran .*stop_at_layer"):
        with inject(tiny, steering):
            tiny(tokens, stop_at_layer=1)
    with pytest.raises(RuntimeError, match=r"never ran"), inject(tiny, steering):
        random_model()(tokens)
    with pytest.raises(RuntimeError, match=r"^ablate: blocks\.1\.attn\.hook_z never ran"), ablate(tiny, [(1, 0)]):
        tiny(tokens, stop_at_layer=1)
