"""Every objective against its paper's formula, and what all of them share: selection without side effects, refusals."""

import copy
import itertools
import math
import random
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.backbones import BackboneConfig
from models.contrast import contrastive_loss
from models.heads import unit
from models.in_batch import batch_contrast
from models.objectives import OBJECTIVES, SimCLRConfig, SwAVConfig
from models.objectives.base import Features
from models.objectives.dino import best_locals, cross_entropies, pair_loss
from models.objectives.ibot import block_masks
from models.objectives.swav import sinkhorn
from models.selection import SelectionConfig, pairs, select

from .objective_cases import CONFIGS, NAIVE, RESTLESS, STILL, built, crops_for, dino, naive_sinkhorn

FIRST = torch.zeros(5, dtype=torch.int64)


def state_of(objective):
    """Everything that scoring must leave as it is."""
    tensors = {n: v.clone() for n, v in objective.state_dict().items() if torch.is_tensor(v)}
    modes = [
        (name, part.training, getattr(part, "track_running_stats", None)) for name, part in objective.named_modules()
    ]
    return tensors, modes, objective.step, torch.get_rng_state()


def test_every_objective_has_a_case():
    assert CONFIGS.keys() == OBJECTIVES.keys() and NAIVE.keys() == OBJECTIVES.keys() - {"moby", "ibot"}


@pytest.mark.parametrize("name", NAIVE)
def test_pair_tables_equal_a_loop_over_pairs(name):
    objective = built(name, **({"local_views": 0} if name == "dino" else {}))
    views_BNCHW = crops_for("plain")[0]
    table_BP = objective.pair_losses((views_BNCHW,), SelectionConfig()).losses_BP
    copied = copy.deepcopy(objective)
    loop = [NAIVE[name](copied, views_BNCHW[:, a], views_BNCHW[:, b]) for a, b in pairs(4)]
    torch.testing.assert_close(table_BP, torch.stack(loop, 1).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAIVE)
def test_losses_and_gradients_equal_the_formula(name):
    one = built(name, **({"local_views": 0} if name == "dino" else {}))
    other, crops = copy.deepcopy(one), crops_for("plain")
    loss, _ = one.loss(one.take(crops, FIRST, None))
    wanted = NAIVE[name](other, crops[0][:, 0], crops[0][:, 1]).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    loss.backward(), wanted.backward()
    for (name_of, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name_of)
        else:
            assert p.grad is None


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("encoder", ["online", "target"])
@pytest.mark.parametrize("batchnorm", ["view", "running"])
def test_scoring_leaves_no_trace(name, encoder, batchnorm):
    """HVP's selection moves BatchNorm's statistics and leaves drop path on; here nothing moves, nothing is drawn."""
    objective, crops = built(name, RESTLESS), crops_for(name)
    selection = SelectionConfig(encoder=encoder, batchnorm=batchnorm)
    if encoder == "target" and objective.target is None:
        with pytest.raises(ValueError, match=r"selection.encoder: target asked of .* without a target encoder; take"):
            objective.check(selection)
        return
    before = state_of(objective)
    first = objective.pair_losses(crops, selection)
    after = state_of(objective)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:3] == before[1:3] and torch.equal(after[3], before[3])
    assert all(p.grad is None for p in objective.parameters()) and not first.losses_BP.requires_grad
    assert torch.equal(objective.pair_losses(crops, selection).losses_BP, first.losses_BP)  # no drop path, no masks


