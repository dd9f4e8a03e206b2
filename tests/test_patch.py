"""``fastclip.patch``: whom it reaches, whom it can't, and that nothing of it is left behind."""

import inspect
import threading

import keras
import pytest
import pytorch_optimizer.optimizer.sam
import torch
from skorch.callbacks import GradientNormClipping

import fastclip
from fastclip.patching import PLACES, THEIRS


def standing():
    return [getattr(place, name) for place in PLACES for name in THEIRS]


@pytest.fixture(autouse=True)
def torchs_own():
    before = standing()
    assert before == [*THEIRS.values()] * len(PLACES)
    yield
    assert standing() == before


def overflowing():
    """torch takes its norm for Inf and zeroes it."""
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3e20, 4e20])
    return p


def clips_right(clip):
    p = overflowing()
    clip(p)
    return bool(p.grad.any())


def through_torch(p):
    torch.nn.utils.clip_grad_norm_([p], 1.0)


def test_as_a_context_manager():
    assert not clips_right(through_torch)
    with fastclip.patch() as patch:
        assert patch.nonfinite == "propagate"
        assert clips_right(through_torch)
    assert not clips_right(through_torch)


def test_as_a_call():
    patch = fastclip.patch()
    try:
        assert clips_right(through_torch)
    finally:
        patch.undo()
    assert not clips_right(through_torch)
    patch.undo()
    assert not clips_right(through_torch)


def test_an_error_undoes_it():
    with pytest.raises(KeyError, match="inside"), fastclip.patch():
        raise KeyError("inside")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_patches_nest_and_end_in_any_order(order):
    patches = [fastclip.patch(nonfinite=rule) for rule in ("propagate", "zero", "raise")]
    left = list(patches)
    for which in order:
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, float("nan")])
        rule = left[-1].nonfinite
        if rule == "raise":
            with pytest.raises(fastclip.NonFiniteGradientError):
                through_torch(p)
        else:
            through_torch(p)
            assert p.grad.isnan().any() == (rule == "propagate")
        patches[which].undo()
        left.remove(patches[which])
    assert not clips_right(through_torch)


def test_an_unknown_rule_patches_nothing():
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        fastclip.patch(nonfinite="ignore")


def test_a_name_imported_meanwhile_is_torchs_afterwards():
    with fastclip.patch():
        from torch.nn.utils import clip_grad_norm_, clip_grad_value_
    assert not clips_right(lambda p: clip_grad_norm_([p], 1.0))
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, -0.5])
    clip_grad_value_([p], 1.0)
    assert p.grad.tolist() == [1.0, -0.5]


def test_what_others_put_there_stays(monkeypatch):
    """Someone else's wrapper around the patched function survives it, and does not end in a circle."""
    with fastclip.patch():
        ours = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: ours(*args, **kwargs))
        theirs = torch.nn.utils.clip_grad_norm_
    assert torch.nn.utils.clip_grad_norm_ is theirs
    assert not clips_right(through_torch)
    with fastclip.patch():
        assert clips_right(through_torch)
    assert not clips_right(through_torch)
    monkeypatch.undo()
    torch.nn.utils.clip_grad_norm_ = THEIRS["clip_grad_norm_"]  # what monkeypatch puts back was ours


def test_other_threads_see_it():
    results = []
    with fastclip.patch():
        thread = threading.Thread(target=lambda: results.append(clips_right(through_torch)))
        thread.start()
        thread.join()
    assert results == [True]


@pytest.mark.parametrize("name", THEIRS)
def test_it_takes_torchs_arguments(name):
    theirs = inspect.signature(inspect.unwrap(THEIRS[name]))
    with fastclip.patch():
        assert inspect.signature(getattr(torch.nn.utils, name)) == theirs
    p, q = overflowing(), overflowing()
    p.grad, q.grad = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
    positional = ([p], 1.0, 1.0, True, False) if name == "clip_grad_norm_" else ([p], 1.0, False)
    with fastclip.patch():
        ours = getattr(torch.nn.utils, name)(*positional)
    expected = THEIRS[name]([q], *positional[1:])
    torch.testing.assert_close(p.grad, q.grad)
    assert (ours is None) == (expected is None)
    if ours is not None:
        torch.testing.assert_close(ours, expected)


def test_torchs_older_name_is_reached():
    with fastclip.patch(), pytest.warns(FutureWarning, match="deprecated"):
        assert clips_right(lambda p: torch.nn.utils.clip_grad.clip_grad_norm([p], 1.0))


def test_compiled_code_is_reached():
    @torch.compile(backend="eager", fullgraph=True)
    def step(p):
        return torch.nn.utils.clip_grad_norm_([p], 1.0)

    p = overflowing()
    with fastclip.patch():
        assert float(step(p)) == pytest.approx(5e20)
        assert p.grad.tolist() == pytest.approx([0.6, 0.8])


def through_skorch(p):
    GradientNormClipping(1.0).on_grad_computed(None, named_parameters=[("p", p)])


def through_pytorch_optimizer(p):
    pytorch_optimizer.optimizer.sam.clip_grad_norm_([p], 1.0)


def through_keras(p):
    (p.grad,) = keras.optimizers.SGD(global_clipnorm=1.0)._clip_gradients([p.grad])


def through_the_optimizers_own(p):
    """Some optimizers clip inside of their step, by code of their own."""
    pytorch_optimizer.Lamb([p], lr=1.0, max_grad_norm=1.0).step()


@pytest.mark.parametrize("clip", [through_skorch, through_pytorch_optimizer, through_keras, through_the_optimizers_own])
def test_whom_it_cannot_reach(clip, monkeypatch):
    """They have imported the name, or have a function of their own: docs/frameworks.md has a line for each."""

    def never(*args, **kwargs):
        raise AssertionError("fastclip was reached")

    monkeypatch.setattr(fastclip.functional, "clip_grad_norm_", never)
    with fastclip.patch():
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0])
        clip(p)
        with pytest.raises(AssertionError, match="fastclip was reached"):
            through_torch(p)
