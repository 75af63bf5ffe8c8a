"""The CO term against a double loop over locations, its options, and every method x {plain, CO} x {CNN, RF, ViT}."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_parts import SMALL, photographs

from coss_eval.errors import UsageError
from coss_eval.models.architecture import Architecture
from coss_eval.models.backbone import Backbone, as_locations
from coss_eval.models.rf_resnet import RFResNet
from coss_eval.models.zoo import wrap
from coss_eval.training.local import Draw, LocalConfig, LocalTerm, choose, regional, unlikeness
from coss_eval.training.method import Comparison
from coss_eval.training.methods import METHODS, make_method, method_class
from coss_eval.training.optim import make_optimizer, parameter_groups
from coss_eval.training.pretraining import Pretraining

SEPARABLE = ("byol", "simsiam", "dino", "mocov3", "simclr")  # their loss is a mean over online vectors
BACKBONES = ("resnet", "rf-resnet", "vit")


def loss_by_loops(compare: Comparison, online: Tensor, targets: Tensor) -> Tensor:
    """``LocalTerm.loss`` as it is defined: location by location. For comparisons that average over online vectors."""
    losses = [
        compare(online[image, location][None], targets[:, region], torch.tensor([image]))
        for region in range(targets.shape[1])
        for image in range(online.shape[0])
        for location in range(online.shape[1])
    ]
    return torch.stack(losses).mean()


def backbone(kind: str) -> Backbone:
    if kind == "resnet":
        return Architecture("resnet18", "cifar", 8).backbone(seed=0)
    if kind == "vit":
        return Architecture("vit_d24_l2_h2_p8", img_size=32).backbone(seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = RFResNet(18, kept=(4, 4, 1, 0), stem="cifar", width=8, mlp_layers=2, mlp_width=24)
    return wrap(made, "rf29")[0]


def objective(
    name: str,
    kind: str = "resnet",
    *,
    local: bool = True,
    small_predictor: bool = False,
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> Pretraining:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LocalConfig(**fields) if local else None
        method = make_method(name, **SMALL[name], **(options or {}))
        return Pretraining(backbone(kind), method, config, small_predictor=small_predictor)


def two_views(n: int = 8, size: int = 32) -> list[Tensor]:
    images = photographs(n, size=size)
    return [images, (images + 0.3 * photographs(n, seed=1, size=size)).flip(-1)]


def test_a_local_weight_of_nothing_trains_nothing() -> None:
    """The loss and its gradients are the global term's alone, those of the method without the local term."""
    with_term, without = objective("byol", local_weight=0.0), objective("byol", local=False)
    views = two_views()
    losses, plain = with_term(views), without(views)
    assert losses.total.item() == plain.total.item()
    assert losses.local is not None
    assert losses.local > 0
    losses.total.backward()
    plain.total.backward()
    for mine, theirs in zip(with_term.backbone.parameters(), without.backbone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert with_term.term is not None
    assert all(not p.grad.any() for p in with_term.term.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("regions", [1, 4])
@pytest.mark.parametrize("locations", [1, 5])
def test_the_vectorised_term_is_the_double_loop(name: str, regions: int, locations: int) -> None:
    term = LocalTerm(LocalConfig(), make_method(name, **SMALL[name]), local_dim=6, dim=6).eval()
    generator = torch.Generator().manual_seed(0)
    online = torch.randn(4, locations, 20, generator=generator)
    targets = torch.randn(4, regions, 20, generator=generator)
    expected = loss_by_loops(term.compare, online, targets)
    torch.testing.assert_close(term.loss(online, targets), expected, atol=1e-5, rtol=1e-5)


def test_random_locals_are_others_in_each_epoch_and_view() -> None:
    model, view = objective("byol", sampling="subset", local_grid=2).eval(), two_views()[0]
    with torch.no_grad():
        encoded = [model._encode(model.backbone, view)] * 2
        here, there = (model._locals(encoded, torch.arange(len(view)), epoch) for epoch in (0, 1))
    assert all(not torch.equal(one, other) for one, other in ((here[0], here[1]), (here[0], there[0])))
    assert torch.equal(here[0], model._locals(encoded, torch.arange(len(view)), 0)[0])


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_coupled_terms_see_all_locations_as_one_batch(name: str) -> None:
    term = LocalTerm(LocalConfig(), make_method(name, **SMALL[name]), local_dim=6, dim=6)
    generator = torch.Generator().manual_seed(0)
    online, targets = torch.randn(4, 5, 8, generator=generator), torch.randn(4, 1, 8, generator=generator)
    rows = torch.stack([online[image, location] for image in range(4) for location in range(5)])
    owners = torch.tensor([image for image in range(4) for _ in range(5)])
    torch.testing.assert_close(term.loss(online, targets), term.compare(rows, targets[:, 0], owners))


def test_the_heads_are_convolutions_of_one_pixel() -> None:
    """The same MLP at every location is a chain of 1x1 convolutions, its BatchNorm over images and places."""
    term = LocalTerm(LocalConfig(), make_method("byol", hidden=16, out=8), local_dim=6, dim=6)
    planes = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    assert term.heads is not None
    parts = [*term.heads.projector, *term.heads.predictor]
    expected = planes
    for part in parts:
        if isinstance(part, nn.Linear):
            expected = nn.functional.conv2d(expected, part.weight[:, :, None, None], part.bias)
        elif isinstance(part, nn.BatchNorm1d):
            expected = nn.functional.batch_norm(expected, None, None, part.weight, part.bias, training=True)
        else:
            expected = torch.relu(expected)
    found = term.online(as_locations(planes, "nchw"), term.heads)
    torch.testing.assert_close(found, as_locations(expected, "nchw"), atol=1e-5, rtol=1e-4)


def test_the_whole_loss_is_the_two_terms_put_together_by_hand() -> None:
    """CO-BYOL from its definition: each view's locals to the other view's global, through the target network."""
    model, views = objective("byol", local_weight=0.4, global_weight=0.7), two_views()
    assert model.target is not None
    assert model.term is not None
    assert model.term.heads is not None
    index = torch.arange(8)
    global_, local = torch.zeros(()), torch.zeros(())
    for a, b in ((views[0], views[1]), (views[1], views[0])):
        seen = model.backbone.represent(a)
        target = model.target.backbone(b)
        compare = model.method.comparison()
        global_ = global_ + compare(model.heads(seen.global_), model.target.projector(target), index)
        online = model.term.heads(seen.local.flatten(0, 1)).unflatten(0, (8, -1))
        local = local + loss_by_loops(compare, online, model.target.local_projector(target)[:, None])
    losses = model(views)
    torch.testing.assert_close(losses.global_, global_, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.local, local, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.total, 0.7 * global_ + 0.4 * local, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["byol", "mocov3", "dino"])
def test_targets_start_as_copies_and_follow_by_parameters_only(name: str) -> None:
    model = objective(name)
    assert model.target is not None
    online = dict(model._online().named_parameters())
    for key, parameter in model.target.named_parameters():
        assert torch.equal(parameter, online[key]), key
        assert not parameter.requires_grad
    model.train()(two_views()).total.backward()
    assert all(parameter.grad is None for parameter in model.target.parameters())
    buffers = {key: value.clone() for key, value in model.target.named_buffers()}
    with torch.no_grad():
        for parameter in model._online().parameters():
            parameter.add_(1)
        for _, buffer in model.backbone.named_buffers():
            buffer.add_(1)
    before = {key: parameter.clone() for key, parameter in model.target.named_parameters()}
    model.ema(0.9)
    for key, parameter in model.target.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[key] + 0.1 * online[key])
    assert all(torch.equal(value, buffers[key]) for key, value in model.target.named_buffers())


def test_the_target_uses_its_own_batch_statistics() -> None:
    model = objective("byol").train()
    assert model.target is not None
    model(two_views())
    norm = next(module for module in model.target.modules() if isinstance(module, nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == 2  # one of its own for each view
    assert model.target.training


def test_the_local_target_projector_sees_globals_and_is_a_network_of_its_own() -> None:
    model = objective("byol")
    assert model.target is not None
    assert model.term is not None
    assert model.term.heads is not None
    copies = model.target.local_projector
    assert copies is not None
    assert not torch.equal(copies[0].weight, model.target.projector[0].weight)
    assert torch.equal(copies[0].weight, model.term.heads.projector[0].weight)


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_one_direction_of_a_symmetric_loss_is_both(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = objective(name, local=False)(two_views()).total
    monkeypatch.setattr(method_class(name), "symmetric", False)
    torch.testing.assert_close(one, objective(name, local=False)(two_views()).total)


def test_shared_heads_add_no_parameters() -> None:
    plain, shared = objective("byol", local=False), objective("byol", heads="shared")
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in shared.parameters())


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize(
    "fields",
    [
        {"local_grid": 2},
        {"local_grid": 2, "sampling": "subset"},
        {"local_grid": 100},
        {"heads": "shared"},
        {"view": "same"},
        {"site": "stage1", "local_grid": 2},
        {"site": "stage2", "heads": "shared", "local_grid": 2},
        {"regions": 2},
        {"regions": 2, "heads": "shared"},
    ],
    ids=str,
)
def test_every_option_gives_gradients_to_the_backbone(kind: str, fields: dict[str, Any]) -> None:
    model = objective("byol", kind, global_weight=0.0, **fields)
    losses = model(two_views())
    losses.total.backward()
    assert losses.local is not None
    assert 0 < float(losses.local) < 8
    norms = [float(p.grad.norm()) for p in model.backbone.parameters() if p.grad is not None]
    assert sum(norm > 0 for norm in norms) > 3


def test_the_same_view_is_another_number_than_the_other_view() -> None:
    views = two_views()
    other, same = (objective("byol", view=view)(views).local for view in ("other", "same"))
    assert not torch.allclose(other, same)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_grid_as_large_as_the_map_or_larger_takes_every_location(kind: str) -> None:
    views = two_views()
    every, large = (objective("byol", kind, local_grid=grid)(views).local for grid in (None, 50))
    torch.testing.assert_close(every, large)


def test_pooled_and_random_locals() -> None:
    site = backbone("resnet").sites["prepool"]
    planes, ids = torch.randn(3, 7, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 9, 11])
    pooled = choose(planes, LocalConfig(local_grid=2), site, Draw(ids, 0, 0, 0))
    torch.testing.assert_close(pooled[:, 0], planes[:, :, :2, :2].mean((2, 3)))
    assert choose(planes, LocalConfig(local_grid=3), site, Draw(ids, 0, 0, 0)).shape == (3, 9, 7)
    config = LocalConfig(local_grid=2, sampling="subset")
    subset = choose(planes, config, site, Draw(ids, 0, 0, 0))
    every = as_locations(planes, "nchw")
    places = (subset[:, :, None] == every[:, None]).all(-1).float().argmax(-1)  # (B, 4)
    assert all(len(set(row)) == 4 for row in places.tolist())
    order = torch.tensor([2, 0, 1])  # a subset belongs to the sample, not to its place in the batch
    again = choose(planes[order], config, site, Draw(ids[order], 0, 0, 0))
    assert torch.equal(again, subset[order])
    for other in (Draw(ids, 1, 0, 0), Draw(ids, 0, 1, 0), Draw(ids, 0, 0, 1)):
        assert not torch.equal(choose(planes, config, site, other), subset)


@pytest.mark.parametrize("kind", BACKBONES)
def test_regional_globals_are_the_globals_of_the_regions(kind: str) -> None:
    network = backbone(kind).eval()
    layout, prefix = network.prepool_layout, network.prefix_tokens
    corner = torch.randn(3, network.local_dim, 2, 2, generator=torch.Generator().manual_seed(0))
    planes = torch.cat([torch.cat([corner, 2 * corner], 3), torch.cat([3 * corner, 4 * corner], 3)], 2)
    features = planes if layout == "nchw" else nn.functional.pad(planes.flatten(2).mT, (0, 0, prefix, 0))
    found = network.pool(regional(features, 2, layout, prefix)).view(3, 4, -1)
    for i in range(4):
        quarter = (i + 1) * corner
        if layout == "nlc":  # a class token has no region of its own; the region's mean stands for it
            mean = quarter.mean((2, 3))[:, None].expand(-1, prefix + 1, -1)
            torch.testing.assert_close(found[:, i], network.pool(mean))
        else:
            torch.testing.assert_close(found[:, i], network.pool(quarter))


def test_small_views_are_students_only() -> None:
    model, views = objective("dino"), two_views()
    small = [view[:, :, :16, :16] for view in views]
    seen: list[int] = []
    assert model.target is not None
    handle = model.target.backbone.global_.register_forward_hook(lambda *_: seen.append(1))
    losses = model([*views, *small], full=2)
    handle.remove()
    assert len(seen) == 2
    losses.total.backward()


PREDICTING = [name for name in METHODS if method_class(name).has_predictor]


def multi_crop() -> list[Tensor]:
    """Two full views of 32 px and two small ones of 16."""
    views = two_views()
    return [*views, *(view[:, :, 8:24, 8:24] for view in views)]


def test_the_similarity_term_is_the_mean_over_pairs_of_locations() -> None:
    locations = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    pairs = [
        1 - torch.cosine_similarity(image[i], image[j], dim=0)
        for image in locations
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    torch.testing.assert_close(unlikeness(locations), torch.stack(pairs).mean())
    assert float(unlikeness(locations[:, :1].expand(-1, 4, -1))) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UsageError, match="two locations or more"):
        unlikeness(locations[:, :1])


@pytest.mark.parametrize("name", ["byol", "dino", "vicreg"])
def test_the_similarity_term_trains_the_backbone_alone_and_makes_locals_alike(name: str) -> None:
    model = objective(name, "rf-resnet", term="similarity", global_weight=0.0, local_weight=1.0)
    assert model.term is not None
    assert model.term.heads is None
    views = two_views()
    losses = model(views)
    by_view = [unlikeness(model.backbone.represent(view).local) for view in views]
    torch.testing.assert_close(losses.local, torch.stack(by_view).mean())
    losses.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.heads.parameters())
    optimizer = make_optimizer("sgd", parameter_groups(model.backbone, 0.0), lr=0.5)
    optimizer.step()
    assert model(views).local < losses.local


def test_the_similarity_term_has_no_targets() -> None:
    with pytest.raises(UsageError, match="neither heads nor targets"):
        LocalConfig(term="similarity", view="same")


@pytest.mark.parametrize("local", [False, True], ids=["plain", "co"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", PREDICTING)
def test_a_small_view_trains_the_predictor_of_its_kind(name: str, own: bool, local: bool) -> None:
    """Another small view gives other gradients to the small views' predictor, the same bits to the full views' own."""
    model, views = objective(name, local=local, small_predictor=own), multi_crop()
    found = []
    for last in (views[3], views[3].flip(0)):
        model.zero_grad()
        model([*views[:3], last], full=2).total.backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    changed = {key for key, gradient in found[0].items() if not torch.equal(gradient, found[1][key])}
    kinds = {key: key.partition("predictor.")[0] + "predictor" for key in found[0] if "predictor." in key}
    assert set(kinds.values()) == {
        "heads.predictor",
        *(["small_predictor"] if own else []),
        *(["term.heads.predictor"] if local else []),
    }
    for key, kind in kinds.items():
        moves = key in changed or not bool(found[0][key].abs().max() > 1e-6)  # a bias before a BatchNorm gets none
        assert moves != (own and kind == "heads.predictor"), key


@pytest.mark.slow
@pytest.mark.parametrize("name", PREDICTING)
def test_all_else_starts_and_counts_as_with_one_predictor(name: str) -> None:
    """A predictor of their own that says the same: small views' directions weigh a half in place of 4 in 6."""
    shared, own = (objective(name, small_predictor=small) for small in (False, True))
    for key, value in shared.state_dict().items():
        assert torch.equal(value, own.state_dict()[key]), key
    assert own.small_predictor is not None
    assert not torch.equal(own.small_predictor[0].weight, own.heads.predictor[0].weight)
    full, other = own(multi_crop()[:2]), own(multi_crop(), full=2)
    assert torch.equal(full.total, shared(multi_crop()[:2]).total)  # without small views it has no say
    alike = shared(multi_crop(), full=2)
    assert not torch.equal(other.global_, alike.global_)
    own.small_predictor.load_state_dict(shared.heads.predictor.state_dict())
    between_full = full.global_  # of the two directions
    of_small = (6 * alike.global_ - 2 * between_full) / 4  # what is left for each of the four others
    torch.testing.assert_close(own(multi_crop(), full=2).global_, (between_full + of_small) / 2)


def test_methods_say_whether_they_have_a_predictor() -> None:
    assert PREDICTING == ["byol", "mocov3", "simsiam"]
    for name in METHODS:
        method = make_method(name, **SMALL[name])
        made, of_heads = method.predictor(), method.heads(14).predictor
        assert (made is not None) == (not isinstance(of_heads, nn.Identity)) == method.has_predictor
        if made is not None:
            assert str(made) == str(of_heads)


def test_more_views_do_not_weigh_more() -> None:
    """A summed pair is twice the mean over directions, however many directions there are."""
    model, views = objective("byol").eval(), two_views()
    pair = model([views[0], views[0]])
    four = model([views[0]] * 4, full=2)
    torch.testing.assert_close(pair.total, four.total)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_weight": -0.1}, "at least 0, got 1.0 and -0.1"),
        ({"global_weight": -1.0}, "at least 0"),
        ({"local_grid": 0}, "at least 1"),
        ({"site": "stage9"}, "stage1"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective("byol", **fields)


def test_supervised_has_no_local_term() -> None:
    with pytest.raises(UsageError, match="leave co- out"):
        objective("supervised")


RATES = {"byol": 0.05, "simsiam": 0.05, "dino": 0.05, "mocov3": 0.05, "simclr": 0.1, "vicreg": 0.01, "barlow": 0.02}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", [*METHODS, *(f"co-{name}" for name in METHODS if name != "supervised")])
def test_training_steps_lower_the_loss(name: str, kind: str) -> None:
    """Eight steps on one batch; the target network follows, so the task itself moves.

    DINO's heads are without BatchNorm too small at the start for any step: their output, made a unit vector, turns
    about with a change of 1e-6.
    """
    base = name.removeprefix("co-")
    options = {"batch_norm": True} if base == "dino" else None
    model = objective(base, kind, local=name != base, options=options).train()
    optimizer = make_optimizer("sgd", parameter_groups(model, 0.0), lr=RATES.get(base, 0.05))
    assert_falls(model, optimizer, two_views(16))


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True], ids=["plain", "co"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", PREDICTING)
def test_multi_crop_steps_lower_the_loss(name: str, own: bool, local: bool) -> None:
    model = objective(name, local=local, small_predictor=own).train()
    optimizer = make_optimizer("sgd", parameter_groups(model, 0.0), lr=RATES[name])
    assert_falls(model, optimizer, multi_crop())


def assert_falls(model: Pretraining, optimizer: torch.optim.Optimizer, views: list[Tensor]) -> None:
    labels, losses = torch.arange(len(views[0])) % 5, []
    for step in range(8):
        found = model(views, labels, full=2)
        losses.append(found.total.item())
        optimizer.zero_grad()
        found.total.backward()
        model.before_step(0.5 + step / 20)
        optimizer.step()
        model.ema(0.99)
        model.after_step(0.5 + step / 20)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert min(losses[-2:]) < losses[0], losses
