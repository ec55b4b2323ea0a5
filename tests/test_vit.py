"""The vision transformer at the published size, its batches and its maps: MONAI, lifelines and the compiler as judges."""
import copy
import time

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from torch import nn

from brainmets.batches import EventBatches, accumulate
from brainmets.explain.attention import KINDS, attention_maps, attention_weights, coverage_estimates, coverage_table, head_maps
from brainmets.losses import CoxLoss, cox_loss
from brainmets.models.vit import ViTNet, count_parameters, kept_attention, load_vit, save_vit, vit_config
from brainmets.tables import DataError

torch.set_num_threads(1)
SMALL = dict(image_size=(16, 24, 16), patch=8, in_channels=3, hidden=32, layers=3, heads=4, mlp=48, n_clinical=5)


def inputs(config, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, config.in_channels, *config.image_size, generator=generator), torch.randn(n, config.n_clinical, generator=generator)


@pytest.fixture(scope="module")
def paper(): return ViTNet(vit_config("paper"))


def test_published_size_forward_and_backward(paper):
    assert abs(count_parameters(paper)["total"]/57.3e6 - 1) < 0.02
    net, loss = copy.deepcopy(paper).train(), CoxLoss("efron")
    image, clinical = inputs(net.config, 2)
    assert tuple(image.shape[1:]) == (3, 96, 128, 112)
    risk = net(image, clinical)
    loss(risk, torch.tensor([[10.0, 1], [20.0, 0]])).backward()
    assert risk.shape == (2, 1) and all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert all(p.grad.any() for name, p in net.named_parameters() if name != "head.risk.bias")  # a constant added to all risks changes no Cox loss


def test_published_size_is_the_same_step_by_step_and_with_fused_attention(paper):
    image, clinical = inputs(paper.config, 1)
    with torch.no_grad():
        fused = paper.eval()(image, clinical)
        with kept_attention(paper) as kept: stepwise = paper(image, clinical)
    assert len(kept) == 12 and kept[0].shape == (1, 8, 341, 341)
    torch.testing.assert_close(fused, stepwise, rtol=0, atol=1e-5)


def test_published_size_has_maps(paper):
    image, clinical = inputs(paper.config, 1)
    found = attention_maps(paper, image, clinical)
    assert found.maps.shape == (1, 96, 128, 112) and found.cells.shape == (1, 6, 8, 7) and found.maps.dtype == np.float32
    assert found.maps.max() == pytest.approx(1) and found.maps.min() >= 0


def test_encoder_is_that_of_monai():
    "The paper built on MONAI's ViT: with the same weights the same CLS state, for einsum attention. Its fused attention drops weights in eval mode; ours does not."
    from monai.networks.nets import ViT
    config = vit_config("quick", **SMALL, n_registers=0, cls_sd=1.0, dropout=0.2)
    net = ViTNet(config).eval()
    twin = ViT(config.in_channels, config.image_size, config.patch, config.hidden, config.mlp, config.layers, config.heads, classification=True, dropout_rate=0.2)
    twin.classification_head = nn.Identity()
    names = {"tokens.cls": "cls_token", "tokens.positions": "patch_embedding.position_embeddings", "tokens.patches": "patch_embedding.patch_embeddings", "layers.": "blocks.",
             "norm_attention": "norm1", "attention.qkv": "attn.qkv", "attention.out": "attn.out_proj", "norm_mlp": "norm2", "mlp.0": "mlp.linear1", "mlp.3": "mlp.linear2"}
    state = {key: value for key, value in twin.state_dict().items() if "norm_cross_attn" in key}  # MONAI holds them without using them
    for key, value in net.image_encoder.state_dict().items():
        if key == "tokens.registers": continue
        for ours, theirs in names.items(): key = key.replace(ours, theirs)
        state[key] = value
    twin.load_state_dict(state, strict=True)
    image, clinical = inputs(config)
    with torch.no_grad():
        torch.testing.assert_close(net.image_encoder(image)[:, 0], twin.eval()(image)[0], rtol=0, atol=1e-5)
        assert torch.equal(net(image, clinical), net(image, clinical))
        for block in twin.blocks: block.attn.use_flash_attention = True
        assert not torch.equal(twin(image)[0], twin(image)[0])


@pytest.mark.parametrize("changes", [{}, dict(n_registers=0), dict(n_clinical=0), dict(in_channels=2), dict(positions="all"), dict(qkv_bias=True)])
def test_every_rung_compiles_without_a_break_and_is_stored(tmp_path, changes):
    net = ViTNet(vit_config("quick", **{**SMALL, **changes})).eval()
    image, clinical = inputs(net.config)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image, clinical), net(image, clinical))
    save_vit(net, tmp_path/"net")
    assert torch.equal(load_vit(tmp_path/"net")(image, clinical), net(image, clinical))


def test_bfloat16_is_near_single_precision():
    net = ViTNet(vit_config("quick", **SMALL)).eval()
    image, clinical = inputs(net.config, 8)
    with torch.no_grad():
        exact = net(image, clinical)
        with torch.autocast("cpu", torch.bfloat16): rough = net(image, clinical)
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().max() < 0.05*exact.abs().max() + 0.02


