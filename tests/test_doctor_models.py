"""What models may be, and what is refused with a reason."""

import math

import pytest
import torch
from patients import Loop, Sequence, Transformer, classes, he, mlp, series, tokens
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import fastclip
from fastclip.doctor.sequences import _from_the_end

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def check(*args, **kwargs):
    return fastclip.check(*args, max_seconds=0, **kwargs)


def test_exactly_one_form():
    model, batch = mlp(nn.ReLU, 1), classes()
    ran = []
    model.register_forward_hook(lambda *_: ran.append(1))
    cases = {
        "pass batch=": {},
        "pass batch=(inputs": {"batch": batch},
        "not both": {"batch": batch, "loss_fn": CE, "step": lambda m: m(batch[0]).sum()},
        "(inputs, targets), got a Tensor": {"batch": batch[0], "loss_fn": CE},
        "(inputs, targets), got a tuple of 3": {"batch": (*batch, 1), "loss_fn": CE},
        "loss_fn: expected a function": {"batch": batch, "loss_fn": 3},
        "step: expected a function": {"step": 3},
        "optimizer: expected a torch.optim.Optimizer": {"batch": batch, "loss_fn": CE, "optimizer": 1e-3},
    }
    for message, arguments in cases.items():
        with pytest.raises(TypeError) as error:
            check(model, **arguments)
        assert message in str(error.value)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        check([model], batch, CE)
    with pytest.raises(ValueError, match="max_seconds"):
        fastclip.check(model, batch, CE, max_seconds=-1)
    assert not ran


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"0.weight has no shape yet: run model\(inputs\) once"),
        (lambda: nn.Linear(32, 3, device="meta"), r"weight has no values \(device meta\)"),
        (lambda: nn.Linear(32, 3).requires_grad_(False), "nothing to train"),
        (lambda: nn.ReLU(), "nothing to train"),
        (lambda: torch.jit.script(nn.Linear(32, 3)), "the model is compiled by torch.jit"),
        (lambda: nn.Linear(31, 3), "the forward pass failed: RuntimeError"),
    ],
)
def test_what_isnt_ready_is_refused(model, message):
    with pytest.raises(fastclip.DoctorError, match=message):
        check(model(), classes(), CE)


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(reduction="none"), lambda out, y: 1.0, lambda out, y: out.mean() * 1j]
)
def test_a_loss_is_one_number(loss_fn):
    with pytest.raises(fastclip.DoctorError, match="one real number"):
        check(mlp(nn.ReLU, 1), classes(), loss_fn)


def test_a_step_that_runs_another_model_is_told():
    other, (x, y) = mlp(nn.ReLU, 1), classes()
    with pytest.raises(fastclip.DoctorError, match="never called the model"):
        check(mlp(nn.ReLU, 1), step=lambda model: nn.functional.cross_entropy(other(x), y))


def test_the_gradients_are_those_of_torch():
    """Norms in the table against float64."""
    model, (x, y) = mlp(nn.Tanh, 3), classes()
    diagnosis = check(model, (x, y), CE)
    model.double()
    outputs, hidden = [], x.double()
    for layer in model:
        hidden = layer(hidden)
        if isinstance(layer, nn.Linear):
            hidden.retain_grad()
            outputs.append(hidden)
    nn.functional.cross_entropy(hidden, y).backward()
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    for row, layer, output in zip(diagnosis.rows, linear, outputs, strict=True):
        assert row.output_grad == pytest.approx(float(output.grad.norm()), rel=1e-5)
        own = math.hypot(float(layer.weight.grad.norm()), float(layer.bias.grad.norm()))
        assert row.weight_grad == pytest.approx(own, rel=1e-5)
        assert row.std == pytest.approx(float(output.detach().std(correction=0)), rel=1e-5)
        assert row.weight_std == pytest.approx(float(layer.weight.detach().std(correction=0)), rel=1e-5)
    first = x.double() @ linear[0].weight.detach().T
    assert diagnosis.rows[0].gain == pytest.approx(
        float(first.square().mean().sqrt() / x.square().mean().sqrt()), rel=1e-4
    )


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_every_magnitude_gives_the_same_trend(factor):
    model, batch = mlp(nn.Sigmoid, 8), classes()
    finding = next(f for f in check(model, batch, CE).findings if f.code == "vanishing-depth")
    scaled = check(model, batch, lambda out, y: CE(out.double(), y) * factor if factor > 1 else CE(out, y) * factor)
    last = max(row.output_grad for row in scaled.rows)
    assert last == pytest.approx(0.1 * factor, rel=0.5)
    if factor >= 1e-20:  # below, the first layers' gradients are 0 in float32
        assert next(f for f in scaled.findings if f.code == "vanishing-depth").numbers["growth"] == pytest.approx(
            finding.numbers["growth"], rel=1e-2
        )


