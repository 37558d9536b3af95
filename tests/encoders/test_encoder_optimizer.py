"""Steps of AdamW, Adam and Muon against their written-out formulas, and which parameters take which."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from inft.encoders.optimizer import make_optimizers
from params.encoder import OptimizerParams
from params.errors import UserError

HEADS, HIDDEN, FFN = 2, 8, 12


class Block(nn.Module):
    """The weights of a NeoBERT block by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.attention_norm = nn.RMSNorm(HIDDEN)
        self.ffn = nn.ModuleDict(
            {"w12": nn.Linear(HIDDEN, 2 * FFN, bias=False), "w3": nn.Linear(FFN, HIDDEN, bias=False)}
        )


class Encoder(nn.Module):
    """Embeddings of tokens and positions, blocks, and a tied head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS)
        self.encoder = nn.Embedding(20, HIDDEN)
        self.positional_embedding = nn.Embedding(16, HIDDEN)
        self.transformer_encoder = nn.ModuleList(Block() for _ in range(2))
        self.layer_norm = nn.RMSNorm(HIDDEN)
        self.decoder = nn.Linear(HIDDEN, 20)
        self.decoder.weight = self.encoder.weight


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    model = Encoder().double()
    for weight in model.parameters():
        nn.init.normal_(weight)
        weight.grad = torch.randn_like(weight)
    return model


def names(model: nn.Module, group: dict) -> set[str]:
    of = {id(weight): name for name, weight in model.named_parameters()}
    return {of[id(weight)] for weight in group["params"]}


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_every_parameter_has_one_place_and_tied_weights_count_once(name):
    model = encoder()
    groups = [
        group for optimizer in make_optimizers(model, OptimizerParams(name=name)) for group in optimizer.param_groups
    ]
    placed = [id(weight) for group in groups for weight in group["params"]]
    assert len(placed) == len(set(placed)) == len(list(model.parameters()))
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_norms_biases_and_positions_do_not_decay(name):
    model = encoder()
    kept = set()
    for optimizer in make_optimizers(model, OptimizerParams(name=name, weight_decay=0.1)):
        for group in optimizer.param_groups:
            assert group["weight_decay"] in (0, 0.1)
            kept |= names(model, group) if group["weight_decay"] == 0 else set()
    norms = {f"transformer_encoder.{i}.attention_norm.weight" for i in range(2)} | {"layer_norm.weight"}
    assert kept == norms | {"decoder.bias", "positional_embedding.weight"}


def test_frozen_parameters_are_left_out():
    model = encoder()
    model.encoder.weight.requires_grad_(False)
    [optimizer] = make_optimizers(model, OptimizerParams())
    assert not any("encoder.weight" in names(model, group) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_two_steps_equal_the_written_out_formula_in_float64(name):
    params = OptimizerParams(name=name, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    model = encoder()
    weights = dict(model.named_parameters())
    expected = {n: w.detach().clone() for n, w in weights.items()}
    moments = {n: (torch.zeros_like(w), torch.zeros_like(w)) for n, w in weights.items()}
    [optimizer] = make_optimizers(model, params)
    for step in (1, 2):
        for n, w in weights.items():
            decays = w.dim() == 2 and "position" not in n
            decay, grad, (m, v) = 0.1 if decays else 0.0, w.grad.clone(), moments[n]
            if name == "adam":
                grad = grad + decay * expected[n]
            m.copy_(0.9 * m + 0.1 * grad)
            v.copy_(0.95 * v + 0.05 * grad**2)
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            shrunk = expected[n] * (1 - 0.01 * decay) if name == "adamw" else expected[n]
            expected[n] = shrunk - 0.01 * update
        optimizer.step()
        for w in weights.values():
            w.grad = torch.randn_like(w)
    for n, w in weights.items():
        torch.testing.assert_close(w.detach(), expected[n], rtol=1e-12, atol=1e-12)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = encoder()
    muon, adamw = make_optimizers(model, OptimizerParams(name="muon"))
    taken = set().union(*(names(model, group) for group in muon.param_groups))
    matrices = ("qkv", "wo", "ffn.w12", "ffn.w3")
    assert taken == {f"transformer_encoder.{i}.{name}.weight" for i in range(2) for name in matrices}
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 numbers, in float64."""
    return x.bfloat16().double()