@pytest.mark.parametrize("name", OBJECTIVES)
def test_plain_training_takes_a_random_pair_and_steps(name):
    """Without scores: two views, and of multi-crop as many local ones as train; after the step the target has moved."""
    objective, crops = built(name), crops_for(name, views=2)
    chosen = objective.take(crops, FIRST, None)
    assert chosen.crops[0].shape == (5, 2, 3, 16, 16)
    if name in ("dino", "ibot"):
        assert chosen.crops[1].shape == (5, 3, 3, 8, 8) and chosen.views_BM.tolist() == [[0, 1, 2, 3, 4]] * 5
    loss, metrics = objective.loss(chosen)
    loss.backward()
    learned = [p for p in objective.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learned)  # else DistributedDataParallel waits
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert objective.seen_features_BD.shape == (5, 32)
    before = state_of(objective)[0]
    with torch.no_grad():
        torch._foreach_add_(learned, 0.1)
    objective.after_step()
    assert objective.step == 1
    after = state_of(objective)[0]
    moved = {n for n in after if not torch.equal(after[n], before[n]) and not n.startswith(("online", "prototypes"))}
    wanted = {"moby": "target.backbone.norm.bias", "dino": "centre_K", "ibot": "patch_centre_K"}
    assert wanted.get(name) is None or wanted[name] in moved
    assert any(n.startswith("target.") for n in moved) == (objective.target is not None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_state_survives_a_checkpoint(name):
    one, other, crops = built(name), built(name), crops_for(name)
    one.loss(one.take(crops, FIRST, None))[0].backward()
    one.after_step()
    other.load_state_dict(one.state_dict())
    assert other.step == 1
    scores = [o.pair_losses(crops, SelectionConfig()).losses_BP for o in (one, other)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"moby"}))
def test_small_temperatures_are_not_computed_in_bf16(name):
    """Inside autocast the backbone rounds, the similarities under a temperature do not."""
    objective = built(name)
    features = Features(torch.randn(64, 4, 32), torch.randn(64, 4, 32))
    if name in ("dino", "ibot"):
        cross = torch.rand(3, 2, 24).softmax(2), torch.rand(3, 2, 24).log_softmax(2)
        wanted = -torch.einsum("bgk,bvk->bgv", *cross)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(cross_entropies(*cross), wanted)
        return
    for encoder in (objective.online, objective.target):
        if encoder is not None:  # heads would round too
            encoder.projector, encoder.predictor = torch.nn.Identity(), torch.nn.Identity()
    if name == "swav":
        objective.prototypes_KD.data = torch.randn(10, 32)
    wanted = objective.pair_table(features, SelectionConfig())
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.pair_table(features, SelectionConfig())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_moco_v3_scales_by_twice_the_temperature():
    for temperature in (0.2, 1.0):
        objective = built("moco_v3", temperature=temperature)
        pair = objective.take(crops_for("plain"), FIRST, None)
        loss, _ = objective.loss(pair)
        q1, q2, k1, k2 = (unit(f(x)) for f in (objective.online, objective.target) for x in pair.crops[0].unbind(1))
        ctr, _ = contrastive_loss(
            [batch_contrast(q1, k2, [k2], temperature), batch_contrast(q2, k1, [k1], temperature)]
        )
        torch.testing.assert_close(loss, 2 * temperature * ctr, rtol=1e-4, atol=1e-5)


def test_heads_have_batchnorm_where_the_papers_have_it():
    def layers(head):
        return "".join({"Linear": "L", "BatchNorm": "B"}.get(type(part).__name__, "") for part in head)

    online = {name: built(name).online for name in ("moco_v3", "simclr", "simsiam", "byol", "swav")}
    assert layers(online["moco_v3"].projector) == "LBLBLB" and layers(online["moco_v3"].predictor) == "LBLB"
    assert layers(online["simclr"].projector) == "LBLB" and online["simclr"].predictor is None
    assert layers(online["simsiam"].projector) == "LBLBLB" and layers(online["simsiam"].predictor) == "LBL"
    assert layers(online["byol"].projector) == layers(online["byol"].predictor) == "LBL"
    assert layers(online["swav"].projector) == "LBL"
    assert layers(built("swav", head_norm=False).online.projector) == "LL"


