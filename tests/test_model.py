"""Sec. 3.3-3.5: equal to the released code, and each equation on its own."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, recorded

import model
from model import CLIPRC, CrossBlock, RegionAlignment, nel_losses
from tools.convert import from_released, our_name
from train import learning_rate


def training_view(labels, text, unseen, inductive):
    """What training is given. The unseen classes are the last ones; inductive it knows none."""
    known = min(unseen) if inductive else 256
    return labels.where(labels < known, 255), text[:known], () if inductive else unseen


def released_view(ours: dict, name: str) -> torch.Tensor:
    """The tensor among ours that a released name stands for, in the released layout."""
    if "prompt_embeddings" in name:
        return ours["encoder.prompts"][1:] if "deep" in name else ours["encoder.prompts"][:1]
    if ".q_proj." in name:
        return next(ours[n] for n in ours if n.endswith(f"descriptor_proj.{name.split('.')[-1]}"))
    if name.endswith("lateral_proj.weight"):  # released order: R, G, I
        return torch.cat([ours["ram.image_proj.weight"].chunk(3, 1)[i] for i in (1, 0, 2)], 1)
    return ours[our_name(name)]


def test_losses_and_gradients_equal_the_released_codes_and_clip_and_regions_stay_frozen(golden):
    network, c = from_released(golden["state_dict"]), golden["config"]
    labels, text, unseen = training_view(golden["labels"], golden["text"], (4, 5),
                                         not c.get("self_training"))
    weights = c["mask_weight"], c["dice_weight"], c.get("recovery_weight", 0)
    losses = network.losses(golden["images"], labels, text, weights, unseen)
    order = "loss_mask", "loss_dice", "recovery_loss_k", "recovery_loss_q"
    theirs = [float(golden["losses"][name]) for name in order if name in golden["losses"]]
    assert [loss.item() for loss in losses.values()] == pytest.approx(theirs, rel=1e-5)
    sum(losses.values()).backward()
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, grad in grads.items():
        if "encoder.visual." in name or name == "encoder.region_tokens":
            assert grad is None or not grad.any(), name
    for name, theirs in golden["grads"].items():
        ours = released_view(grads, name)
        if name.endswith("k.bias"):  # its true gradient is 0; both sides hold rounding
            assert ours.norm() < 1e-5 and theirs.norm() < 1e-5
        else:
            assert (ours - theirs).norm() < 1e-3 * theirs.norm(), name


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_twelve_steps_move_the_weights_as_the_released_trainer_does(setting):
    golden = recorded(f"trajectory_{setting}")
    network, c = from_released(golden["state_dict"]), SimpleNamespace(**golden["config"])
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=c.weight_decay)
    for step, (images, labels) in enumerate(zip(golden["images"].float(), golden["labels"].long())):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, c)
        view = training_view(labels, golden["text"], c.unseen, setting == "inductive")
        losses = network.losses(images, *view[:2], c.weights, view[2])
        assert lr == pytest.approx(golden["lr"][step], rel=1e-6)
        for name, value in golden["losses"][step].items():
            assert losses[name].item() == pytest.approx(float(value), rel=1e-4), (step, name)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for name, after in golden["state_dict_after"].items():
        if not name.endswith(".k.bias"):  # whose true gradient is 0
            before = golden["state_dict"][name]
            ours = released_view(network.state_dict(), name) - before
            assert (ours - (after - before)).norm() <= 0.01 * (after - before).norm(), name


@pytest.mark.parametrize("align", ["GR", "G", "R", ""])
def test_region_alignment_is_equations_4_to_6(align):
    G, I, R, T = (torch.randn(*shape, 8) for shape in ((2,), (2, 24), (2, 4), (5,)))
    ram = RegionAlignment(8, align)
    image, descriptors, R_hat = ram(G, I, R, T, (4, 6))
    R_up = F.interpolate(R.transpose(1, 2).reshape(2, 8, 2, 2), size=(4, 6), mode="bilinear")
    beside = {"G": G[:, None].expand(2, 24, 8), "R": R_up.flatten(2).transpose(1, 2)}
    I_hat = torch.cat([*(beside[feature] for feature in align), I], dim=-1)
    torch.testing.assert_close(image, ram.image_proj(I_hat))
    R_t = [[T[c] * (R[:, region] + G) for c in range(5)] for region in range(4)]
    R_t = torch.stack([torch.stack(row, 1) for row in R_t], 1)  # (B, M, C, D)
    torch.testing.assert_close(R_hat, torch.cat([R_t, T.expand(2, 4, 5, 8)], dim=-1))
    torch.testing.assert_close(descriptors, ram.descriptor_proj(R_hat).flatten(1, 2))


def test_a_block_has_four_dropouts_and_a_norm_after_each_residual():
    block, x, memory = CrossBlock(16, dropout=1.0), torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    assert torch.equal(block.attention(x, memory), block.attention.out.bias.expand(2, 3, 16))
    assert torch.equal(block.ffn[:4](x), block.ffn[3].bias.expand(2, 3, 16))
    torch.testing.assert_close(block(x, memory), block.norm2(block.norm1(x)))


def test_branches_read_each_other_in_equation_7_and_equation_8_is_the_mean_of_the_regions_maps():
    decoder, I, R = model.Decoder(16, 1, dropout=0.0), torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    before_the_layer = decoder.image_blocks[0](I, R), decoder.descriptor_blocks[0](R, I)
    assert all(map(torch.equal, decoder(I, R), before_the_layer))
    I_d, R_d = torch.randn(2, 6, 8), torch.randn(2, 4 * 5, 8)  # M = 4 regions, C = 5 classes
    maps = [R_d[:, 5 * region:5 * region + 5] @ I_d.transpose(1, 2) for region in range(4)]
    torch.testing.assert_close(model.segmentation_map(I_d, R_d, 4), sum(maps) / 4)


def test_losses_are_their_definitions_class_by_class(monkeypatch):
    logits = 3 * torch.randn(3, 6, 10, 12, dtype=torch.float64)
    labels = torch.randint(5, (3, 10, 12))  # class 5 is absent
    labels[torch.rand(3, 10, 12) < 0.2] = labels[1] = 255
    focal = dice = pairs = 0
    for image, label in zip(logits, labels):
        for c in range(6):
            p, t = image[c].sigmoid(), label == c
            right, alpha = torch.where(t, p, 1 - p), torch.where(t, 0.25, 0.75)
            focal += (-alpha * (1 - right) ** 2 * right.log()).mean()
            if t.any():
                dice += 1 - (2 * p[t].sum() + 1) / (p.sum() + t.sum() + 1)
                pairs += 1
    ours = nel_losses(logits, labels)
    torch.testing.assert_close(ours, (focal / pairs, dice / pairs), check_dtype=False)
    assert nel_losses(logits, torch.full_like(labels, 255))[1] == 0  # no pair, and no division by 0
    monkeypatch.setattr(model, "mean_over_processes", lambda own: 2 * own)  # the others have more
    torch.testing.assert_close(nel_losses(logits, labels), (ours[0] / 2, ours[1] / 2))


def make_network(**settings) -> CLIPRC:
    torch.manual_seed(0)
    return CLIPRC(make_clip().visual, **{"num_prompts": 3, "regions": 4} | settings)


@pytest.mark.parametrize("kind, layers", [("l1", 1), ("l2", 2), ("kd", 1), ("l1", 0)])
def test_recovery_loss_compares_with_patches_and_descriptors_as_in_equations_9_to_11(kind, layers):
    network = make_network(recovery_loss=kind, recovery_layers=layers).eval()
    images, T = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(5, 32))
    G, I, R = network.encoder(images)
    I_hat, descriptors, R_hat = network.ram(G, I, R, T, (4, 4))
    I_r, R_r = I_d, R_d = network.decoder(I_hat, descriptors)
    target = descriptors  # our reading of "0 layers"
    if layers:
        r, target = network.recovery, R_hat.flatten(1, 2)
        I_r, R_r = r.decoder(r.image_in(I_d), r.descriptor_in(R_d))
        I_r, R_r = r.image_out(I_r), r.descriptor_out(R_r)
        assert len(r.decoder.image_blocks) == layers
    losses = network.losses(images, torch.zeros(2, 64, 64).long(), T, (0, 0, 2.0))
    for name, ours, theirs in (("recovery_v", I_r, I), ("recovery_q", R_r, target)):
        p, log_q = theirs.softmax(-1), ours.log_softmax(-1)
        expected = {"l1": (ours - theirs).abs().mean(), "l2": ((ours - theirs) ** 2).mean(),
                    "kd": (p * (p.log() - log_q)).sum(-1).mean()}[kind]
        assert losses[name].item() == pytest.approx(2 * expected.item(), rel=1e-4)
    recovered, target = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    sum(model.recovery_losses(recovered, target, recovered, target, F.l1_loss)).backward()
    assert recovered.grad.any() and target.grad is None


def test_every_rung_of_table_5_computes_something_else_and_recovery_changes_training_only():
    images, T, logits = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(5, 32)), []
    rungs = {"regions": 0, "ram": False, "rdl": False}, {"ram": False, "rdl": False}, {"rdl": False}
    for name, settings in zip(("ZegCLIP", "ZegCLIP with RLB", "CLIP-RC", "CLIP-RC"), (*rungs, {})):
        network = make_network(**settings).eval()
        losses = network.losses(images, torch.zeros(2, 64, 64).long(), T)
        assert (network.name, len(losses)) == (name, 2 if settings else 4)
        logits.append(network(images, T))
    assert [(a - b).abs().max() > 1e-4 for a, b in zip(logits, logits[1:])] == [True, True, False]
    with pytest.raises(ValueError, match="--regions 0 needs --no-ram"):
        make_network(regions=0)


def test_recomputed_layers_give_the_same_gradients_and_are_used_from_m_1024():
    grads, images, T = [], torch.randn(1, 3, 128, 128), F.normalize(torch.randn(20, 32))
    for recompute in (False, True):
        network = make_network(regions=16, dropout=0.5, recompute=recompute)
        sum(network.losses(images, torch.zeros(1, 128, 128).long(), T).values()).backward()
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    assert all(map(torch.equal, *grads))
    for regions in (256, 1024):
        blocks = [m for m in make_network(regions=regions).modules() if isinstance(m, CrossBlock)]
        assert {isinstance(block.forward, partial) for block in blocks} == {regions == 1024}