def test_large_and_small_activations_are_measured():
    for factor in (1e-30, 1e25):
        model, batch = nn.Linear(32, 3, bias=False), (torch.randn(64, 32) * factor, factor)
        row = check(model, batch, lambda out, by: (out / by).mean()).rows[0]
        assert row.gain == pytest.approx(3**-0.5, rel=0.3)
        assert row.std == pytest.approx(factor * 3**-0.5, rel=0.3)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 16), nn.Linear(16, 1)
        with torch.no_grad():
            self.rnn.weight_hh_l0.mul_(0.3)

    def forward(self, x):
        _, last = self.rnn(x)
        return self.head(last[-1])


def test_packed_sequences_are_aligned_at_their_ends():
    lengths = [20, 14, 9]
    sequences = [torch.randn(length, 4) for length in lengths]
    model, y = Packed(), torch.randn(3, 1)
    packed = check(model, (pack_sequence(sequences), y), MSE)
    (curve,) = packed.curves
    leaves = [s.clone().requires_grad_() for s in sequences]
    out = torch.cat([model(leaf[:, None]) for leaf in leaves])
    grads = torch.autograd.grad(MSE(out, y), leaves)
    expected = []
    for back in range(20, 0, -1):
        own = [float(g[-back].norm()) for g in grads if len(g) >= back]
        expected.append(math.hypot(*own))
    assert curve.norms == pytest.approx(expected, rel=1e-4)
    assert "vanishing-time" in packed.codes
    padded = nn.utils.rnn.pad_sequence(sequences)
    again = pack_padded_sequence(padded, torch.tensor(lengths))
    assert check(model, (again, y), MSE).curves[0].norms == pytest.approx(curve.norms, rel=1e-5)


def test_packed_sequences_under_another_default_device():
    """torch keeps their sizes on the CPU."""
    packed = pack_sequence([torch.arange(length) for length in (4, 2, 1)])
    with torch.device("meta"):
        rows = _from_the_end(packed.data, packed.batch_sizes)
    assert [row.tolist() for row in rows] == [[0], [1], [0, 2], [0, 1, 3]]


class Heads(nn.Linear):
    def forward(self, x):
        return super().forward(x).view(len(x), -1, 4).flatten(1)[:, :12].view(len(x), -1, 4)


class Embedding(nn.LSTM):
    """Embeds by itself, and takes its input by another name."""

    def __init__(self):
        super().__init__(4, 8, batch_first=True)
        self.table = nn.Embedding(8, 4)

    def forward(self, ids):
        return super().forward(self.table(ids))[0][:, -1]


def test_layers_of_ones_own_may_take_and_give_what_they_like():
    heads = nn.Sequential(Heads(8, 12), nn.Flatten(), nn.Linear(12, 3))
    embedding = nn.Sequential(Embedding(), nn.Linear(8, 3))
    for model, inputs in ((heads, torch.randn(40, 8)), (embedding, torch.randint(8, (40, 9)))):
        diagnosis = check(model, (inputs, torch.randint(3, (40,))), CE)
        assert diagnosis.rows
        assert all(finding.severity != "error" for finding in diagnosis.findings)


def test_what_follows_a_nan_is_not_judged_by_it():
    model = nn.Sequential(nn.Linear(8, 3), nn.LogSoftmax(1))
    x, y = torch.randn(40, 8), torch.randint(3, (40,))
    x[3, 2] = math.nan
    assert "nll-without-log" not in check(model, (x, y), nn.NLLLoss()).codes


def test_a_parameter_without_elements_has_no_gradient_that_is_missed():
    model = nn.Linear(8, 3)
    model.empty = nn.Parameter(torch.zeros(0))
    batch = torch.randn(40, 8), torch.randint(3, (40,))
    diagnosis = check(model, step=lambda m: CE(m(batch[0]), batch[1]) + m.empty.sum())
    assert "zero-gradient" not in diagnosis.codes


def test_padding_behind_the_last_step_is_no_trend():
    class Padded(Sequence):
        def forward(self, x):
            return self.head(self.rnn(x)[0][:, 9])

    model, batch = Padded(nn.RNN(4, 16, batch_first=True)), series(60)
    diagnosis = check(model, batch, MSE)
    (curve,) = diagnosis.curves
    assert curve.norms[10:] == (0.0,) * 50
    assert min(curve.norms[:10]) > 1e-3 * max(curve.norms[:10])
    assert "vanishing-time" not in diagnosis.codes