def test_sinkhorn_equals_the_appendix_and_uses_all_prototypes_equally():
    scores = torch.nn.functional.normalize(torch.randn(20, 6), dim=1)
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), naive_sinkhorn(scores, 0.05, 3))
    codes = sinkhorn(scores, 0.05, 60)
    torch.testing.assert_close(codes.sum(1), torch.ones(20))
    torch.testing.assert_close(codes.sum(0), torch.full((6,), 20 / 6), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_rows_of_the_last_layer_have_length_1_or_learn_theirs(name):
    objective, plain = built(name, norm_last_layer=False), built(name)
    head = objective.online.projector
    assert torch.equal(head.lengths_K1.data, torch.ones(24, 1))
    assert "online.projector.lengths_K1" not in plain.state_dict()
    torch.testing.assert_close(plain.online.projector.last().norm(dim=1), torch.ones(24))
    head.lengths_K1.data.uniform_(0.5, 2.0)
    torch.testing.assert_close(head.last().norm(dim=1), head.lengths_K1[:, 0])
    objective.loss(objective.take(crops_for(name), FIRST, None))[0].backward()
    assert (head.lengths_K1.grad != 0).any()
    before = objective.target.projector.lengths_K1.clone()
    objective.after_step()
    assert not torch.equal(objective.target.projector.lengths_K1, before)
    frozen = built(name, freeze_epochs=9.0, norm_last_layer=False)
    assert [part.shape[1] for part in frozen.frozen()] == [12, 1]


@pytest.mark.parametrize("name", ["swav", "dino", "ibot"])
def test_frozen_layers_have_no_gradient_no_decay_and_no_steps_until_they_learn(name):
    objective = built(name, freeze_epochs=1.0)
    last = objective.prototypes_KD if name == "swav" else objective.online.projector.last_KD
    optimizer = torch.optim.AdamW(objective.online.parameters(), weight_decay=0.5)
    if name == "swav":
        optimizer.add_param_group({"params": [last]})
    first = last.detach().clone()
    for step in range(7):  # 5 steps an epoch
        optimizer.zero_grad()
        objective.loss(objective.take(crops_for(name), FIRST, None))[0].backward()
        assert last.grad is not None  # else DistributedDataParallel waits
        objective.before_step()
        assert (last.grad is not None) == (step >= 5)
        assert all(p.grad is not None for p in objective.online.backbone.parameters())
        optimizer.step()
        objective.after_step()
        if step < 5:
            assert torch.equal(last, first) and last not in optimizer.state
    assert optimizer.state[last]["step"] == 2 and not torch.equal(last, first)


@pytest.mark.parametrize("backbone", [STILL, BackboneConfig("resnet10t", 32)], ids=["vit", "resnet"])
@pytest.mark.parametrize("name", ["simclr", "swav"])
def test_batchnorm_sees_both_views_together_or_each_by_itself(name, backbone):
    """In the heads, and in a backbone that has it."""
    crops = (torch.randn(6, 2, 3, backbone.image_size, backbone.image_size),)
    for joint in (True, False):
        objective, batches = built(name, backbone, joint_norm=joint), []
        for part in objective.online.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.register_forward_hook(lambda m, inputs, output, seen=batches: seen.append(len(inputs[0])))
        loss, _ = objective.loss(objective.take(crops, torch.zeros(6, dtype=torch.int64), None))
        assert set(batches) == {12 if joint else 6}
        assert loss.isfinite()
    assert SimCLRConfig().joint_norm and SwAVConfig().joint_norm


def test_joint_batchnorm_of_simclr_equals_the_formula():
    """NT-Xent of what the projector makes of both views in one batch."""
    objective, crops = built("simclr", joint_norm=True), crops_for("plain", views=2)
    loss, _ = objective.loss(objective.take(crops, FIRST, None))
    both = objective.online(torch.cat(crops[0].unbind(1)))
    z = torch.nn.functional.normalize(both, dim=1)
    logits = (z @ z.T / objective.config.temperature).fill_diagonal_(-torch.inf)
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(10).roll(5))
    torch.testing.assert_close(loss, wanted)


# DINO's choice among many crops


