"""The client's losses as their formulas read, in loops over float64: what the fast ones are compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

Plain = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


def logprob(logits: Tensor, label: int) -> Tensor:
    return logits[label] - torch.log(torch.exp(logits).sum())


def supervised(labels: Tensor) -> list[tuple[int, int, int]]:
    rows, length = labels.shape
    places = [(row, place, int(labels[row, place])) for row in range(rows) for place in range(length)]
    return [entry for entry in places if entry[2] != -100]


def token_ce(logits: Tensor, labels: Tensor, extras: dict[str, Tensor]) -> Tensor:
    places = supervised(labels)
    return -sum(logprob(logits[row, place], label) for row, place, label in places) / len(places)


def row_scores(logits: Tensor, labels: Tensor) -> list[Tensor]:
    scores = [logits.new_zeros(()) for _ in labels]
    for row, place, label in supervised(labels):
        scores[row] = scores[row] + logprob(logits[row, place], label)
    return scores


def margin_ranking(logits: Tensor, labels: Tensor, extras: dict[str, Tensor], margin: float = 1.0) -> Tensor:
    scores = row_scores(logits, labels)
    losses = []
    for pair in extras["pair_ids"].unique().tolist():
        rows = [row for row in range(len(labels)) if extras["pair_ids"][row] == pair]
        chosen, rejected = sorted(rows, key=lambda row: -int(extras["chosen"][row]))
        gap = scores[chosen] - scores[rejected]
        losses.append(margin - gap if margin > gap else 0 * gap)
    return sum(losses) / len(losses)


def contrastive(hidden: Tensor, mask: Tensor, pair_ids: Tensor, temperature: float) -> Tensor:
    vectors = []
    for row in range(len(hidden)):
        last = max(place for place in range(mask.shape[1]) if mask[row, place])
        vectors.append(hidden[row, last] / hidden[row, last].square().sum().sqrt())
    seen: dict[int, list[Tensor]] = {}
    for row, pair in enumerate(pair_ids.tolist()):
        seen.setdefault(pair, []).append(vectors[row])
    pairs = list(seen.values())
    losses = []
    for i, (anchor, positive) in enumerate(pairs):
        total = sum(torch.exp(anchor @ other / temperature) for _, other in pairs)
        losses.append(torch.log(total) - anchor @ positive / temperature)
        assert pairs[i][1] is positive
    return sum(losses) / len(losses)


def mse(logits: Tensor, labels: Tensor, extras: dict[str, Tensor]) -> Tensor:
    targets = extras["targets"]
    total = logits.new_zeros(())
    for row in range(len(labels)):
        places = [(place, label) for other, place, label in supervised(labels) if other == row]
        if targets.ndim == 1:
            score = sum(logits[row, place, label] for place, label in places) / len(places)
            total = total + (score - targets[row]) ** 2
        else:
            errors = [((logits[row, place] - targets[row, place]) ** 2).sum() / logits.shape[-1] for place, _ in places]
            total = total + sum(errors) / len(places)
    return total / len(labels)


def _policy(term: Callable[[Tensor, float, float], Tensor]) -> Plain:
    def loss(logits: Tensor, labels: Tensor, extras: dict[str, Tensor]) -> Tensor:
        total = logits.new_zeros(())
        for row, place, label in supervised(labels):
            lp = logprob(logits[row, place], label)
            advantage = float(extras["advantages"][row, place])
            total = total - term(lp, float(extras["old_logprobs"][row, place]), advantage)
        return total

    return loss


def _ppo_term(lp: Tensor, old: float, advantage: float) -> Tensor:
    ratio = torch.exp(lp - old)
    bounded = min(max(ratio.item(), 0.8), 1.2) * advantage
    return ratio * advantage if ratio.item() * advantage <= bounded else bounded + 0 * lp


POLICY: dict[str, Plain] = {
    "importance_sampling": _policy(lambda lp, old, advantage: torch.exp(lp - old) * advantage),
    "ppo": _policy(_ppo_term),
    "cispo": _policy(lambda lp, old, advantage: min(torch.exp(lp - old).item(), 4.0) * lp * advantage),
    "reinforce": _policy(lambda lp, old, advantage: lp * advantage),
    "cross_entropy": _policy(lambda lp, old, advantage: lp * advantage),  # its weights are given as advantages
}
