"""What people ask about: their losses and models, the cause that is told, and what only looks like one."""

import math

import pytest
import torch
from patients import classes, mlp, tokens
from torch import nn
from torch.nn import functional as F

import fastclip

CE = nn.CrossEntropyLoss()


def check(*args, **kwargs):
    return fastclip.check(*args, max_seconds=0, **kwargs)


def test_what_is_masked_after_it_was_nan_is_found_on_the_way_forward():
    """Its gradient is 0 times NaN; the step back that shows it is innocent."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 3) for _ in range(3))

        def forward(self, x):
            scores = self.q(x) @ self.k(x).T
            scores[5] = -math.inf  # no key is visible
            out = torch.softmax(scores, dim=-1) @ self.v(x)
            keep = torch.arange(len(x)) != 5
            return torch.where(keep[:, None], out, 0.0)

    (finding, *_) = check(Masked(), classes(), CE).findings
    assert finding.code == "nonfinite-gradient"
    assert "On the way forward NaN is made by _softmax in the model" in finding.message
    assert "leave one key visible" in finding.advice
    assert finding.numbers["parameters"] == 2.0  # those of the values


def test_a_gap_in_the_targets_that_is_filled_in_time_is_no_finding():
    x, y = torch.randn(64, 32), torch.randn(64, 3)
    y[3] = math.nan
    for loss in (
        lambda out, y: F.mse_loss(out, torch.where(y.isnan(), out.detach(), y)),
        lambda out, y: torch.where(y.isnan(), 0.0, out - y).square().mean(),
        lambda out, y: (out - y.nan_to_num()).square().mean(),
    ):
        assert check(mlp(nn.ReLU, 2), (x, y), loss).healthy


def test_weights_that_are_not_finite_are_named():
    x, y = classes()
    (finding, *rest) = check(
        mlp(nn.ReLU, 2), (x, y), nn.CrossEntropyLoss(weight=torch.tensor([1.0, math.inf, 1.0]))
    ).findings
    assert finding.code == "nonfinite-loss"
    assert finding.where == ("weight of CrossEntropyLoss",)
    assert "1 is Inf, among 3" in finding.message
    assert not rest
    late = torch.tensor([1.0, math.nan, 1.0])
    (finding, *_) = check(mlp(nn.ReLU, 2), step=lambda model: (model(x).log_softmax(1) * late).mean()).findings
    assert "mul in the loss gets a tensor of shape (3,) from outside of the model, of which 1 is NaN" in finding.message


CURED = {
    "a negative root": (lambda out, y: (out - out.mean()).sqrt().mean(), "clamp_min"),
    "a root at 0": (lambda out, y: (out - out.detach()).sqrt().mean(), "torch.sqrt(x + 1e-8)"),
    "a negative logarithm": (lambda out, y: out.log().mean(), "softplus"),
    "the logarithm of 0": (lambda out, y: (out * 0).log().mean(), "clamp_min"),
    "an overflow": (lambda out, y: (1e30 * out).pow(4).mean(), "scale what goes in"),
    "a negative base": (lambda out, y: (out - 1e3).pow(0.5).mean(), "clamp_min"),
    "0 times Inf": (lambda out, y: (0 * (out * 0 + 1e-30).reciprocal().pow(2)).mean(), "scale what goes in"),
    "nothing left": (lambda out, y: out[y > 9].mean(), "nothing is selected"),
    "one number": (lambda out, y: out[:1].std(0).mean(), "two samples at least"),
    "no target": (lambda out, y: F.cross_entropy(out, torch.full_like(y, -100)), "no target counts"),
    "too short": (
        lambda out, y: F.ctc_loss(out.log_softmax(1)[:2, None], torch.tensor([[1, 1, 2]]), (2,), (3,)),
        "zero_infinity=True",
    ),
}


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("case", CURED)
def test_advice_fits_what_the_operation_got(case):
    loss, cure = CURED[case]
    (finding, *_) = check(mlp(nn.ReLU, 2), classes(), loss).findings
    assert finding.code in ("nonfinite-loss", "nonfinite-gradient", "overflow")
    assert cure in finding.advice
    assert "nan" not in finding.message.partition("of ")[2]


def test_an_optimizer_of_other_parameters():
    model, batch = mlp(nn.ReLU, 2), classes()
    others = fastclip.ClippedOptimizer(torch.optim.Adam(mlp(nn.ReLU, 2).parameters()), max_norm=1.0)
    (finding, *_) = check(model, batch, CE, others).findings
    assert (finding.code, finding.severity) == ("optimizer-parameters", "error")
    (finding,) = check(model, batch, CE, torch.optim.Adam(model[:-1].parameters())).findings
    assert (finding.severity, finding.where) == ("info", ("4.weight", "4.bias"))
    model[-1].requires_grad_(False)
    assert check(model, batch, CE, torch.optim.Adam(model[:-1].parameters())).healthy


def test_other_models_in_a_step_are_no_lost_layers():
    critic, model, (x, _) = mlp(nn.ReLU, 1, width=3), mlp(nn.ReLU, 2), classes()
    assert check(model, step=lambda model: critic(model(x)).mean()).healthy


def test_a_loss_that_no_parameter_changes():
    (finding, *_) = check(mlp(nn.ReLU, 2), classes(), lambda out, y: (out * 0).sum() + 1.0).findings
    assert (finding.code, finding.severity) == ("zero-gradient", "error")
    assert "the loss is flat" in finding.advice


def test_a_bias_that_cancels_is_no_dead_unit():
    x, _ = classes()
    diagnosis = check(mlp(nn.ReLU, 2), step=lambda model: -F.logsigmoid(model(x)[:, 0] - model(x.flip(0))[:, 0]).mean())
    assert diagnosis.healthy


def test_numbers_that_are_mostly_0_have_a_size_of_their_own():
    _, y = classes()
    codes = F.one_hot(torch.randint(200, (64,)), 200).float()
    model = nn.Sequential(nn.Linear(200, 32), nn.ReLU(), nn.Linear(32, 3))
    assert check(model, (codes, y), CE).healthy
    words = F.normalize(torch.rand(64, 200) * (torch.rand(64, 200) < torch.logspace(-2, 0, 200) * 0.3))
    assert check(model, (words, y), CE).healthy


def test_a_mask_that_is_subtracted_is_no_target():
    x, _ = classes()

    def contrast(model):
        z = F.normalize(model(x), dim=1)
        return F.cross_entropy(z @ z.T - 1e4 * torch.eye(len(x)), torch.arange(len(x)) ^ 1)

    assert check(mlp(nn.ReLU, 2), step=contrast).healthy


def test_each_against_each_is_no_mistake_where_it_is_meant():
    x, _ = classes()
    known = torch.randn(64)

    def ranked(model):
        scores = model(x)[:, :1]
        return ((scores - known[None]).square() * 0.1 + (scores * known[None])).mean()

    assert "broadcast-loss" not in check(mlp(nn.ReLU, 2), step=ranked).codes


def test_a_head_that_shares_its_weight_with_the_embedding_is_sized_for_looking_up():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.body(self.embed(tokens)) / 8)

    tied, (tokens_, targets) = Tied(), tokens()
    assert "init-too-large" not in check(tied, (tokens_, targets), lambda out, y: out.square().mean()).codes


def test_layers_of_another_kind_are_said_not_to_be_seen():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(32))

        def forward(self, x):
            return (x * self.scale)[:, :3]

    assert any(note.startswith("layers: none was seen") for note in check(Own(), classes(), CE).notes)


def test_a_norm_beyond_all_measure_is_no_bound():
    x, y = classes()
    diagnosis = check(mlp(nn.ReLU, 2), (x, y), lambda out, y: 1e8 * CE(out, y))
    assert diagnosis.bound.max_norm == 1.0
    assert "symptom" in diagnosis.bound.why
    assert "gradient-scale" in diagnosis.codes


def test_float16_parameters_with_an_eps_that_float16_has():
    x, y = classes()
    for settings, sick in (({}, True), ({"eps": 1e-4}, False), ({"fused": True}, False)):
        model = mlp(nn.ReLU, 2).half()
        codes = check(model, (x.half(), y), CE, torch.optim.Adam(model.parameters(), 1e-3, **settings)).codes
        assert ("eps-underflow" in codes) == sick
    model = mlp(nn.ReLU, 2).half()
    assert "eps-underflow" not in check(model, (x.half(), y), CE, torch.optim.SGD(model.parameters(), 0.1)).codes


def test_a_difference_that_is_only_a_part_of_something_has_no_target():
    """The ratio of two policies, the margin of preferences."""
    x, _ = classes()
    before = torch.randn(64) - 30.0
    for taken in (torch.exp, F.logsigmoid):
        found = check(mlp(nn.ReLU, 2), step=lambda m, f=taken: f(m(x)[:, 0] - 30.0 - before).mean())
        assert "target-scale" not in found.codes
    assert "target-scale" in check(mlp(nn.ReLU, 2), step=lambda m: (m(x)[:, 0] - before).square().mean()).codes


def test_a_mask_among_the_inputs_is_one():
    """-Inf where nobody shall look, as torch.nn.Transformer.generate_square_subsequent_mask makes it."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(32, 2), nn.Linear(32, 3)

        def forward(self, x, mask):
            return self.head(self.attention(x, x, x, attn_mask=mask)[0])

    x, y = classes()
    mask = nn.Transformer.generate_square_subsequent_mask(64)
    assert check(Masked(), step=lambda model: CE(model(x, mask), y)).healthy
    features = torch.rand(64, 32)
    features[3, 2] = 0.0
    (finding, *_) = check(mlp(nn.ReLU, 2), (features.log(), y), CE).findings
    assert finding.code == "nonfinite-loss"
    assert "gets the inputs, of which 1 is Inf" in finding.message


