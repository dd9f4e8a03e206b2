"""The model of what a join costs says what its formula says, and its numbers are those of the code that runs."""

import importlib
import importlib.util
from pathlib import Path

import pytest

from fastclip import distributed

PACKAGE = "fastclip.bench" if importlib.util.find_spec("fastclip.bench") else "bench"
model = importlib.import_module(f"{PACKAGE}.distributed_model")


@pytest.mark.parametrize("ranks", [8, 64, 1024, 16384])
@pytest.mark.parametrize("of_node", [1, 8])
@pytest.mark.parametrize("sent", [4, 3072, 786432])
def test_the_simulation_agrees_with_the_formula(ranks, of_node, sent):
    group = model.Group(ranks, of_node)
    formula, simulated = model.tree_s(group, sent), model.simulated_s(group, sent)
    assert simulated == pytest.approx(formula, rel=0.05)
    assert simulated < model.simulated_s(group, sent, jitter=0.2) < 1.25 * simulated


def test_the_bytes_are_those_of_the_vector():
    kinds = distributed._kinds_of_rows(distributed.Request(), False, False, False)
    assert 8 * len(kinds) == model.PER_KIND
    assert model.our_bytes(model.Group(64, 8, kinds=2)) == 64 * 8 * (2 * len(kinds) + 2)


def test_slots_give_the_same_bits_in_every_order():
    slots, sums, error = model.bits(64)
    assert slots == 1
    assert sums > 1
    assert 1e-8 < error < 1e-6


def test_the_table_has_a_row_for_every_job(capsys):
    assert model.main([]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    sizes = (8, 64, 512, 1024, 4096, 16384)
    assert len(rows) == 2 + sum(len(list(model.jobs(size))) for size in sizes)
    text = Path(model.__file__).with_name("NOTES.md").read_text()
    assert all(row.split(" | ")[:5] in [line.split(" | ")[:5] for line in text.splitlines()] for row in rows[2:])
