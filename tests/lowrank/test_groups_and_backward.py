"""low_rank_groups and step_in_backward."""

import pytest
import torch
from torch import nn

import pykern


class Tiny(nn.Module):
    """An embedding tied to the head, two blocks, a norm, and an expert that is used only on request."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
        self.expert = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, expert=True):
        hidden = self.embedding(tokens)
        hidden = hidden + self.blocks[1](torch.tanh(self.blocks[0](hidden)))
        if expert:
            hidden = hidden + self.expert(hidden)
        return self.head(self.norm(hidden))


def names(model, group):
    ids = {id(param) for param in group["params"]}
    return {name for name, param in model.named_parameters() if id(param) in ids}


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all-linear", {"blocks.0.weight", "blocks.1.weight", "expert.weight"}),
        (r"blocks\.\d", {"blocks.0.weight", "blocks.1.weight"}),
        (["blocks.1", "expert"], {"blocks.1.weight", "expert.weight"}),
        (["norm", "expert"], {"expert.weight"}),
    ],
    ids=("all-linear", "expression", "names", "names that are no weights"),
)
def test_targets(targets, expected):
    model = Tiny()
    low_rank, plain = pykern.low_rank_groups(model, rank=3, targets=targets, scale=0.5, refresh_every=7)
    assert names(model, low_rank) == expected
    assert names(model, plain) == {name for name, _ in model.named_parameters()} - expected
    assert (low_rank["rank"], low_rank["scale"], low_rank["refresh_every"]) == (3, 0.5, 7)
    assert plain["rank"] is None and "scale" not in plain
    pykern.GaLoreAdamW([low_rank, plain], 0.01, rank=99)


@pytest.mark.parametrize("exclude", [["expert"], "exp.*"])
def test_exclusions(exclude):
    model = Tiny()
    low_rank, _ = pykern.low_rank_groups(model, rank=3, exclude=exclude)
    assert names(model, low_rank) == {"blocks.0.weight", "blocks.1.weight"}
    with pytest.raises(ValueError, match="targets: .* nothing matches 'expert' without"):
        pykern.low_rank_groups(model, rank=3, targets="expert", exclude=exclude)


def test_convolutions_on_request():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv1d(8, 4, 5), nn.Linear(4, 2, bias=False))
    assert names(model, pykern.low_rank_groups(model, rank=2)[0]) == {"2.weight"}
    groups = pykern.low_rank_groups(model, rank=2, convolutions=True)
    assert names(model, groups[0]) == {"0.weight", "1.weight", "2.weight"}
    optimizer = pykern.GaLoreAdamW(groups, 0.1)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[model[0].weight]["projector"].shape == (8, 2)


def test_frozen_parameters_stay_out():
    model = Tiny()
    model.expert.weight.requires_grad_(False)
    groups = pykern.low_rank_groups(model, rank=3)
    assert not any(param is model.expert.weight for group in groups for param in group["params"])


def test_only_low_rank_weights():
    assert len(pykern.low_rank_groups(nn.Linear(4, 4, bias=False), rank=2)) == 1


@pytest.mark.parametrize("targets", ["nothing", ["nothing"], r"block"])
def test_no_match_is_refused(targets):
    with pytest.raises(ValueError, match="targets: .* nothing matches"):
        pykern.low_rank_groups(Tiny(), rank=3, targets=targets)


def make(params):
    return pykern.FiraAdamW(params, 0.01, rank=3, refresh_every=3, weight_decay=0.1)


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 11, (6,), generator=generator) for _ in range(count)]


def loss_of(model, tokens, expert=True):
    return nn.functional.cross_entropy(model(tokens, expert), tokens.roll(1))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_stepping_in_backward_equals_plain_stepping(accumulate):
    torch.manual_seed(1)
    plain = Tiny()
    hooked = Tiny()
    hooked.load_state_dict(plain.state_dict())
    optimizer = make(list(plain.parameters()))
    stepper = pykern.step_in_backward(hooked, make, accumulate=accumulate)
    # Every third pass leaves the expert out: with accumulation it is then stepped at the end of the window.
    for index, tokens in enumerate(batches(4 * accumulate)):
        expert = index % 3 != 2
        (loss_of(plain, tokens, expert) / accumulate).backward()
        (loss_of(hooked, tokens, expert) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            assert all(param.grad is None for param in hooked.parameters())
            for (name, one), other in zip(plain.named_parameters(), hooked.parameters(), strict=True):
                assert torch.equal(one, other), name
    assert len(stepper.optimizers) == len(list(hooked.parameters()))


def test_gradients_are_freed_one_by_one():
    model = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(4)])
    most = 0

    class Watching(pykern.GaLoreAdamW):
        def step(self, closure=None):
            nonlocal most
            most = max(most, sum(param.grad is not None for param in model.parameters()))
            return super().step(closure)

    pykern.step_in_backward(model, lambda params: Watching(params, 0.01, rank=2))
    model(torch.randn(3, 6)).sum().backward()
    assert most == 1


def test_checkpoint_between_passes_of_a_window():
    torch.manual_seed(2)
    model, other = Tiny(), Tiny()
    stepper = pykern.step_in_backward(model, make, accumulate=2)
    tokens = batches(5)
    for batch in tokens[:2]:
        loss_of(model, batch).backward()
    other.load_state_dict(model.state_dict())
    resumed = pykern.step_in_backward(other, make, accumulate=2)
    resumed.load_state_dict(stepper.state_dict())
    for batch in tokens[2:4]:
        loss_of(model, batch).backward()
        loss_of(other, batch).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="state_dict: expected the parameters of this model"):
        resumed.load_state_dict({"passes": 0, "optimizers": {}})


def test_learning_rate_by_hand_and_removal():
    model = nn.Linear(4, 4)
    stepper = pykern.step_in_backward(model, make)
    for group in stepper.param_groups:
        group["lr"] = 0.0
    before = model.weight.detach().clone()
    model(torch.randn(2, 4)).sum().backward()
    assert torch.equal(model.weight, before) and model.weight.grad is None
    stepper.remove()
    model(torch.randn(2, 4)).sum().backward()
    assert model.weight.grad is not None


def test_non_reentrant_checkpointing():
    torch.manual_seed(3)
    model, plain = nn.Linear(6, 6), nn.Linear(6, 6)
    plain.load_state_dict(model.state_dict())
    pykern.step_in_backward(model, make, accumulate=2)
    optimizer = make(list(plain.parameters()))
    for index in range(4):
        inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(index))
        torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False).square().sum().backward()
        plain(inputs).square().sum().backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.weight, plain.weight, rtol=0, atol=0)


def test_a_pass_that_raises_is_not_counted():
    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("refused")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pykern.step_in_backward(model, make, accumulate=2)
    inputs = torch.randn(3, 4)
    before = model[1].weight.detach().clone()
    with pytest.raises(ArithmeticError):
        model[1](Refuse.apply(model[0](inputs))).sum().backward()
    model(inputs).sum().backward()
    assert torch.equal(model[1].weight, before)
    model(inputs).sum().backward()
    assert not torch.equal(model[1].weight, before)
    assert all(param.grad is None for param in model.parameters())


def test_accumulate_below_one_is_refused():
    with pytest.raises(ValueError, match="accumulate: expected at least 1"):
        pykern.step_in_backward(nn.Linear(2, 2), make, accumulate=0)