def test_gaps_in_the_inputs_that_the_model_fills_are_no_error():
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mlp(nn.ReLU, 2)

        def forward(self, x):
            return self.model(x.nan_to_num())

    x, y = classes()
    x[3, 2] = math.nan
    diagnosis = check(Filling(), (x, y), CE)
    assert diagnosis.healthy
    assert diagnosis.codes == ("nonfinite-input",)
    findings = check(Filling(), (x, y), lambda out, y: (out - 9.0).log().mean()).findings
    assert any("made by log in the loss" in finding.message for finding in findings)


def test_targets_that_are_left_out_or_counted():
    x, _ = classes()
    known = (torch.arange(64) % 3 > 0)[:, None]
    labels = torch.where(known, (x[:, :1] > 0).float(), -1.0)
    model = mlp(nn.ReLU, 2)

    def masked(model):
        loss = F.binary_cross_entropy_with_logits(model(x)[:, :1], labels, reduction="none")
        return loss[known].mean()

    assert check(model, step=masked).healthy
    assert check(
        model, step=lambda m: F.binary_cross_entropy_with_logits(m(x)[:, :1], labels, weight=known.float())
    ).healthy
    edges = (x[:, :1] > 0).float() * (1 + 1e-6)
    assert check(model, (x, edges), lambda out, y: F.binary_cross_entropy_with_logits(out[:, :1], y)).healthy
    clicks = torch.poisson(torch.full((64, 3), 5.0))
    assert check(model, (x, clicks), CE).healthy


