"""A pytest plugin that puts pykern's functions in the places of verl's before verl's own tests import them."""

import importlib
from functools import wraps

from pykern.integrations import verl as adapter

ADVANTAGES = {
    "compute_grpo_outcome_advantage": "grpo",
    "compute_grpo_vectorized_outcome_advantage": "grpo_vectorized",
    "compute_gdpo_outcome_advantage": "gdpo",
    "compute_grpo_passk_outcome_advantage": "grpo_passk",
    "compute_rloo_outcome_advantage": "rloo",
    "compute_rloo_vectorized_outcome_advantage": "rloo_vectorized",
    "compute_opo_outcome_advantage": "opo",
    "compute_gpg_outcome_advantage": "gpg",
    "compute_remax_outcome_advantage": "remax",
    "compute_reinforce_plus_plus_outcome_advantage": "reinforce_plus_plus",
    "compute_reinforce_plus_plus_baseline_outcome_advantage": "reinforce_plus_plus_baseline",
    "compute_optimal_token_baseline_advantage": "optimal_token_baseline",
    "compute_multi_turn_optimal_token_baseline_advantage": "tir_optimal_token_baseline",
}
OTHERS = {
    "verl.trainer.ppo.core_algos": {
        "compute_gae_advantage_return": adapter.generalized_advantages,
        "agg_loss": adapter.agg_loss,
        **{f"compute_policy_loss_{name}": function for name, function in adapter.LOSS_FUNCTIONS.items()},
        **{function: adapter.ADVANTAGES[name] for function, name in ADVANTAGES.items()},
    },
    "verl.utils": {"as_torch_index": adapter.as_torch_index, "group_mean_std": adapter.group_mean_std},
    "verl.trainer.ppo.rollout_corr_helper": {
        "compute_rollout_correction_and_rejection_mask": adapter.compute_rollout_correction_and_rejection_mask,
    },
}
calls = 0


def counted(function):
    @wraps(function)
    def call(*arguments, **keywords):
        global calls
        calls += 1
        return function(*arguments, **keywords)

    return call


for module, functions in OTHERS.items():
    for name, function in functions.items():
        place = importlib.import_module(module)
        assert hasattr(place, name), f"{module} has no {name}"
        setattr(place, name, counted(function))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls of pykern: {calls}")