@pytest.mark.parametrize("rule", ["hardest", "easiest"])
def test_dino_s_choice_is_the_best_of_all_combinations(rule):
    objective, (globals_, locals_) = built("dino"), crops_for("dino", batch=3, views=3, local_views=5)
    selection = SelectionConfig(rule=rule)
    scores = objective.pair_losses((globals_, locals_), selection)
    chosen = objective.take((globals_, locals_), select(scores.losses_BP, rule), scores)
    copied, found = copy.deepcopy(objective), {}
    for pair in pairs(3):
        for some in itertools.combinations(range(5), 3):
            views = [globals_[:, g] for g in pair], [locals_[:, v] for v in some]
            found[pair, some] = dino(copied, *views).detach()
    assert len(found) == 3 * 10
    every = torch.stack(list(found.values()), 1)
    best = every.max(1) if rule == "hardest" else every.min(1)
    table = scores.losses_BP.max(1) if rule == "hardest" else scores.losses_BP.min(1)
    torch.testing.assert_close(table.values, best.values)
    names = [set(pair) | {3 + v for v in some} for pair, some in found]
    assert [set(row) for row in chosen.views_BM.tolist()] == [names[i] for i in best.indices]
    for row, views in enumerate(chosen.views_BM.tolist()):
        assert torch.equal(chosen.crops[0][row], globals_[row, views[:2]])
        assert torch.equal(chosen.crops[1][row], locals_[row, [v - 3 for v in views[2:]]])
    loss, _ = objective.loss(chosen)
    torch.testing.assert_close(loss, best.values.mean(), rtol=1e-4, atol=1e-4)


def test_dino_s_exact_choice_draws_nothing_and_is_at_least_as_hard_as_hvp_s_candidates():
    cross = torch.rand(16, 4, 20)
    exact, _ = best_locals(cross, 8)
    for seed in range(3):
        sampled, locals_ = best_locals(cross, 8, candidates=128, seed=seed)
        assert (sampled <= exact + 1e-6).all() and (sampled < exact - 1e-4).any()
        rows = torch.arange(16)[:, None, None]
        a, b = torch.tensor(pairs(4)).T
        own = cross[:, a, b] + cross[:, b, a]
        both = (cross[:, a] + cross[:, b])[:, :, 4:]
        torch.testing.assert_close(sampled, (own + both.gather(2, locals_).sum(2)) / 18)
        assert rows.shape[0] == len(locals_)
    assert not torch.equal(
        best_locals(cross, 8, candidates=12, seed=1)[0], best_locals(cross, 8, candidates=12, seed=2)[0]
    )
    easiest, _ = best_locals(cross, 8, easiest=True)
    assert (best_locals(cross, 8, easiest=True, candidates=12)[0] >= easiest - 1e-6).all()


def test_dino_without_local_views_is_the_pair_alone():
    cross = torch.rand(4, 3, 3)
    losses, locals_ = best_locals(cross, 8)
    assert locals_ is None
    torch.testing.assert_close(losses[:, 0], (cross[:, 0, 1] + cross[:, 1, 0]) / 2)
    torch.testing.assert_close(losses[:, 0], pair_loss(cross[:, :2, :2]))
    objective = built("dino", local_views=0)
    crops = crops_for("dino")
    scores = objective.pair_losses(crops, SelectionConfig())
    chosen = objective.take(crops, FIRST, scores)
    assert len(chosen.crops) == 1 and chosen.views_BM.shape == (5, 2)