def test_models_of_others_in_the_loss_are_no_lost_layers():
    critic, (x, y) = nn.Linear(3, 1), classes()
    assert check(mlp(nn.ReLU, 2), (x, y), lambda out, y: critic(out).mean()).healthy


def test_copies_in_float32_are_the_optimizers_own():
    model, (x, y) = mlp(nn.ReLU, 2).half(), classes()
    optimizer = torch.optim.Adam([p.detach().float().requires_grad_() for p in model.parameters()])
    assert not {"optimizer-parameters", "eps-underflow"} & set(check(model, (x.half(), y), CE, optimizer).codes)


KINDS_OF_TENSORS = {
    "sparse": lambda x: torch.sparse.mm(torch.eye(len(x)).to_sparse(), x),
    "compressed": lambda x: torch.eye(len(x)).to_sparse_csr() @ x,
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize(),
    "float8": lambda x: x.to(torch.float8_e4m3fn).to(torch.float32),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS_OF_TENSORS)
def test_tensors_of_all_kinds_may_stand_before_a_nan(kind):
    x, y = classes()
    (finding, *_) = check(mlp(nn.ReLU, 2), step=lambda m: CE(m(KINDS_OF_TENSORS[kind](x)).log(), y)).findings
    assert finding.code == "nonfinite-loss"
    assert "made by log" in finding.message


