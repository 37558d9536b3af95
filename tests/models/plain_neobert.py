"""NeoBERT written a second time, from the paper: one text, one head, one token at a time, in float64."""

import cmath
import math

import torch

EPS = 1e-5


def plain_logits(tensors, tokens, *, layers, heads):
    """Logits [S, V] of one text from weights under their published names, without "model."."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    states = [w["encoder.weight"][token] for token in tokens]
    for layer in range(layers):
        block = {
            name.removeprefix(f"transformer_encoder.{layer}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"transformer_encoder.{layer}.")
        }
        normed = [plain_rms_norm(x, block["attention_norm.weight"]) for x in states]
        attended = plain_attention([block["qkv.weight"] @ x for x in normed], heads)
        states = [x + block["wo.weight"] @ a for x, a in zip(states, attended, strict=True)]
        states = [x + plain_swiglu(plain_rms_norm(x, block["ffn_norm.weight"]), block) for x in states]
    last = [plain_rms_norm(x, w["layer_norm.weight"]) for x in states]
    head = w.get("decoder.weight", w["encoder.weight"])
    return torch.stack([head @ x + w.get("decoder.bias", 0.0) for x in last])


def plain_rms_norm(x, weight):
    return weight * x / math.sqrt(float((x * x).sum()) / len(x) + EPS)


def plain_swiglu(x, block):
    gate, up = (block["ffn.w12.weight"] @ x).split(block["ffn.w3.weight"].shape[1])
    return block["ffn.w3.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def plain_attention(qkv, heads):
    size = len(qkv[0]) // heads // 3
    outputs = []
    for head in range(heads):
        rows = [x[3 * size * head : 3 * size * (head + 1)] for x in qkv]
        q = [plain_rotate(x[:size], position) for position, x in enumerate(rows)]
        k = [plain_rotate(x[size : 2 * size], position) for position, x in enumerate(rows)]
        v = torch.stack([x[2 * size :] for x in rows])
        mixed = []
        for query in q:
            scores = torch.tensor([float(query @ key) / math.sqrt(size) for key in k], dtype=torch.float64)
            shares = (scores - scores.max()).exp()
            mixed.append((shares / shares.sum()) @ v)
        outputs.append(mixed)
    return [torch.cat([outputs[head][token] for head in range(heads)]) for token in range(len(qkv))]


def plain_rotate(x, position):
    """Each pair is a complex number that is turned by position · 10,000^(-2i/D)."""
    turned = []
    for pair in range(len(x) // 2):
        angle = position * 10_000 ** (-2 * pair / len(x))
        number = complex(float(x[2 * pair]), float(x[2 * pair + 1])) * cmath.exp(1j * angle)
        turned += [number.real, number.imag]
    return torch.tensor(turned, dtype=torch.float64)
