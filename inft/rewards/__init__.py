"""Reward functions: what an answer of the model is worth, by name in REWARDS or a user's own ``module:function``.

A function is called as ``function(completions, prompts=…, references=…, languages=…, completion_ids=…, samples=…)``,
each a sequence of the same length: the answers, the user's turns as text, the rows' captions, their language codes, the
answers' tokens and the rows themselves. It returns a number for each answer, higher for a better one. This is TRL's
convention, but for what a function does not name: it is given those of COLUMNS that its parameters are, or all of
them where it has ``**columns``.
"""

from collections.abc import Mapping

COLUMNS = ("completions", "prompts", "references", "languages", "completion_ids", "samples")

REWARDS: Mapping[str, str] = {
    "chrf": "inft.rewards.functions:chrf",
    "exact": "inft.rewards.functions:exact",
    "length": "inft.rewards.functions:length",
    "language": "inft.rewards.functions:language",
    "json": "inft.rewards.functions:valid_json",
}
