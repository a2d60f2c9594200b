"""NT-ASGD against its definition, and cycles against torch's one cycle and ULMFiT's rates."""

import copy
import io

import pytest
import torch
from torch import nn

from lstmx.text.optimisers import NTASGD, Cycle, Cycles


def model_and_steps(**options):
    """A module, its optimiser, and a function that does one step on random data."""
    module = nn.Linear(4, 3)
    optimizer = NTASGD(module.parameters(), lr=0.1, **options)

    def step():
        def closure():
            optimizer.zero_grad()
            loss = module(torch.randn(5, 4)).square().sum()
            loss.backward()
            return loss

        return optimizer.step(closure)

    return module, optimizer, step


def test_before_averaging_it_is_sgd():
    module, optimizer, step = model_and_steps(weight_decay=0.01)
    twin = copy.deepcopy(module)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.01)
    for k in range(5):
        torch.manual_seed(k)
        assert step().requires_grad
        torch.manual_seed(k)
        sgd.zero_grad()
        twin(torch.randn(5, 4)).square().sum().backward()
        sgd.step()
    assert not optimizer.averaging
    assert not optimizer.state
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def trigger(losses, n):
    """The index of the validation that the paper's Algorithm 1 triggers at."""
    logs = []
    for t, v in enumerate(losses):
        if t > n and v > min(logs[: t - n]):
            return t
        logs.append(v)
    return None


@pytest.mark.parametrize("n", [1, 2, 5])
def test_trigger_is_the_papers(n):
    draw = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(50):
        losses = (torch.randn(12, generator=draw) - 0.5 * torch.arange(12)).tolist()
        _, optimizer, _ = model_and_steps(patience=n)
        answers = [optimizer.validated(loss) for loss in losses]
        expected = trigger(losses, n)
        assert answers == [t == expected for t in range(12)]
        assert optimizer.averaging == (expected is not None)
        found.add(expected)
    assert len(found) > 2


def test_mean_of_the_steps_since():
    module, optimizer, step = model_and_steps(patience=1)
    step()
    for loss in (2.0, 1.0, 3.0):
        optimizer.validated(loss)
    seen = []
    for _ in range(7):
        step()
        seen.append(module.weight.detach().clone())
    last = module.weight.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(module.weight, torch.stack(seen).mean(0))
    assert torch.equal(module.weight, last)


def test_state_dict_goes_on_exactly():
    module, optimizer, step = model_and_steps(patience=1)
    for loss in (2.0, 1.0, 3.0):
        step()
        optimizer.validated(loss)
    step()
    file = io.BytesIO()
    torch.save([module.state_dict(), optimizer.state_dict()], file)
    twin, resumed, step_twin = model_and_steps()
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["losses"] == [2.0, 1.0, 3.0]
    for k in range(3):
        for one in (step, step_twin):
            torch.manual_seed(k)
            one()
    optimizer.swap()
    resumed.swap()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"lr": 1.0, "patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        NTASGD(nn.Linear(2, 2).parameters(), **options)


# ---- Cycles --------------------------------------------------------------------------------------


def adamw(depths=(0,)):
    layers = [nn.Linear(2, 2) for _ in depths]
    groups = [
        {"params": layer.parameters(), "depth": depth}
        for layer, depth in zip(layers, depths, strict=True)
    ]
    return torch.optim.AdamW(groups, betas=(0.95, 0.99)), layers


def followed(optimizer, schedule, steps):
    """The rates and beta1 of each group in each step."""
    seen = []
    for _ in range(steps):
        seen.append([(g["lr"], g["betas"][0]) for g in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("steps", [5, 7, 40, 101])
def test_a_cycle_is_torchs(steps):
    optimizer, _ = adamw()
    got = followed(optimizer, Cycles(optimizer, [Cycle(steps, 0.01)], momentum=(0.7, 0.8)), steps)
    twin, _ = adamw()
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        twin,
        0.01,
        total_steps=steps,
        pct_start=0.25,
        final_div_factor=4000,
        base_momentum=0.7,
        max_momentum=0.8,
    )
    for (row,), (expected,) in zip(got, followed(twin, theirs, steps), strict=True):
        assert row == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_cycles_reach_the_peak_or_the_end(steps):
    optimizer, _ = adamw()
    rates = [row[0][0] for row in followed(optimizer, Cycles(optimizer, [Cycle(steps, 1.0)]), 4)]
    assert max(rates) == pytest.approx(1.0)
    assert steps == 1 or rates[steps - 1] == pytest.approx(1e-5)


def test_unfreezing_and_discriminative_rates():
    """Each stage's peak is divided by exactly 2.6 from one group to the one below."""
    optimizer, layers = adamw(depths=(0, 1, 1, 2))
    cycles = [Cycle(8, 0.02, 1), Cycle(12, 0.01, 2), Cycle(16, 0.001, None)]
    schedule = Cycles(optimizer, cycles, factor=2.6)
    trained = []
    rows = []
    for cycle in cycles:
        schedule.freeze()
        trained.append([layer.weight.requires_grad for layer in layers])
        rows.append(followed(optimizer, schedule, cycle.steps))
    assert trained == [
        [True, False, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    for cycle, stage in zip(cycles, rows, strict=True):
        depths = [g["depth"] for g in optimizer.param_groups]
        for row in stage:
            for (lr, beta), depth in zip(row, depths, strict=True):
                frozen = cycle.unfrozen is not None and depth >= cycle.unfrozen
                assert lr == (0.0 if frozen else row[0][0] / 2.6**depth)
                assert beta == row[0][1]
        assert max(row[0][0] for row in stage) == pytest.approx(cycle.lr)
        assert stage[0][0][0] == pytest.approx(cycle.lr / 25)
        assert stage[-1][0][0] == pytest.approx(cycle.lr / 1e5)


def test_schedule_resumes():
    def make():
        optimizer, _ = adamw(depths=(0, 1))
        return optimizer, Cycles(optimizer, [Cycle(5, 0.1, 1), Cycle(5, 0.1)], factor=2.6)

    whole = followed(*make(), 10)
    optimizer, schedule = make()
    first = followed(optimizer, schedule, 6)
    resumed, later = make()
    resumed.load_state_dict(optimizer.state_dict())
    later.load_state_dict(schedule.state_dict())
    assert first + followed(resumed, later, 4) == whole


@pytest.mark.parametrize("cycles", [[], [Cycle(0, 0.1)]])
def test_cycles_need_steps(cycles):
    with pytest.raises(ValueError, match="cycles must have at least one step each"):
        Cycles(adamw()[0], cycles)
