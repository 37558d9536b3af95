"""Proximal policy optimisation for language models, token by token (Schulman 2017): PPOTrainer and its parts.

config.py    the settings
prompts.py   rows become left-padded prompts; the order in which a run sees them
rollout.py   completions are sampled, and put behind their prompts
policy.py    log-probabilities, entropies and values of the completions' tokens; the reference
reward.py    reward functions and reward models score the completions
losses.py    pure functions: penalties, advantages, objectives
experience.py  what of a rollout is learned from: old figures, advantages and returns
evaluation.py  completions and rewards of held-out prompts
journal.py   the figures in the log
setup.py     what the trainer is given, made ready
trainer.py   PPOTrainer: the parts in their order
"""