@pytest.mark.parametrize(("encoder", "online", "target"), [("online", 2, 1), ("target", 0, 2)])
def test_dino_forwards_every_view_once_while_scoring(encoder, online, target):
    """HVP runs the selection forward twice."""
    objective, calls = built("dino"), {"online": 0, "target": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    objective.online.backbone.register_forward_hook(count("online"))
    objective.target.backbone.register_forward_hook(count("target"))
    scores = objective.pair_losses(crops_for("dino"), SelectionConfig(encoder=encoder))
    assert calls == {"online": online, "target": target}
    assert scores.features_BND is not None  # the loss uses them again
    calls.update(online=0, target=0)
    objective.loss(objective.take(crops_for("dino"), FIRST, scores))
    assert calls == {"online": 2, "target": 0}


def test_dino_s_exact_choice_is_faster_than_a_loop_over_candidates():
    teacher, student = torch.rand(8, 4, 4096).softmax(2), torch.rand(8, 20, 4096).log_softmax(2)
    generator = torch.Generator().manual_seed(0)

    def loop():
        best = torch.full((8,), -torch.inf)
        for _ in range(128):
            pair = torch.randperm(4, generator=generator)[:2]
            some = 4 + torch.randperm(16, generator=generator)[:8]
            views = torch.cat([pair, some])
            losses = -(teacher[:, pair, None] * student[:, None, views]).sum(3)
            best = torch.maximum(best, pair_loss(losses))
        return best

    started = time.perf_counter()
    loop()
    looped = time.perf_counter() - started
    started = time.perf_counter()
    best_locals(-torch.einsum("bgk,bvk->bgv", teacher, student), 8)
    assert time.perf_counter() - started < looped / 5


def test_dino_s_temperature_warms_up_and_its_centre_follows_all_outputs():
    objective = built("dino", warmup_teacher_epochs=2.0, warmup_teacher_temperature=0.02, teacher_temperature=0.06)
    found = []
    for objective.step in (0, 5, 10, 15):
        found.append(objective.warmed(objective.config.teacher_temperature))
    assert found == pytest.approx([0.02, 0.04, 0.06, 0.06])
    objective.step, before = 0, objective.centre_K.clone()
    crops = crops_for("dino")
    outputs = objective.target(crops[0][:, :2].flatten(0, 1)).detach()
    objective.loss(objective.take(crops, FIRST, None))
    objective.after_step()
    torch.testing.assert_close(objective.centre_K, 0.9 * before + 0.1 * outputs.mean(0))


# iBOT


def test_ibot_scores_and_chooses_as_dino_does_local_crops_included():
    """HVP's iBOT never selects local crops."""
    ibot, other = built("ibot", teacher_temperature=0.04, warmup_teacher_epochs=0.0), built("dino")
    state = {n: v for n, v in ibot.state_dict().items() if n not in ("mask_token_D", "patch_centre_K")}
    other.load_state_dict(state)
    crops = crops_for("dino")
    scores = [o.pair_losses(crops, SelectionConfig()) for o in (ibot, other)]
    assert torch.equal(scores[0].losses_BP, scores[1].losses_BP)
    assert torch.equal(scores[0].local_BPL, scores[1].local_BPL)
    assert len(scores[0].local_BPL.unique()) > 3
    assert scores[0].features_BND is None  # its loss wants patch tokens too


@pytest.mark.parametrize("local_views", [0, 2])
def test_ibot_can_score_masked_views_with_their_patches_and_train_with_the_same_masks(local_views):
    """HVP's code: a pair's score is the loss of the image with exactly these masks."""
    fields = {"masked_scores": True, "mask_probability": 0.8, "patch_weight": 0.7, "local_views": local_views}
    objective = built("ibot", replace(STILL, patch_size=4), **fields)
    objective.mask_token_D.data.normal_()
    objective.patch_centre_K.normal_(std=0.1)
    crops = crops_for("ibot", batch=3)
    scores = objective.pair_losses(crops, SelectionConfig())
    masks = scores.mask_BNHW
    assert masks.shape == (3, 4, 4, 4) and masks.any() and not masks.all(3).all(2).any()
    for pair in range(6):
        chosen = objective.take(crops, torch.full((3,), pair), scores)
        assert torch.equal(chosen.mask_B2HW, masks[:, list(pairs(4)[pair])])
        for image in range(3):
            own = {name: value[image : image + 1] for name, value in vars(chosen).items() if isinstance(value, Tensor)}
            alone = replace(chosen, crops=tuple(c[image : image + 1] for c in chosen.crops), **own)
            loss, _ = objective.loss(alone)
            torch.testing.assert_close(loss.detach(), scores.losses_BP[image, pair], rtol=1e-4, atol=1e-5)
    plain = replace(objective.config, masked_scores=False)
    objective.config = plain
    assert objective.pair_losses(crops, SelectionConfig()).mask_BNHW is None


@pytest.mark.parametrize(
    ("backbone", "selection", "field"),
    [
        (STILL, SelectionConfig(encoder="target"), "selection.encoder: target"),
        (STILL, SelectionConfig(resolution=8), "selection.resolution: smaller views"),
        (STILL, SelectionConfig(audit_every=2), "selection.audit_every: a comparison"),
        (replace(STILL, batchnorm_mlp=True), SelectionConfig(), "backbone.batchnorm_mlp: statistics"),
    ],
)
def test_what_masked_scores_cannot_go_with_is_refused(backbone, selection, field):
    with pytest.raises(ValueError, match=f"{field}.* cannot go with objective.masked_scores; leave one of them out"):
        built("ibot", backbone, masked_scores=True).check(selection)


def naive_ibot_patches(o, globals_, masks):
    """Equation 2 of iBOT by a loop over views and patches, with masks put into the embedding by hand."""
    total = torch.zeros(())
    for view, mask in enumerate(masks):
        x = globals_.flatten(0, 1)[view : view + 1]
        model = o.online.backbone
        embedded = model.patch_embed.proj(x).permute(0, 2, 3, 1).clone()
        embedded[0, mask] = o.mask_token_D
        seen = model.norm(model.blocks(model.norm_pre(model.patch_drop(model._pos_embed(embedded)))))[0, 1:]
        taught = o.target.backbone.forward_features(x)[0, 1:]
        terms = []
        for patch in mask.flatten().nonzero()[:, 0].tolist():
            t = ((o.target.projector(taught[patch]) - o.patch_centre_K) / o.warmed(o.config.patch_temperature)).softmax(
                0
            )
            s = (o.online.projector(seen[patch]) / o.config.student_temperature).log_softmax(0)
            terms.append(-(t.detach() * s).sum())
        if terms:
            total = total + torch.stack(terms).mean()
    return total / len(masks)


def test_ibot_s_patch_loss_and_gradients_equal_a_loop_over_patches():
    one = built("ibot", replace(STILL, patch_size=4), mask_probability=0.8, local_views=0)
    one.mask_token_D.data.normal_()
    other, crops = copy.deepcopy(one), crops_for("plain", views=2)
    torch.manual_seed(4)
    loss, metrics = one.loss(one.take(crops, FIRST, None))
    torch.manual_seed(4)
    masks = other.masks(crops[0])
    assert 0 < masks.sum() < masks.numel() and (masks.sum((1, 2)) == 0).any()
    wanted = naive_ibot_patches(other, crops[0], masks)
    torch.testing.assert_close(metrics["patch_loss"], wanted.detach(), rtol=1e-4, atol=1e-5)
    plain = replace(one.config, patch_weight=0.0)
    one.config = plain
    torch.manual_seed(4)
    without, _ = one.loss(one.take(crops, FIRST, None))
    (loss - without).backward(), wanted.backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad, torch.zeros_like(p) if q.grad is None else q.grad, rtol=1e-3, atol=1e-4, msg=name
            )
    assert one.mask_token_D.grad.abs().sum() > 0


