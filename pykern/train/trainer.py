"""One model with its optimizer: supervised steps, GRPO steps, held-out accuracy."""

import time

import torch
from torch import Tensor

from .. import PackedBatch, group_advantages, linear_token_logprobs, policy_loss
from .batch import Groups, flat_gradient, pack_groups
from .compare import PlainPyTorch, differences
from .config import Config
from .data import Dataset, Example, supervised
from .making import make_model, make_offload, make_optimizer
from .memory import PeakMemory
from .model import tree_attention
from .precision import arithmetic
from .rollout import Rollouts, sample


class Trainer:
    """Steps are pure functions of what `state()` holds, so a resumed run continues bit for bit."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device | None = None):
        self.config, self.dataset = config, dataset
        self.device = device or torch.device(config.device)
        self.model = make_model(config, self.device)
        self.trained: list[Tensor] | None = None
        self.make_parts()
        self.warming_up = config.warmup_steps > 0
        self.warmup_steps = 0
        self.step = 0
        self.optimizer = self._new_optimizer()
        self.generator = torch.Generator(device=self.device).manual_seed(config.seed + 1)

    def make_parts(self) -> None:
        """What is between the model and its gradients."""
        self.offload = make_offload(self.config, self.model)

    def agree(self, asked: bool) -> bool:
        """Whether anybody who takes part in this run asks for it."""
        return asked

    def _new_optimizer(self) -> torch.optim.Optimizer:
        rate = self.config.warmup_learning_rate if self.warming_up else self.config.learning_rate
        return make_optimizer(self.config, self.model, rate, self.trained)

    def state(self) -> dict:
        rng = {"sampling": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "warming_up": self.warming_up,
            "warmup_steps": self.warmup_steps,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
        }

    def load(self, state: dict) -> None:
        self.warming_up, self.warmup_steps, self.step = state["warming_up"], state["warmup_steps"], state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["rng"]["sampling"])
        torch.set_rng_state(state["rng"]["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def end_warmup(self) -> None:
        self.warming_up = False
        self.optimizer = self._new_optimizer()

    # Model

    def logprobs(self, packed: PackedBatch, temperature: float) -> Tensor:
        """Log-probabilities of the packed response tokens, [targets], in float32."""
        with arithmetic(self.config):
            hidden = self.model(packed.token_ids, packed.tree.position, tree_attention(packed.tree))
            rows, weight = self.model.head_operands(packed.gather(hidden))
        return linear_token_logprobs(rows, weight, packed.targets, temperature=temperature)

    def sample(self, examples: list[Example], responses: int, temperature: float) -> Rollouts:
        prompts = [example.prompt for example in examples]
        longest = self.config.max_response
        with arithmetic(self.config):
            return sample(self.model, self.dataset.shared, prompts, responses, longest, temperature, self.generator)

    def accuracy(self, examples: list[Example]) -> float:
        """Share of `examples` that the likeliest response solves."""
        right = 0.0
        for begin in range(0, len(examples), 256):
            chunk = examples[begin : begin + 256]
            rollouts = self.sample(chunk, 1, temperature=0.0)
            right += sum(self.dataset.reward(e, group[0]) for e, group in zip(chunk, rollouts.responses))
        return right / len(examples)

    def descend(self) -> float:
        """Clips the gradients' norm and steps the optimizer; the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return float(norm)

    # Steps

    def supervised_step(self) -> dict:
        """One step of cross-entropy on worked solutions."""
        config, begin = self.config, time.perf_counter()
        examples = self.dataset.take(self.warmup_steps * config.warmup_prompts, config.warmup_prompts)
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = self.supervised_loss(examples)
        norm = self.descend()
        self.warmup_steps += 1
        return {
            "phase": "warmup",
            "step": self.warmup_steps,
            "loss": loss,
            "gradient_norm": norm,
            "tokens": tokens,
            "seconds": {"update": time.perf_counter() - begin},
        }

    def supervised_loss(self, examples: list[Example]) -> tuple[float, int]:
        """Forward and backward: the loss, and how many tokens went through the model."""
        packed = pack_groups(Groups(self.dataset.shared, *supervised(examples)), self.device)
        with self.offload:
            loss = -self.logprobs(packed, temperature=1.0).mean()
            loss.backward()
        return float(loss.detach()), packed.tree.num_tokens

    def warmup_probe(self) -> list[Example]:
        """The training examples that come next: what decides when the warm-up ends, so the held-out ones do not."""
        return self.dataset.take(self.warmup_steps * self.config.warmup_prompts, min(256, len(self.dataset.training)))

    def collect(self) -> tuple[Groups, dict]:
        """The next batch: responses (sampled, or the file's), rewards, advantages, old log-probabilities."""
        config = self.config
        examples = self.dataset.take(self.step * config.prompts, config.prompts)
        prompts = [example.prompt for example in examples]
        if self.dataset.form == "groups":
            groups = Groups(self.dataset.shared, prompts, [list(example.responses) for example in examples])
            rewards = [reward for example in examples for reward in example.rewards]
            with torch.no_grad():
                groups.old_logprobs = self.logprobs(pack_groups(groups, self.device), config.temperature)
        else:
            rollouts = self.sample(examples, config.responses, config.temperature)
            groups = Groups(self.dataset.shared, prompts, rollouts.responses, old_logprobs=rollouts.logprobs)
            rewards = [self.dataset.reward(e, r) for e, group in zip(examples, rollouts.responses) for r in group]
        counts = torch.tensor([len(group) for group in groups.responses])
        group_ids = torch.arange(len(examples)).repeat_interleave(counts).to(self.device)
        lengths = [len(response) for _, response in groups.flat()]
        baseline = None
        if config.estimator == "remax":
            greedy = self.sample(examples, 1, temperature=0.0)
            scores = torch.tensor([self.dataset.reward(e, r) for e, (r,) in zip(examples, greedy.responses)])
            baseline = scores.repeat_interleave(counts).to(self.device)
        groups.advantages = group_advantages(
            torch.tensor(rewards, dtype=torch.float32, device=self.device),
            group_ids,
            estimator=config.estimator,
            lengths=torch.tensor(lengths, device=self.device),
            baseline_rewards=baseline,
        )
        facts = {"reward": sum(rewards) / len(rewards), "response_length": sum(lengths) / len(lengths)}
        return groups, facts

    def update(self, groups: Groups, comparing: bool = False) -> dict:
        """Pack, forward, loss, backward, step: what `compare` does beside it in plain PyTorch.

        Loss, gradient (if `comparing`) and its norm are those of the first of `config.updates` passes over the batch.
        """
        first = {}
        for _ in range(self.config.updates):
            self.optimizer.zero_grad(set_to_none=True)
            loss, policy, tokens = self.policy_update(groups)
            if not first:
                first = {"loss": loss, "gradient": self.gradient() if comparing else None}
            norm = self.descend()
            first.setdefault("gradient_norm", norm)
        return {**first, "tokens": tokens, "policy": policy}

    def policy_update(self, groups: Groups) -> tuple[float, dict, int]:
        """Forward and backward: the loss, its metrics, and how many tokens went through the model."""
        config = self.config
        packed = pack_groups(groups, self.device)
        with self.offload:
            loss, metrics = policy_loss(
                self.logprobs(packed, config.temperature),
                groups.old_logprobs,
                groups.advantages,
                cu_seqlens=packed.cu_seqlens,
                loss=config.loss,
                horizon=groups.horizon,
            )
            loss.backward()
        policy = {name: float(value) for name, value in metrics.items()}
        return float(loss.detach()), policy, packed.tree.num_tokens

    def gradient(self) -> Tensor:
        return flat_gradient(self.model)

    def grpo_step(self, plain: PlainPyTorch | None = None, comparing: bool = False) -> dict:
        """Collect and update; with `plain`, the same update beside it, whose findings go under "compare".

        comparing: whether `plain` does so, here or in another process of this run.
        """
        begin = time.perf_counter()
        groups, facts = self.collect()
        collected = time.perf_counter()
        other = plain.update(self.model, groups) if plain else None
        started = time.perf_counter()
        with PeakMemory(self.device, trim=comparing) as memory:
            row = self.update(groups, comparing)
        ended = time.perf_counter()
        self.step += 1
        gradient = row.pop("gradient")
        row = {
            "phase": "grpo",
            "step": self.step,
            **facts,
            **row,
            "seconds": {"collect": collected - begin, "update": ended - started},
            "memory": {"peak": memory.peak, "before": memory.before, "method": memory.method},
        }
        if other:
            row["compare"] = differences(row, gradient, other, groups)
        return row