def written_out_muon(weight, grads, lr=0.01, decay=0.1, momentum=0.95):
    """Jordan et al. 2024 with Nesterov momentum, scaled as in Liu et al. 2025 (equation 4), iterating in bfloat16."""
    buffer = torch.zeros_like(weight)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        x = rounded(momentum * buffer + (1 - momentum) * grad)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = rounded(x / rounded(x.norm()))
        for _ in range(5):
            gram = rounded(x @ x.T)
            x = rounded(3.4445 * x + rounded(-4.7750 * gram + 2.0315 * gram @ gram) @ x)
        x = x.T if tall else x
        weight = (1 - lr * decay) * weight - lr * 0.2 * max(weight.shape) ** 0.5 * x
    return weight


def parts_of(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v of all heads, SwiGLU's halves, or the tensor itself: by indexing rows one by one."""
    if name.endswith("qkv.weight"):
        size = HIDDEN // HEADS
        rows = [[(3 * head + part) * size + row for head in range(HEADS) for row in range(size)] for part in range(3)]
        return [tensor[index] for index in rows]
    return list(tensor.chunk(2)) if name.endswith("w12.weight") else [tensor]


def test_two_steps_of_muon_equal_the_written_out_formula_part_by_part():
    model = encoder()
    blocks = {n: w for n, w in model.named_parameters() if w.dim() == 2 and n.startswith("transformer_encoder")}
    before = {n: w.detach().clone() for n, w in blocks.items()}
    grads = {n: [torch.randn_like(w) for _ in range(2)] for n, w in blocks.items()}
    muon, _ = make_optimizers(model, OptimizerParams(name="muon", lr=0.01, weight_decay=0.1))
    for step in range(2):
        for n, w in blocks.items():
            w.grad = grads[n][step]
        muon.step()
    for n, w in blocks.items():
        history = [parts_of(n, grad) for grad in grads[n]]
        for part, (got, start) in enumerate(zip(parts_of(n, w.detach()), parts_of(n, before[n]), strict=True)):
            wanted = written_out_muon(start, [grad[part] for grad in history])
            moved = (wanted - start).norm()
            assert (got - wanted).norm() < 0.02 * moved, (n, part)  # rounding of bfloat16 within the iteration


def test_a_part_moves_as_it_would_as_a_weight_of_its_own():
    model = encoder()
    qkv = model.transformer_encoder[0].qkv.weight
    with torch.no_grad():
        parts_of("qkv.weight", qkv.grad)  # v's gradient a thousand times that of q
        qkv.grad.unflatten(0, (HEADS, 3, -1))[:, 2] *= 1_000
    alone = [nn.Parameter(part.clone()) for part in parts_of("qkv.weight", qkv.detach())]
    for weight, grad in zip(alone, parts_of("qkv.weight", qkv.grad), strict=True):
        weight.grad = grad
    plain = {"lr": 1e-4, "weight_decay": 0.01, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon(alone, **plain).step()
    before = qkv.detach().clone()
    make_optimizers(model, OptimizerParams(name="muon", lr=1e-4))[0].step()
    for got, wanted in zip(parts_of("qkv.weight", qkv.detach()), alone, strict=True):
        assert torch.equal(got, wanted)
    moved = [part.norm() for part in parts_of("qkv.weight", qkv.detach() - before)]
    assert max(moved) < 1.5 * min(moved)


def test_a_step_goes_on_bit_equal_after_its_state_was_stored():
    params = OptimizerParams(name="muon", lr=0.01)
    straight, stored = encoder(), encoder()
    first, second = make_optimizers(straight, params), make_optimizers(stored, params)
    for optimizer in [*first, *second]:
        optimizer.step()
    resumed = make_optimizers(stored, params)
    for optimizer, old in zip(resumed, second, strict=True):
        optimizer.load_state_dict(old.state_dict())
    for optimizer in [*first, *resumed]:
        optimizer.step()
    for one, other in zip(straight.parameters(), stored.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_without_blocks_is_refused():
    with pytest.raises(UserError, match="set adamw"):
        make_optimizers(nn.Linear(4, 4), OptimizerParams(name="muon"))


def test_three_betas_are_refused():
    with pytest.raises(UserError, match=r"0\.9,0\.95; got 3"):
        make_optimizers(encoder(), OptimizerParams(betas=(0.9, 0.95, 0.99)))