def test_ibot_s_patch_centre_is_the_mean_of_the_outputs_of_all_patches():
    objective, crops = built("ibot"), crops_for("ibot")
    tokens = objective.target.backbone.forward_features(crops[0][:, :2].flatten(0, 1))[:, 1:]
    mean = objective.target.projector(tokens).mean((0, 1)).detach()
    objective.loss(objective.take(crops, FIRST, None))
    objective.after_step()
    torch.testing.assert_close(objective.patch_centre_K, 0.1 * mean, rtol=1e-4, atol=1e-6)


def naive_block_mask(most, height, width):
    """The rule of iBOT's loader for one view, number by number."""
    draw, mask = random.Random(most).uniform, torch.zeros(height, width, dtype=torch.bool)
    failed, left = 0, most
    while left > 0 and failed < 10:
        area, ratio = draw((min(height, width) // 3) ** 2, left), math.exp(draw(math.log(0.3), -math.log(0.3)))
        high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, start = int(draw(0, height - high + 1)), int(draw(0, width - wide + 1))
        block = torch.zeros_like(mask)
        block[max(top, 0) : top + high, max(start, 0) : start + wide] = True
        new = int((block & ~mask).sum())
        if wide < width and high < height and 0 < new <= left:
            mask, left, failed = mask | block, left - new, 0
        else:
            failed += 1
    return mask


def test_masks_are_blocks_as_in_ibot_s_loader_from_the_global_generator():
    most = 196 * (0.1 + 0.4 * torch.rand(1500))
    masks = block_masks(most, 14, 14)
    assert (masks.sum((1, 2)) <= most).all() and masks.sum((1, 2)).min() > 0
    wanted = torch.stack([naive_block_mask(value, 14, 14) for value in most.tolist()])

    def neighbours(m):
        """Share of the four neighbours of masked patches that are masked too."""
        return ((m[:, 1:] & m[:, :-1]).sum() + (m[:, :, 1:] & m[:, :, :-1]).sum()) / (2 * m.sum())

    assert neighbours(masks).item() == pytest.approx(0.829, abs=0.01)
    assert neighbours(masks).item() == pytest.approx(neighbours(wanted).item(), abs=0.01)
    assert masks.float().mean().item() == pytest.approx(wanted.float().mean().item(), rel=0.03)
    torch.manual_seed(1)
    first = block_masks(most, 14, 14)
    torch.manual_seed(1)
    assert torch.equal(first, block_masks(most, 14, 14)) and not torch.equal(first, block_masks(most, 14, 14))


def test_half_of_ibot_s_views_are_masked_by_a_tenth_to_a_half():
    objective = built("ibot", replace(STILL, patch_size=2))
    share = objective.masks(torch.zeros(500, 2, 3, 16, 16)).float().mean((1, 2))
    assert 0.45 < (share > 0).float().mean() < 0.55 and share.max() <= 0.5 and share[share > 0].mean() > 0.25


def test_without_masks_ibot_s_loss_is_dino_s():
    ibot, other = (
        built("ibot", mask_probability=0.0, teacher_temperature=0.04, warmup_teacher_epochs=0.0),
        built("dino"),
    )
    other.load_state_dict({n: v for n, v in ibot.state_dict().items() if n not in ("mask_token_D", "patch_centre_K")})
    crops = crops_for("dino")
    losses = [o.loss(o.take(crops, FIRST, None))[0] for o in (ibot, other)]
    torch.testing.assert_close(*losses)


# Refusals


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("moco_v3", {"temperature": 0}, r"objective.temperature: 0 must be above 0; raise it"),
        ("simclr", {"temperature": -1}, r"objective.temperature: -1 must be above 0; raise it"),
        ("simclr", {"layers": 0}, r"objective.layers: 0 must be above 0"),
        ("simsiam", {"bottleneck": 0}, r"objective.bottleneck: 0 must be above 0"),
        ("byol", {"momentum": 1.1}, r"objective.momentum: 1.1 must lie between 0 and 1; the paper's is 0.996"),
        ("moco_v3", {"momentum": -0.1}, r"objective.momentum: -0.1 must lie between 0 and 1"),
        ("swav", {"epsilon": 0}, r"objective.epsilon: 0 must be above 0"),
        ("swav", {"freeze_epochs": -1}, r"objective.freeze_epochs: -1 must be 0 or above; raise it"),
        ("dino", {"teacher_temperature": 0}, r"objective.teacher_temperature: 0 must be above 0; raise it"),
        ("dino", {"centre_momentum": 2}, r"objective.centre_momentum: 2 must lie between 0 and 1"),
        ("dino", {"local_views": -1}, r"objective.local_views: -1 must be 0 or above; raise it"),
        ("dino", {"candidates": -128}, r"objective.candidates: -128 must be 0 or above"),
        ("ibot", {"mask_share": 0.1}, r"objective.mask_share: 0.1 ± 0.2 leaves 0 to 1; lower mask_variation"),
        ("ibot", {"mask_probability": 1.5}, r"objective.mask_probability: 1.5 must lie between 0 and 1"),
        ("ibot", {"patch_temperature": 0}, r"objective.patch_temperature: 0 must be above 0; raise it"),
        ("ibot", {"patch_weight": -1}, r"objective.patch_weight: -1 must be 0 or above; raise it"),
    ],
)
def test_bad_values_say_field_value_and_remedy(name, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIGS[name], **changes)


@pytest.mark.parametrize(
    "backbone",
    [replace(STILL, pool="avg"), replace(STILL, name="resnet10t", patch_size=None, width=None, depth=None, heads=None)],
)
def test_ibot_wants_a_vit_with_a_class_token(backbone):
    with pytest.raises(ValueError, match=r"backbone.name: iBOT masks patches of a ViT .* take a ViT and leave"):
        built("ibot", backbone)