def test_a_compiled_model_is_seen_inside():
    model, batch = mlp(nn.Sigmoid, 10), classes()
    expected = check(model, batch, CE)
    assert check(torch.compile(model, backend="eager"), batch, CE).to_json() == expected.to_json()
    model.compile(backend="eager")
    assert check(model, batch, CE).to_json() == expected.to_json()


def test_nothing_is_compiled_during_a_check_and_all_of_it_after():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.compile(mlp(nn.Tanh, 1), backend=backend)

        def forward(self, x):
            return self.inner(x)

    model, batch = Holder(), classes()
    assert len(fastclip.check(model, batch, CE).rows) == 2
    assert not graphs
    model(batch[0])
    assert len(graphs) == 1  # torch.compile hasn't given up on it


def test_layers_that_run_several_times():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(32, 3))
    diagnosis = check(model, classes(), CE)
    assert [(row.layer, row.call) for row in diagnosis.rows] == [("0", 1), ("0", 2), ("0", 3), ("5", 1)]
    assert "\n0 (call 3 of 3)" in str(diagnosis)
    assert len({row.weight_grad for row in diagnosis.rows[:3]}) == 1


def test_a_loop_has_one_row_in_the_text():
    text = str(check(Loop(nn.GRUCell(4, 8), None), series(20), MSE))
    assert [line.split("  ")[0] for line in text.splitlines()[3:5]] == ["cell (call 1 of 20)", "head"]


def test_layers_are_in_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(32, 3), nn.Linear(32, 32)

        def forward(self, x):
            return self.last(self.first(x).tanh())

    assert [row.layer for row in check(Backwards(), classes(), CE).rows] == ["first", "last"]


def test_evaluation_mode_is_looked_at_in_training_mode():
    model, modes = mlp(nn.ReLU, 1), []
    model.append(nn.Dropout(0.5))
    model[-1].register_forward_hook(lambda module, *_: modes.append(module.training))
    check(model.eval(), classes(), CE)
    model.train()
    model[-1].eval()
    check(model, classes(), CE)
    model[0] = nn.Linear(model[0].in_features, model[0].out_features)  # on a pretrained one
    check(model.eval(), classes(), CE)
    model[0].train()
    check(model, classes(), CE)
    model.append(nn.Dropout(0.5))  # in training mode, which it minds
    check(model, classes(), CE)
    assert modes == [True, False, True, True, False]
    for mode in (torch.no_grad, torch.inference_mode):
        batch = classes()
        with mode():
            assert check(model, batch, CE).total_norm > 0


class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(12, 3)

    def forward(self, batch):
        return self.head(torch.cat([self.embed(batch["word"]), batch["rest"]], dim=1))


def test_what_has_no_scale_is_said():
    batch = {"word": torch.randint(9, (64,)), "rest": torch.randn(64, 8)}
    diagnosis = check(Dicts(), (batch, torch.randint(3, (64,))), CE)
    assert diagnosis.healthy
    assert any("inputs['word']: torch.int64 has none" in note for note in diagnosis.notes)
    batch["rest"][3, 2] = math.nan
    diagnosis = check(Dicts(), (batch, torch.randint(3, (64,))), CE)
    assert diagnosis.findings[0].code == "nonfinite-input"
    assert diagnosis.findings[0].where == ("inputs['rest']",)


def test_the_cure_of_an_infinite_input_is_one_that_works():
    inputs, targets = classes()
    for value, first in ((math.nan, False), (math.inf, True)):
        inputs[3] = value
        diagnosis = fastclip.check(mlp(nn.ReLU, 2), (inputs, targets), nn.CrossEntropyLoss(), max_seconds=0)
        (found,) = [finding for finding in diagnosis.findings if finding.code == "nonfinite-input"]
        assert ("make NaN of Inf" in found.advice) == first


def test_a_gradient_that_breaks_in_the_loss_is_said_to():
    diagnosis = fastclip.check(
        mlp(nn.ReLU, 2), classes(), lambda out, y: (out - out.detach()).square().sum().sqrt(), max_seconds=0
    )
    (found,) = [finding for finding in diagnosis.findings if finding.code == "nonfinite-gradient"]
    assert found.message.endswith("when the gradient has come back as far as the loss")


def test_layers_inside_of_a_transform_are_said():
    model, (x, y) = mlp(nn.ReLU, 1), classes()
    diagnosis = check(model, step=lambda model: CE(torch.vmap(model)(x), y))
    assert any("torch.func" in note for note in diagnosis.notes)
    assert diagnosis.total_norm > 0