def test_advice_for_float16_holds_in_float16():
    x, y = classes()
    model = mlp(nn.ReLU, 2).half()
    (finding, *_) = check(model, step=lambda m: (m(x.half()) * 0).log().mean()).findings
    assert "clamp_min(1e-4)" in finding.advice
    (finding, *_) = check(mlp(nn.ReLU, 2), (x, y), lambda out, y: (out * 1e30).norm()).findings
    assert "more than the dtype can hold" in finding.advice or finding.code != "nonfinite-loss"


IDIOMS = {
    "index": lambda out, y: F.mse_loss(out[y.isfinite()], y[y.isfinite()]),
    "where": lambda out, y: torch.where(y.isnan(), 0.0, out - y).square().mean(),
    "fill": lambda out, y: F.mse_loss(out, y.nan_to_num()),
    "difference": lambda out, y: (out - y)[y.isfinite()].square().mean(),
    "widened": lambda out, y: F.mse_loss(out.double()[y.isfinite()], y.double()[y.isfinite()]),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_gaps_that_are_left_out_are_not_blamed_for_another_mistake(idiom):
    x, y = torch.randn(64, 32), torch.randn(64, 3)
    y[3] = math.nan
    known = IDIOMS[idiom]
    cases = {
        "SqrtBackward0": lambda out, y: known(out, y) + (out - out.detach()).square().sum().sqrt(),
        "made by log": lambda out, y: known(out, y) + (out - 9.0).log().mean(),
    }
    for said, loss in cases.items():
        (finding, *_) = check(mlp(nn.ReLU, 2), (x, y), loss).findings
        assert finding.code != "nonfinite-target"
        assert said in finding.message


def test_targets_in_containers():
    x, y = torch.randn(64, 32), torch.randn(64, 3)
    y[3, 1] = math.nan
    for targets, loss in (
        ({"y": y, "n": 3}, lambda out, t: F.mse_loss(out, t["y"])),
        ([y, y.isnan()], lambda out, t: F.mse_loss(out, t[0])),
        ((y, None), lambda out, t: F.mse_loss(out, t[0])),
    ):
        (finding,) = check(mlp(nn.ReLU, 2), (x, targets), loss).findings
        assert finding.code == "nonfinite-target"
        assert finding.numbers["nans"] >= 1.0


@pytest.mark.parametrize("make", ["scatter", "index_fill", "pad"])
def test_a_mask_made_another_way_is_not_blamed_for_a_root(make):
    masks = {
        "scatter": lambda s: s.scatter(1, torch.zeros(64, 1, dtype=torch.int64), -math.inf),
        "index_fill": lambda s: s.index_fill(1, torch.tensor([0]), -math.inf),
        "pad": lambda s: F.pad(s, (1, 0), value=-math.inf),
    }

    def loss(out, y):
        return masks[make](out).softmax(1).mean() + (out - out.detach()).square().sum().sqrt()

    (finding, *_) = check(mlp(nn.ReLU, 2), classes(), loss).findings
    assert "SqrtBackward0" in finding.message


def test_optimizers_whose_first_step_is_finite_in_float16():
    x, y = classes()
    for optimizer in (torch.optim.Adagrad, torch.optim.Adamax, torch.optim.SGD):
        model = mlp(nn.ReLU, 2).half()
        assert "eps-underflow" not in check(model, (x.half(), y), CE, optimizer(model.parameters(), 1e-3)).codes
    model = mlp(nn.ReLU, 2).half()
    groups = [{"params": model[:-1].parameters(), "eps": 1e-4}, {"params": model[-1].float().parameters()}]
    mixed = torch.optim.Adam(groups, 1e-3)
    assert (
        "eps-underflow"
        not in check(model, step=lambda m: CE(m[-1](m[:-1](x.half()).float()), y), optimizer=mixed).codes
    )
    model = mlp(nn.ReLU, 2).half()
    assert "eps-underflow" in check(model, (x.half(), y), CE, torch.optim.Adam(model.parameters(), 1e-3, eps=0)).codes


def test_pairs_of_a_loss_function_are_a_mistake_in_any_shape():
    x, _ = classes()
    diagnosis = check(mlp(nn.ReLU, 2), (x, torch.randn(1, 64)), lambda out, y: F.mse_loss(out[:, :1], y))
    assert "broadcast-loss" in diagnosis.codes


def test_a_softmax_hidden_by_a_logarithm_is_an_error_also_in_front_of_cross_entropy():
    hidden = mlp(nn.ReLU, 1).append(nn.Softmax(dim=1)).append(nn.LogSoftmax(dim=1))
    (finding,) = [finding for finding in check(hidden, classes(), CE).findings if finding.code == "softmax-twice"]
    assert finding.severity == "error"
    assert finding.advice.startswith("take the Softmax out")
    harmless = mlp(nn.ReLU, 1).append(nn.LogSoftmax(dim=1))
    assert [f.severity for f in check(harmless, classes(), CE).findings] == ["info"]


@pytest.mark.parametrize("loss", [CE, F.nll_loss], ids=["cross_entropy", "nll_loss"])
def test_what_a_sigmoid_makes_of_a_softmax_is_no_logarithm(loss):
    odd = nn.Sequential(mlp(nn.ReLU, 2), nn.Softmax(dim=1), nn.Sigmoid())
    assert "softmax-twice" not in [finding.code for finding in check(odd, classes(), loss).findings]


def test_layers_in_lists_of_lists_are_found_and_a_hidden_teacher_is_left_alone():
    class Student(nn.Module):
        def __init__(self, learns):
            super().__init__()
            self.head = nn.Linear(32, 3)
            self._blocks = {"first": [(nn.Linear(32, 32),)]}
            self.learns = learns

        def forward(self, x):
            with torch.set_grad_enabled(self.learns):
                hidden = self._blocks["first"][0][0](x)
            return self.head(hidden.relu())

    torch.manual_seed(0)
    (finding,) = check(Student(True), classes(), CE).findings
    assert finding.code == "unregistered-parameter"
    assert "_blocks['first'][0][0].weight" in finding.message
    assert check(Student(False), classes(), CE).healthy


@pytest.mark.parametrize("divide", ["tensor", "number", "count", "in place"])
def test_a_division_is_told_with_what_it_divides_by(divide):
    def loss(out, y):
        counts = (out[:, 0] > 1e9).float() * 3.0
        if divide == "number":
            return (out / 0).mean()
        if divide == "count":
            return (out / (out > 1e9).sum()).mean()
        return (out.square().mean(1).div_(counts) if divide == "in place" else out.square().mean(1) / counts).mean()

    (finding,) = [
        finding for finding in check(mlp(nn.ReLU, 1), classes(), loss).findings if finding.severity == "error"
    ]
    assert finding.code == "nonfinite-loss"
    assert "is made by div in the loss" in finding.message
    assert finding.message.endswith("and divisors from 0 to 0")
