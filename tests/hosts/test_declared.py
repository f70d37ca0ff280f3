"""A model of one's own: declared sites, no positions, tied weights."""

from __future__ import annotations

import copy

import pytest
import torch

from spd_lens import decompose
from spd_lens.hosts import open_host
from spd_lens.objective import faithfulness_loss
from tests.small_models import TiedAutoencoder


def test_tied_sites_share_their_subcomponents_and_count_once() -> None:
    model = TiedAutoencoder()
    decomposition = decompose(model, {"*": 7})
    encoder, decoder = decomposition["encoder.W"], decomposition["decoder.W"]
    assert torch.equal(decoder.V, encoder.U.T)
    assert torch.equal(decoder.U, encoder.V.T)
    assert len(decomposition.subcomponent_parameters()) == 2
    assert torch.allclose(decoder.weight, encoder.weight.T)
    # Gates are per site.
    assert len(decomposition.gate_parameters()) == 8


def test_masks_equal_edited_weights_on_both_uses() -> None:
    model = TiedAutoencoder()
    plain = copy.deepcopy(model)
    x = torch.rand(11, 5)
    decomposition = decompose(model, {"*": 7})
    assert torch.equal(model(x), plain(x))
    m_in, m_out = torch.rand(7), torch.rand(7)
    with model.hooks(fwd_hooks=decomposition.mask({"encoder.W": m_in, "decoder.W": m_out}, delta=0.3)):
        out = model(x)
    W, V, U = plain.W, decomposition["encoder.W"].V, decomposition["encoder.W"].U
    rest = W - V @ U
    encoder = (V * m_in) @ U + 0.3 * rest
    decoder = (V * m_out) @ U + 0.3 * rest
    torch.testing.assert_close(out, torch.relu(x @ encoder @ decoder.T + plain.b))


def test_an_ablation_composes_with_an_upstream_patch() -> None:
    model = TiedAutoencoder()
    plain = copy.deepcopy(model)
    x = torch.rand(3, 5)
    decomposition = decompose(model, {"*": 4})
    patch = [("hook_hidden", lambda value, hook: value * 2)]
    with model.hooks(fwd_hooks=decomposition.ablate({"decoder.W": [1]}) + patch):
        out = model(x)
    V, U = decomposition["decoder.W"].V, decomposition["decoder.W"].U
    decoder = plain.W.T - torch.outer(V[:, 1], U[1])
    torch.testing.assert_close(out, torch.relu(2 * (x @ plain.W) @ decoder + plain.b))


def test_removal_restores_a_model_whose_point_is_both_output_and_input() -> None:
    model = TiedAutoencoder()
    x = torch.rand(3, 5)
    before = model(x)
    kinds = {name: type(point) for name, point in model.hook_dict.items()}
    state = {name: sorted(vars(module)) for name, module in model.named_modules()}
    decomposition = decompose(model, {"*": 4})
    decomposition.remove()
    assert {name: type(point) for name, point in model.hook_dict.items()} == kinds
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == state
    assert torch.equal(model(x), before)


def test_faithfulness_counts_the_tied_matrix_once() -> None:
    decomposition = decompose(TiedAutoencoder(), {"*": 3})
    encoder = decomposition["encoder.W"]
    expected = (encoder.target_weight - encoder.V @ encoder.U).square().mean()
    sites = [(w.target_weight, w.V, w.U) for w in decomposition.values() if w.tied_to is None]
    torch.testing.assert_close(faithfulness_loss(sites), expected)


def test_half_of_a_tied_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shares its weight with encoder\.W"):
        decompose(TiedAutoencoder(), {"decoder.W": 3})


def test_a_root_module_without_declared_sites_is_refused_with_the_fix() -> None:
    class Undeclared(TiedAutoencoder):
        spd_sites = property()  # as if it had never been declared

    with pytest.raises(TypeError, match="add a method"):
        open_host(Undeclared())


def test_a_plain_module_is_refused_with_the_fix() -> None:
    with pytest.raises(TypeError, match="boot_transformers"):
        open_host(torch.nn.Linear(2, 2))