def test_a_softmax_over_classes_is_no_attention():
    model, (x, y) = Transformer(1), tokens()

    def sure(model):
        chances = (100 * model(x)).reshape(8, 12, 50).softmax(dim=-1)
        return -chances.flatten(0, 1)[torch.arange(96), y].mean()

    assert "attention-saturated" not in check(model, step=sure).codes


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 1)
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint(self.rnn, x, use_reentrant=self.reentrant)[0][:, -1])


def test_a_reentrant_checkpoint_is_refused():
    x, y = series()
    with pytest.raises(fastclip.DoctorError, match="use_reentrant=False"):
        check(Checkpointed(reentrant=True), (x.requires_grad_(), y), MSE)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


def test_what_else_models_do():
    """Checkpoints, sparse gradients, autocast, gradient penalties, complex numbers, no samples, one sample."""
    assert check(Checkpointed(), series(), MSE).healthy
    words = torch.randint(50, (64, 5)), torch.randint(3, (64,))
    model = Sparse()
    assert fastclip.check(model, words, CE, torch.optim.SGD(model.parameters(), lr=0.1)).healthy
    model, (x, y) = mlp(nn.ReLU, 1), classes()

    def mixed(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return CE(model(x), y)

    assert fastclip.check(model, step=mixed).healthy

    def penalised(model):
        z = x.clone().requires_grad_()
        out = model(z)
        (slope,) = torch.autograd.grad(out.sum(), z, create_graph=True)
        return CE(out, y) + (slope.norm(dim=1) - 1).square().mean()

    assert fastclip.check(model, step=penalised).healthy
    plain = check(model, (x, y), CE).rows[-1].output_grad
    (row,) = [row for row in check(model, step=lambda m: penalised(m) * 0 + CE(m(x), y)).rows if row.call == 2][-1:]
    assert row.output_grad == pytest.approx(plain, rel=1e-4)  # and not the gradient that the penalty asked for

    def attends(model):
        hidden = model(x)[None]
        return nn.functional.scaled_dot_product_attention(hidden, hidden, hidden).square().mean()

    assert check(model, step=attends).healthy
    spectrum = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    assert check(spectrum, step=lambda model: CE(torch.fft.fft(model(x)).abs(), y)).healthy
    assert check(model, (x[:1], y[:1]), CE).healthy
    empty = check(model, (x[:0], y[:0]), CE)
    assert empty.findings[0].code == "nonfinite-loss"
    assert "softmax-twice" not in empty.codes
    ignored = check(model, (x, torch.full_like(y, -100)), CE)
    assert "made by nll_loss_forward in the loss" in ignored.findings[0].message


def test_few_samples_are_said():
    diagnosis = check(mlp(nn.ReLU, 8), classes(4), CE)
    assert max(row.dead for row in diagnosis.rows[:-1]) >= 0.5  # by chance: hardly any samples
    assert "dead-units" not in diagnosis.codes
    assert any("dead units" in note for note in diagnosis.notes)


def test_frozen_layers_in_front_have_no_gradient():
    model = mlp(nn.ReLU, 2, he)
    model[0].requires_grad_(False)
    first, second, *_ = check(model, classes(), CE).rows
    assert math.isnan(first.output_grad)
    assert math.isnan(first.weight_grad)
    assert second.output_grad > 0


def test_the_operation_that_makes_the_first_nan_is_named():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = mlp(nn.ReLU, 1), nn.Linear(3, 3)

        def forward(self, x):
            hidden = self.encoder(x)
            return self.decoder(torch.log(hidden))

    (finding, *_) = check(Bad(), classes(), CE).findings
    assert finding.code == "nonfinite-loss"
    assert "made by log in the model" in finding.message
    assert "softplus" in finding.advice
    assert finding.numbers["low"] < 0


def test_a_mask_is_not_the_first_nan():
    def loss(model):
        out = model(tokens()[0].clamp_max(49)).reshape(8, 12, 50)
        masked = out.masked_fill(torch.arange(50) > 40, -math.inf)
        return torch.sqrt(-masked.softmax(-1).square().mean())

    finding = check(Transformer(1), step=loss).findings[0]
    assert "made by sqrt in the loss" in finding.message


def test_the_step_back_that_makes_the_first_nan_is_named():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 3)

        def forward(self, x):
            hidden = self.a(x)
            return self.b((hidden - hidden.detach()).square().sqrt())

    (finding, *_) = check(Bad(), classes(), CE).findings
    assert finding.code == "nonfinite-gradient"
    assert "SqrtBackward0" in finding.message
    assert finding.where == ("b",)
    assert "torch.sqrt(x + 1e-8)" in finding.advice
