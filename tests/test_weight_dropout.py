"""Weight dropout: the mask's bits and statistics, and what the modules do with it."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lstmx
from lstmx import reference

SEED = torch.tensor(-(2**63) + 12345)
MODULES = [lstmx.LSTM, lstmx.GRU]
CELLS = [lstmx.LSTMCell, lstmx.GRUCell]


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (12, 3), (9, 17), (260, 65), (6000, 700)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 / 3, 0.999, 1.0])
def test_mask_equals_reference(size, p):
    mask = lstmx.weight_mask(SEED, size, p)
    assert torch.equal(mask, reference.weight_mask(SEED, size, p))
    assert mask.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_mask_dtypes(dtype):
    mask = lstmx.weight_mask(SEED, (20, 5), 0.25, dtype=dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, reference.weight_mask(SEED, (20, 5), 0.25, dtype=dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share(p):
    count = 1_000_000
    kept = (lstmx.weight_mask(SEED, (count // 100, 100), p) > 0).sum().item()
    assert abs(kept - count * (1 - p)) < 5 * (count * p * (1 - p)) ** 0.5


def test_the_composite_draws_the_same_mask():
    seeds = torch.tensor([1, -5, 2**40])
    batched = torch.func.vmap(lambda seed: lstmx.weight_mask(seed, (12, 3), 0.5))(seeds)
    for seed, mask in zip(seeds, batched, strict=True):
        assert torch.equal(mask, lstmx.weight_mask(seed, (12, 3), 0.5))


def correlation(a, b):
    return torch.corrcoef(torch.stack([(a > 0).flatten(), (b > 0).flatten()]).double())[0, 1].abs()


@pytest.mark.parametrize(
    ("first", "second"), [(0, 1), (7, -7), (5, 5 + 2**32), (2**62, 2**62 + 1), (-1, 0)]
)
def test_masks_of_different_seeds_are_independent(first, second):
    masks = [lstmx.weight_mask(torch.tensor(seed), (400, 100), 0.5) for seed in (first, second)]
    assert correlation(*masks) < 5 / 40_000**0.5


def masks_seen_by(module):
    """The masks of one call: units fed nothing but a one-hot state show the columns of W_hh."""
    seen = []
    original = torch.ops.lstmx.lstm_sequence

    def spy(*args, seed=None, weight_dropout=0.0, **kwargs):
        seen.append(lstmx.weight_mask(seed, args[4].shape, weight_dropout))
        return original(*args, seed=seed, weight_dropout=weight_dropout, **kwargs)

    torch.ops.lstmx.lstm_sequence = spy
    try:
        module(torch.randn(2, 3, module.input_size))
    finally:
        torch.ops.lstmx.lstm_sequence = original
    return seen


def test_every_layer_direction_and_call_has_its_own_mask():
    module = lstmx.LSTM(64, 64, num_layers=2, bidirectional=True, weight_dropout=0.5)
    masks = masks_seen_by(module) + masks_seen_by(module)
    assert len(masks) == 8
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert correlation(a, b) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("module_class", MODULES)
def test_module_equals_reference_module(module_class):
    """The same seeds from the same generator, in the same order; outputs and gradients."""
    options = {"num_layers": 2, "bidirectional": True, "weight_dropout": 0.5}
    ours = module_class(5, 7, dtype=torch.float64, **options)
    oracle = getattr(reference, module_class.__name__)(5, 7, dtype=torch.float64, **options)
    oracle.load_state_dict(ours.state_dict())
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    for module in (ours, oracle):
        torch.manual_seed(5)
        module(x)[0].square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("module_class", MODULES)
def test_the_generator_is_touched_only_when_a_mask_is_due(module_class):
    x = torch.randn(2, 3, 5)
    before = torch.get_rng_state()
    module_class(5, 7, weight_dropout=0.5)
    torch.set_rng_state(before)
    module = module_class(5, 7)
    after = torch.get_rng_state()
    module(x)
    module.weight_dropout = 0.5
    module.eval()(x)
    assert torch.equal(torch.get_rng_state(), after)
    module.train()(x)
    assert not torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("module_class", MODULES + CELLS)
def test_training_mode_only(module_class):
    module = module_class(5, 7, weight_dropout=0.5)
    x = torch.randn(2, 3, 5) if module_class in MODULES else torch.randn(3, 5)
    state = torch.randn(1, 3, 7) if module_class in MODULES else torch.randn(3, 7)
    hx = (state, state) if "LSTM" in module_class.__name__ else state

    def run():
        out = module(x, hx)
        return out[0] if isinstance(out, tuple) else out

    assert not torch.equal(run(), run())
    torch.manual_seed(1)
    first = run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    module.eval()
    assert torch.equal(run(), run())


@pytest.mark.parametrize("module_class", MODULES)
def test_p_of_one_drops_every_recurrent_weight(module_class):
    module = module_class(5, 7, weight_dropout=1.0)
    zeroed = copy.deepcopy(module)
    zeroed.weight_dropout = 0.0
    nn.init.zeros_(zeroed.weight_hh_l0)
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(module(x), zeroed(x))
    module(x)[0].sum().backward()
    assert torch.equal(module.weight_hh_l0.grad, torch.zeros_like(module.weight_hh_l0))


@pytest.mark.parametrize("module_class", MODULES + CELLS)
def test_nothing_is_added_to_the_module(module_class):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = module_class(5, 7, weight_dropout=0.5)
        torch_module = getattr(nn, module_class.__name__)(5, 7)
        x = torch.randn(2, 3, 5) if module_class in MODULES else torch.randn(3, 5)
        module(x)
    assert module.state_dict().keys() == torch_module.state_dict().keys()
    assert [*dict(module.named_buffers())] == []
    weights = {name: p.clone() for name, p in module.named_parameters()}
    module(x)
    for name, p in module.named_parameters():
        assert torch.equal(p, weights[name])


@pytest.mark.parametrize("module_class", MODULES + CELLS)
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), "half", True])
def test_not_a_probability(module_class, p):
    with pytest.raises(ValueError, match=r"weight_dropout must be a probability in \[0, 1\], got"):
        module_class(5, 7, weight_dropout=p)


@pytest.mark.parametrize("module_class", MODULES + CELLS)
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_not_a_probability_set_later(module_class, p):
    module = module_class(5, 7)
    module.weight_dropout = p
    with pytest.raises(ValueError, match=r"weight_dropout must be a probability in \[0, 1\], got"):
        module(torch.randn(2, 3, 5) if module_class in MODULES else torch.randn(3, 5))


def test_keyword_only():
    with pytest.raises(TypeError):
        lstmx.LSTM(5, 7, 1, True, False, 0.0, False, 0, None, None, 0.5)


def test_activation_checkpointing_reproduces_the_mask():
    module = lstmx.LSTM(5, 7, weight_dropout=0.5)
    x = torch.randn(4, 3, 5, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
        else:
            y = module(x)[0]
        grads.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_projections_are_masked_too():
    module = lstmx.LSTM(5, 7, proj_size=3, weight_dropout=1.0, batch_first=True)
    zeroed = nn.LSTM(5, 7, proj_size=3, batch_first=True)
    zeroed.load_state_dict(module.state_dict())
    nn.init.zeros_(zeroed.weight_hh_l0)
    x = torch.randn(4, 3, 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
        torch.testing.assert_close(module(x), zeroed(x))