def tied(n=80, seed=5):
    rng = np.random.default_rng(seed)
    x, beta = rng.normal(size=(n, 2)), np.array([0.7, -0.4])
    died, lost = rng.exponential(30*np.exp(-x @ beta)), rng.exponential(50, n)
    return x, np.ceil(np.minimum(died, lost)/5)*5, died <= lost


def test_cox_loss_is_that_of_lifelines():
    x, days, event = tied()
    fitted = CoxPHFitter().fit(pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "days": days, "event": event}), "days", "event", fit_options={"precision": 1e-10})
    coefficients = torch.tensor(fitted.params_.to_numpy(), requires_grad=True)
    value = cox_loss(torch.tensor(x) @ coefficients, torch.tensor(days), torch.tensor(event), "efron")
    assert len(np.unique(days[event])) < event.sum()
    assert -value.item()*event.sum() == pytest.approx(fitted.log_likelihood_, abs=1e-6)
    value.backward()
    assert coefficients.grad.abs().max() < 1e-6


def net_gradients(act, config, autocast=False):
    net = ViTNet(config, seed=1).train()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): act(net)
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("autocast", [False, True])
def test_forty_in_four_batches_of_ten(autocast):
    "In bfloat16 too: weights cast in the first run must not cost the second its gradient."
    config = vit_config("quick", **SMALL)
    image, clinical = inputs(config, 40)
    _, days, event = tied(40)
    target = torch.tensor(np.stack([days, event], 1), dtype=torch.float32)
    batches = [((image[k:k + 10], clinical[k:k + 10]), target[k:k + 10]) for k in range(0, 40, 10)]
    twice = net_gradients(lambda net: accumulate(net, batches, CoxLoss("efron")), config, autocast)
    once = net_gradients(lambda net: accumulate(net, batches, CoxLoss("efron"), keep_graphs=True), config, autocast)
    assert once.abs().max() > 0 and (twice - once).abs().max() < (2e-2 if autocast else 1e-5)*once.abs().max()


@pytest.mark.parametrize("n, n_events", [(253, 36), (202, 29), (203, 28)])
def test_event_batches_on_the_folds_of_the_paper(n, n_events):
    event = np.random.default_rng(n).permutation(np.arange(n) < n_events)
    sampler = EventBatches(event, seed=2)
    for epoch in range(50):
        batches = sampler.batches(epoch)
        assert all(1 <= event[b].sum() <= 3 and len(set(b)) == 10 for b in batches)
        assert sorted(np.concatenate([b[event[b]] for b in batches])) == np.flatnonzero(event).tolist()
    seen = np.bincount(np.concatenate([np.concatenate(sampler.batches(k)) for k in range(50)]), minlength=n)
    assert np.ptp(seen[~event]) <= 1 and (seen[event] == 50).all()


def test_drawing_a_hundred_epochs_takes_no_time():
    start = time.perf_counter()
    EventBatches(np.arange(253) < 36).batches(99)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("kind", KINDS)
def test_maps_leave_the_net_as_it_was(kind):
    net = ViTNet(vit_config("quick", **SMALL)).train()
    net.head.risk.weight.requires_grad_(False)
    image, clinical = inputs(net.config)
    state, drawn = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    found = attention_maps(net, image, clinical, kind)
    assert all(m.training for m in net.modules()) and all(p.grad is None for p in net.parameters()) and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and found.kind == kind and image.grad is None and not image.requires_grad
    assert 0 <= found.special.min() and found.special.max() <= 1
    np.testing.assert_allclose(found.maps, attention_maps(copy.deepcopy(net).eval(), image, clinical, kind, batch_size=1).maps, atol=1e-4)


def test_attention_of_each_head_sums_with_the_special_tokens_to_one():
    net = ViTNet(vit_config("quick", **SMALL)).eval()
    image, clinical = inputs(net.config)
    weights = attention_weights(net, image, clinical)
    torch.testing.assert_close(weights.sum(4), torch.ones(3, 3, 4, net.config.n_tokens))
    maps = head_maps(net, image, clinical, layer=0)
    assert maps.shape == (3, 4, 16, 24, 16)
    with pytest.raises(DataError, match="has no attention"): attention_maps(nn.Linear(1, 1), image, clinical)


def test_frozen_nets_have_relevance():
    net = ViTNet(vit_config("quick", **SMALL)).eval()
    image, clinical = inputs(net.config)
    free = attention_maps(net, image, clinical).maps
    for p in net.parameters(): p.requires_grad_(False)
    np.testing.assert_allclose(attention_maps(net, image, clinical).maps, free, atol=1e-6)


def test_coverage_without_any_lesion_has_no_estimate():
    maps = np.random.default_rng(0).random((3, 4, 4, 4))
    table = coverage_table(maps, 0*maps, 0*maps, pd.DataFrame({"patient_id": list("abc")}))
    estimates = coverage_estimates(table, n_resamples=20)
    assert estimates["estimate"].isna().all() and estimates["note"].str.contains("no map with a core and a GTV").all()
