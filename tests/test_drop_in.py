"""What code that was written for torch.nn expects of its modules, and what ours do beyond."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from fuzz import draw, fuzz
from torch import nn
from torch.func import functional_call, hessian, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import lstmx
from lstmx import ops, reference

NAMES = ("LSTM", "GRU")
CELLS = ("LSTMCell", "GRUCell")


def states(module, value):
    """The final states as a tuple."""
    return value if isinstance(module, (nn.LSTM, nn.LSTMCell)) else (value,)


# ---- torch's own test cases ----------------------------------------------------------------------

INFOS = [info for info in module_db if info.module_cls.__name__ in NAMES + CELLS]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_torchs_own_cases(info, training):
    """The inputs that torch tests its modules with, its reference functions, and its own module."""
    ours_class = getattr(lstmx, info.module_cls.__name__)
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}
    inputs = info.module_inputs_func(info, training=training, **options)
    assert inputs
    for case in inputs:
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        torch.manual_seed(0)
        ours = ours_class(*args, **kwargs).double().train(training)
        torch.manual_seed(0)
        theirs = info.module_cls(*args, **kwargs).double().train(training)
        forward = case.forward_input
        got = ours(*copy.deepcopy(forward.args), **copy.deepcopy(forward.kwargs))
        expected = theirs(*copy.deepcopy(forward.args), **copy.deepcopy(forward.kwargs))
        torch.testing.assert_close(got, expected)
        if case.reference_fn is not None:
            wanted = case.reference_fn(ours, *forward.args, **forward.kwargs)
            torch.testing.assert_close(got, wanted)


# ---- Types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_code_that_asks_for_the_type(name):
    ours, theirs = getattr(lstmx, name), getattr(nn, name)
    module = ours(3, 4)
    assert type(module) == theirs  # noqa: E721  (what such code does)
    assert type(module) in (nn.Linear, theirs)
    assert {theirs: "found"}[type(module)] == "found"
    assert ours == ours
    assert ours != getattr(nn, {"LSTM": "GRU", "GRU": "LSTM"}.get(name, "LSTM"))
    assert len({ours, lstmx.LSTM, lstmx.GRU, lstmx.LSTMCell, lstmx.GRUCell}) == 4

    class Named(ours):
        """A user's own."""

    assert type(Named(3, 4)) != theirs  # noqa: E721  (what such code does)
    assert Named == Named
    assert isinstance(Named(3, 4), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_an_initialiser_by_type_reaches_it(name):
    def initialise(m):
        if type(m) == nn.Linear:  # noqa: E721  (as in textbooks)
            nn.init.xavier_uniform_(m.weight)
        if type(m) == getattr(nn, name):  # noqa: E721  (as in textbooks)
            for parameter in m._flat_weights_names:
                if "weight" in parameter:
                    nn.init.constant_(m._parameters[parameter], 0.25)

    model = nn.Sequential(getattr(lstmx, name)(3, 4), nn.Linear(4, 2))
    model.apply(initialise)
    assert (model[0].weight_hh_l0 == 0.25).all()


# ---- Loading, moving, copying --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(name, swap, assign):
    source, target = getattr(nn, name)(3, 4, 2), getattr(lstmx, name)(3, 4, 2)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        target.load_state_dict(source.state_dict(), assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("name", NAMES)
def test_meta_to_empty_and_dtypes(name):
    with torch.device("meta"):
        module = getattr(lstmx, name)(3, 4)
    assert module.weight_ih_l0.is_meta
    assert module(torch.randn(2, 1, 3, device="meta"))[0].is_meta
    module = module.to_empty(device="cpu")
    source = getattr(nn, name)(3, 4)
    module.load_state_dict(source.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(module(x), source(x))
    assert module.double()(x.double())[0].dtype == torch.float64
    assert module.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_torch_save_of_the_whole_module(name):
    module = getattr(lstmx, name)(3, 4, weight_dropout=0.25)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is type(module)
    assert again.weight_dropout == 0.25
    assert repr(again) == repr(module)
    assert str(pickle.loads(pickle.dumps(again))) == str(module)


@pytest.mark.parametrize("name", NAMES)
def test_weights_deleted_tied_and_set_again(name):
    module, theirs = getattr(lstmx, name)(4, 4), getattr(nn, name)(4, 4)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, 4)
    weight = module.weight_hh_l0
    del module.weight_hh_l0
    module.weight_hh_l0 = nn.Parameter(2 * weight.detach())
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(2)
    torch.testing.assert_close(module(x), theirs(x))
    module.weight_hh_l0 = module.weight_ih_l0  # tied
    y = module(x)[0].sum()
    (tied,) = torch.autograd.grad(y, [module.weight_ih_l0])
    theirs.weight_hh_l0 = nn.Parameter(theirs.weight_ih_l0.detach().clone())
    found = torch.autograd.grad(
        theirs(x)[0].sum(), [theirs.weight_ih_l0, theirs.weight_hh_l0], materialize_grads=True
    )
    torch.testing.assert_close(tied, found[0] + found[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
def test_norms(name, wrap):
    module = getattr(lstmx, name)(3, 4)
    theirs = getattr(nn, name)(3, 4)
    theirs.load_state_dict(module.state_dict())
    normed = getattr(nn.utils.parametrizations, wrap)
    x = torch.randn(5, 2, 3)
    for m in (module, theirs):
        torch.manual_seed(0)
        normed(m, "weight_hh_l0")
        m.eval()  # spectral_norm's iteration moves in training
    torch.testing.assert_close(module(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_hooks(name):
    module = getattr(lstmx, name)(3, 4)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, out: seen.append("post"))
    module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    module(torch.randn(2, 1, 3, requires_grad=True))[0].sum().backward()
    assert seen == ["pre", "post", "backward"]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_do_no_needless_work(name):
    module = getattr(lstmx, name)(3, 4).requires_grad_(False)
    x = torch.randn(5, 2, 3)
    assert module(x)[0].grad_fn is None
    module.bias_hh_l0.requires_grad_()
    with torch.profiler.profile() as profile:
        module(x)[0].sum().backward()
    seen = [event.key for event in profile.key_averages()]
    assert "lstmx::_sequence_backward" in seen
    assert module.weight_hh_l0.grad is None
    assert module.bias_hh_l0.grad is not None


# ---- Beyond torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_replace_packing(name, options, batch_first):
    module = getattr(lstmx, name)(3, 5, batch_first=batch_first, dtype=torch.float64, **options)
    lengths = torch.tensor([2, 6, 1, 6, 4])
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    x = (x if batch_first else x.transpose(0, 1)).clone().requires_grad_()
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [rows, 5, 5]
    hx = [torch.randn(sizes, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    argument = tuple(hx) if name == "LSTM" else hx[0]

    y, last = module(x, argument, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    expected, expected_last = module(packed, argument)
    expected, _ = pad_packed_sequence(expected, batch_first=batch_first)
    results = []
    for out, final in ((y, last), (expected, expected_last)):
        loss = (out * out).sum() + sum(s.sin().sum() for s in states(module, final))
        wanted = [x, *hx[: len(states(module, final))], *module.parameters()]
        grads = torch.autograd.grad(loss, wanted)
        results.append([out, *states(module, final), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_of_length_zero_keeps_its_state():
    module = lstmx.LSTM(3, 4)
    h, c = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    y, (h_n, c_n) = module(torch.randn(5, 2, 3), (h, c), lengths=torch.tensor([0, 5]))
    assert torch.equal(y[:, 0], torch.zeros(5, 4))
    torch.testing.assert_close(h_n[:, 0], h[:, 0])
    torch.testing.assert_close(c_n[:, 0], c[:, 0])


def test_lengths_compile_without_looking_at_them():
    module = lstmx.LSTM(3, 4, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 3)
    for lengths in (torch.tensor([6, 2, 3]), torch.tensor([1, 5, 0])):
        torch.testing.assert_close(compiled(x, lengths=lengths), module(x, lengths=lengths))


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([1, 2], TypeError, "lengths must be a tensor of dtype int64, got list"),
        (torch.tensor([1.0, 2.0]), TypeError, "dtype int64, got torch.float32"),
        (torch.tensor([1, 2, 3]), ValueError, r"size \[B\] = \[2\], got \[3\]"),
        (torch.tensor([1, 6]), ValueError, r"from 0 to T = 5, got \[1, 6\]"),
        (torch.tensor([-1, 2]), ValueError, r"from 0 to T = 5, got \[-1, 2\]"),
    ],
)
def test_lengths_errors(lengths, error, words):
    with pytest.raises(error, match=words):
        lstmx.GRU(3, 4)(torch.randn(5, 2, 3), lengths=lengths)


def test_where_lengths_do_not_go():
    lengths = torch.tensor([2, 1])
    x = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="lengths must be None with unbatched input"):
        lstmx.GRU(3, 4)(x[:, 0], lengths=lengths)
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence"):
        lstmx.GRU(3, 4)(pack_padded_sequence(x, torch.tensor([5, 5])), lengths=lengths)
    with pytest.raises(ValueError, match="lengths must be None with proj_size"):
        lstmx.LSTM(3, 4, proj_size=2)(x, lengths=lengths)


@pytest.mark.parametrize("batch_first", [False, True])
def test_cell_states_of_all_steps(batch_first):
    module = lstmx.LSTM(3, 4, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(2, 5, 3) if batch_first else torch.randn(5, 2, 3)
    y, (h_n, c_n), c = module(x, return_cell_states=True)
    torch.testing.assert_close((y, (h_n, c_n)), module(x))
    assert c.shape == y.shape
    c = c.transpose(0, 1) if batch_first else c
    torch.testing.assert_close(c[-1, :, :4], c_n[2])
    torch.testing.assert_close(c[0, :, 4:], c_n[3])
    # h_t = o_t tanh(c_t), so no output is larger.
    assert ((y.transpose(0, 1) if batch_first else y).abs() <= c.tanh().abs() + 1e-6).all()
    lengths = torch.tensor([3, 5])
    _, (_, c_n), c = module(x, lengths=lengths, return_cell_states=True)
    c = c.transpose(0, 1) if batch_first else c
    torch.testing.assert_close(c[lengths - 1, torch.arange(2), :4], c_n[2])
    assert (c[3:, 0] == 0).all()


def test_cell_states_of_a_packed_sequence_and_unbatched():
    module = lstmx.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, torch.tensor([2, 5]), enforce_sorted=False)
    y, (_, c_n), c = module(packed, return_cell_states=True)
    padded, lengths = pad_packed_sequence(c)
    torch.testing.assert_close(padded[lengths - 1, torch.arange(2)], c_n[0])
    y, _, c = module(x[:, 0], return_cell_states=True)
    assert c.shape == y.shape == (5, 4)
    with pytest.raises(ValueError, match="return_cell_states must be False with proj_size"):
        lstmx.LSTM(3, 4, proj_size=2)(x, return_cell_states=True)


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_sequence_length_compiles_once(name):
    module = getattr(lstmx, name)(3, 4, 2, dropout=0.0, weight_dropout=0.5)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for T in (5, 7, 11, 4):
        y, _ = compiled(torch.randn(T, 2, 3))
        assert y.shape == (T, 2, 4)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_compiled_training_draws_eagers_masks_with_fallback_random(name):
    module = getattr(lstmx, name)(3, 16, weight_dropout=0.5)
    x = torch.randn(5, 2, 3)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(module, fullgraph=True)
        torch.manual_seed(7)
        got = compiled(x)[0]
    torch.manual_seed(7)
    torch.testing.assert_close(got, module(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_users_own_module_compiles_as_before(name):
    """Nothing global is changed: torch's still breaks the graph unless its own flag is set."""
    assert not torch._dynamo.config.allow_rnn
    theirs = getattr(nn, name)(3, 4)
    torch.compile(getattr(lstmx, name)(3, 4), fullgraph=True, backend="eager")(torch.randn(2, 1, 3))
    assert not torch._dynamo.config.allow_rnn
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(theirs, fullgraph=True, backend="eager")(torch.randn(2, 1, 3))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_and_double_backward_of_a_module(name):
    module = getattr(lstmx, name)(3, 4, weight_dropout=0.5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def penalty(call):
        torch.manual_seed(3)
        y = call(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(module.parameters()))

    plain = penalty(lambda x: module(x)[0])
    kept = penalty(lambda x: checkpoint(lambda x: module(x)[0], x, use_reentrant=False))
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_backward_in_eval_mode_and_deterministic_algorithms(name):
    module = getattr(lstmx, name)(3, 4, weight_dropout=0.5).eval()
    x = torch.randn(4, 2, 3, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(module(x)[0].sum(), x)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


TRANSFORMS = {
    "jvp": lambda m, x: jvp(lambda t: m(t)[0], (x,), (x,)),
    "vmap": lambda m, x: vmap(lambda t: m(t)[0])(torch.stack([x, 2 * x])),
    "ensemble": lambda m, x: vmap(lambda p: functional_call(m, p, (x,))[0])(
        {name: torch.stack([p, 2 * p]) for name, p in m.named_parameters()}
    ),
    "jacrev": lambda m, x: jacrev(lambda t: m(t)[0])(x),
    "hessian": lambda m, x: hessian(lambda t: m(t)[0].sum())(x),
}
# What torch.nn's modules cannot do on a CPU, in torch 2.13.
FAILS_IN_TORCH = {("LSTM", "jvp"), ("LSTM", "vmap"), ("LSTM", "ensemble"), ("LSTM", "hessian")}
FAILS_IN_TORCH |= {("GRU", "vmap"), ("GRU", "ensemble")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript, inside torch
def test_transforms_of_a_module(name, transform):
    module, theirs = getattr(lstmx, name)(3, 4), getattr(nn, name)(3, 4)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 3)
    call = TRANSFORMS[transform]
    got = call(module, x)
    if (name, transform) in FAILS_IN_TORCH:
        with pytest.raises(RuntimeError):  # NotImplementedError is one
            call(theirs, x)
        oracle = getattr(reference, name)(3, 4)
        oracle.load_state_dict(module.state_dict())
        theirs = oracle
    torch.testing.assert_close(got, call(theirs, x), rtol=1e-4, atol=1e-5)


# ---- convert and restore -------------------------------------------------------------------------


class Library(nn.Module):
    """A model as another library might have it: nested, shared, in lists, with a subclass."""

    class Highway(nn.LSTM):
        """Does something else in its forward."""

        def forward(self, x, hx=None):
            y, hx = super().forward(x, hx)
            return y + x, hx

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.1)
        self.layers = nn.ModuleList([nn.GRU(8, 8, batch_first=True), nn.LSTM(8, 8, proj_size=4)])
        self.shared = self.encoder
        self.cells = nn.ModuleDict({"a": nn.LSTMCell(8, 8), "b": nn.GRUCell(8, 8)})
        self.plain = nn.RNN(8, 8, batch_first=True)
        self.highway = self.Highway(8, 8, batch_first=True)

    def forward(self, x):
        x, _ = self.shared(self.encoder(x)[0])
        x, _ = self.layers[0](x)
        x, _ = self.highway(self.plain(x)[0])
        h, c = self.cells["a"](x[:, -1])
        return self.layers[1](self.cells["b"](h).unsqueeze(0))[0] + c[..., :4]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # of oneDNN
def test_convert_and_restore():
    torch.manual_seed(0)
    model = Library().eval()
    called = []
    model.encoder.register_forward_hook(lambda *_: called.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    encoder, parameters = model.encoder, list(model.parameters())
    x = torch.randn(3, 5, 8)
    expected = model(x)

    done = lstmx.convert(model)
    assert done.changed == ["encoder", "layers.0", "layers.1", "cells.a", "cells.b"]
    assert done.left == {
        "plain": "there is no kernel for RNN",
        "highway": "Highway is a subclass, and may do more than torch's",
    }
    assert "highway: left, Highway is a subclass" in str(done)
    assert type(model.encoder) is lstmx.LSTM
    assert model.encoder is encoder is model.shared
    assert not model.encoder.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    called.clear()
    torch.testing.assert_close(model(x), expected)
    assert called == ["hook", "hook"]
    model.train()(x).sum().backward()
    optimizer.step()
    copy.deepcopy(model)

    assert lstmx.convert(model).changed == []
    model.eval()
    expected = model(x)
    done = lstmx.restore(model)
    assert done.changed == ["encoder", "layers.0", "layers.1", "cells.a", "cells.b"]
    assert type(model.encoder) is nn.LSTM
    assert type(model.cells["b"]) is nn.GRUCell
    torch.testing.assert_close(model(x), expected)
    model.train()(x).sum().backward()


def test_convert_a_module_that_is_the_model_with_weight_dropout():
    model = nn.GRU(4, 6)
    before = model
    assert str(lstmx.convert(model, weight_dropout=0.5)) == "(the model): changed"
    assert model is before
    assert model.weight_dropout == 0.5
    x = torch.randn(7, 2, 4)
    assert not torch.equal(model(x)[0], model(x)[0])
    lstmx.restore(model)
    assert torch.equal(model(x)[0], model(x)[0])
    with pytest.raises(ValueError, match="weight_dropout must be a probability"):
        lstmx.convert(model, weight_dropout=2)
    assert type(model) is nn.GRU
    assert str(lstmx.convert(nn.Linear(2, 2))) == "no recurrent modules"


def test_what_convert_and_restore_leave():
    class Mine(lstmx.LSTM):
        """A user's own."""

    parametrized = nn.LSTM(3, 4)
    nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
    model = nn.ModuleDict({"p": parametrized, "mine": Mine(3, 4), "cell": nn.RNNCell(3, 4)})
    assert lstmx.convert(model).left == {
        "p": "it is parametrized; convert first, parametrize then",
        "cell": "there is no kernel for RNNCell",
    }
    assert lstmx.restore(model).left == {"mine": "Mine is a subclass of ours"}


@pytest.mark.filterwarnings("default")  # torch.ao warns that it moves to another package
def test_a_restored_model_can_be_quantized():
    model = nn.Sequential(nn.LSTM(8, 8)).eval()
    lstmx.convert(model)
    lstmx.restore(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    x = torch.randn(5, 2, 8)
    assert "quantized" in type(quantized[0]).__module__
    torch.testing.assert_close(quantized(x)[0], model(x)[0], rtol=0.1, atol=0.1)


# ---- Without the extension -----------------------------------------------------------------------

WITHOUT_EXTENSION = """
import sys, warnings
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "lstmx._C":
            raise ImportError("undefined symbol: _ZN3c10")
sys.meta_path.insert(0, Broken())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lstmx
assert len(caught) == 1, caught
words = str(caught[0].message)
assert "undefined symbol" in words and "pip install --no-build-isolation" in words, words
import torch
from torch import nn
torch.manual_seed(0)
for name in ("LSTM", "GRU"):
    ours = getattr(lstmx, name)(3, 4, 2, bidirectional=True)
    theirs = getattr(nn, name)(3, 4, 2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2]))
    torch.testing.assert_close(ours(packed)[0].data, theirs(packed)[0].data)
    ours(x, lengths=torch.tensor([2, 5]))
cell = lstmx.LSTMCell(3, 4, weight_dropout=0.5)
cell(torch.randn(2, 3))[0].sum().backward()
lstmx.LSTM(3, 4)(x, return_cell_states=True)
lstmx.weight_mask(torch.tensor(1), (2, 3), 0.5)
from lstmx.diagnostics import Shape, describe
print(describe([Shape(1, 2, 3, 4)]))
"""


def test_importing_works_without_the_extension():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not loaded: undefined symbol" in done.stdout
    assert "plain PyTorch, because the kernels are not loaded" in done.stdout


def test_diagnostics():
    done = subprocess.run(
        [sys.executable, "-m", "lstmx", "--shape", "70,80,400,1150", "--shape", "1,1,4,4"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        torch.__version__,
        "CPU kernels",
        "lstm 70,80,400,1150",
        "20664 KiB",
        "gru 1,1,4,4",
        "1 thread",
    ):
        assert words in done.stdout, (words, done.stdout)
    done = subprocess.run(
        [sys.executable, "-m", "lstmx", "--shape", "1,2"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "shape must be T,B,I,H, got '1,2'" in done.stderr


# ---- Fuzz ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # of oneDNN
def test_fuzz():
    found = fuzz(range(300))
    assert not found, "\n\n".join(found)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # of oneDNN
@pytest.mark.parametrize("defect", ["values", "gradient", "error"])
def test_fuzz_finds_a_planted_defect(defect, monkeypatch):
    real = ops._ops

    class Broken:
        gru_sequence = staticmethod(real.gru_sequence)

        @staticmethod
        def lstm_sequence(x, h0, *tensors, reverse, **options):
            if defect == "error" and x.size(0) == 1:
                raise ValueError
            if defect == "gradient":
                h0 = h0.detach()
            y, *rest = real.lstm_sequence(x, h0, *tensors, reverse=reverse, **options)
            return (y * 1.001 if defect == "values" and reverse else y, *rest)

    monkeypatch.setattr(ops, "_ops", Broken)
    found = fuzz(range(150))
    assert found
    seed = int(found[0].rsplit(" ", 1)[1])
    assert found[0].endswith(f"python tests/fuzz.py --seed {seed}")
    monkeypatch.undo()
    assert fuzz(range(seed, seed + 1)) == []
    assert draw(seed).seed == seed


# Found by fuzz.


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_states_of_another_dtype_are_torchs_error(name):
    module = getattr(lstmx, name)(3, 4)
    lead = () if name in CELLS else (1,)
    state = torch.randn(*lead, 2, 4, dtype=torch.float16)
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match="h0 must have the dtype of x"):
        module(x, (state, state) if name.startswith("LSTM") else state)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_without_hidden_units(name):
    module, theirs = getattr(lstmx, name)(3, 0), getattr(nn, name)(3, 0)
    x = torch.randn(2, 3, requires_grad=True)
    for a, b in zip(states(module, module(x)), states(theirs, theirs(x)), strict=False):
        assert a.shape == b.shape
