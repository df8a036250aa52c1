"""The same training with the model's blocks cut into a pipeline over several processes.

Every rank keeps the whole model for sampling, as an inference engine beside the trainer would; of training it does its
own stages alone: their gradients, optimizer states and activations exist once. After each step the ranks hand round
their weights.
"""

import os
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .. import (
    LOSSES,
    PackedBatch,
    linear_token_logprobs,
    offload,
    policy_loss,
    policy_loss_token_weights,
    prefix_attention,
)
from .batch import Groups, flat_gradient, pack_groups
from .compare import PlainPyTorch
from .config import Config, InputError
from .data import Dataset, Example, supervised
from .model import Transformer, rotation
from .precision import arithmetic
from .rollout import Rollouts
from .trainer import Trainer

SCHEDULES = ("1f1b", "1f1b_interleaved", "gis", "gis_h", "po", "zb_v", "v_half", "v_min")

# Packed microbatches are padded to a multiple of this, since a pipeline's messages have one size.
_TOKENS = 64


@contextmanager
def process_group(config: Config):
    """Joins the processes that torchrun started. Raises InputError where they are not as many as the ranks."""
    if not config.pipeline:
        yield
        return
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != config.pipeline or not dist.is_torchelastic_launched():
        raise InputError(
            f"--pipeline {config.pipeline}: expected as many processes, got {found}; start them with "
            f"torchrun --nproc-per-node {config.pipeline} -m pykern train --pipeline {config.pipeline} ..."
        )
    if config.device.startswith("cuda"):
        torch.cuda.set_device(local_device(config))
    dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device(config: Config) -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if config.device == "cuda" else torch.device("cpu")


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_pipeline(config: Config) -> None:
    """Raises InputError for what can't be cut into this pipeline."""
    if not config.pipeline:
        return
    stages = config.pipeline * config.chunks
    if config.layers < stages:
        raise InputError(
            f"--layers {config.layers}: expected at least {stages}, one for each of --chunks {config.chunks} stages on "
            f"--pipeline {config.pipeline} ranks"
        )
    for name in ("prompts", "warmup_prompts"):
        if name == "warmup_prompts" and not config.warmup_steps:
            continue
        if getattr(config, name) < microbatches(config):
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: expected at least one for each of "
                f"{microbatches(config)} microbatches; lower --microbatches"
            )


def microbatches(config: Config) -> int:
    """As many as asked for, or two for each rank."""
    return config.microbatches or 2 * config.pipeline


class Stage(nn.Module):
    """Consecutive blocks of a model, with the embedding before the first, and norm and head after the last."""

    def __init__(self, config: Config, model: Transformer, index: int):
        super().__init__()
        count = config.pipeline * config.chunks
        begin, end = (config.layers * place // count for place in (index, index + 1))
        self.config, self.head_size = config, model.shape.head_size
        self.working = torch.promote_types(model.norm.weight.dtype, torch.float32)
        self.embedding = model.embedding if index == 0 else None
        self.blocks = nn.ModuleList(model.blocks[begin:end])
        self.norm = model.norm if index == count - 1 else None
        # The loss reads it; a backward in two halves looks for weights among a stage's own.
        self.head = model.head if index == count - 1 else None

    def forward(self, x: Tensor, subtree_end: Tensor, position: Tensor) -> Tensor:
        """One packed row: tokens [1, T], or hidden states [1, T, width] -> hidden states [1, T, width]."""
        tree = subtree_end[0], position[0]
        cos, sin = rotation(position, self.head_size)
        angles = cos.to(self.working), sin.to(self.working)
        with arithmetic(self.config):
            x = x if self.embedding is None else self.embedding(x)
            for block in self.blocks:
                x = block(x, angles, lambda q, k, v: prefix_attention(q[0], k[0], v[0], tree)[None])
            # Never a view: torch's runtime detaches it in place.
            return x if self.norm is None else self.norm(x)


class PipelineTrainer(Trainer):
    """A Trainer of which each rank does a part. All methods are called by all ranks at once."""

    def __init__(self, config: Config, dataset: Dataset):
        self.rank, self.ranks = dist.get_rank(), config.pipeline
        self._capacity = 0
        super().__init__(config, dataset, device=local_device(config))

    def make_parts(self) -> None:
        """Cuts the model."""
        config = self.config
        indices = offload.stages_of_rank(config.schedule, self.rank, self.ranks, config.chunks)
        self.stages = {index: Stage(config, self.model, index) for index in indices}
        mine = {id(parameter) for stage in self.stages.values() for parameter in stage.parameters()}
        names = [name for name, parameter in self.model.named_parameters() if id(parameter) in mine]
        holders: dict[str, list[int]] = {}
        for rank, held in enumerate(self._gather(names)):
            for name in held:
                holders.setdefault(name, []).append(rank)
        self.owner = {name: ranks[-1] for name, ranks in holders.items()}
        # The embedding that is the head as well.
        self.shared = {name: p for name, p in self.model.named_parameters() if len(holders[name]) > 1}
        self.trained = [p for name, p in self.model.named_parameters() if self.owner[name] == self.rank]
        self.has_head = self.ranks * config.chunks - 1 in self.stages

    def _gather(self, value: object) -> list:
        values: list = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def agree(self, asked: bool) -> bool:
        return any(self._gather(asked))

    def state(self) -> dict:
        state = super().state()
        state["optimizer"] = self._gather(state["optimizer"])
        return state

    def load(self, state: dict) -> None:
        super().load({**state, "optimizer": state["optimizer"][self.rank]})

    # Sampling: every rank its share of the prompts

    def sample(self, examples: list[Example], responses: int, temperature: float) -> Rollouts:
        begin, end = (len(examples) * place // self.ranks for place in (self.rank, self.rank + 1))
        # By step and rank, so that no state of a generator need be kept.
        self.generator.manual_seed(self.config.seed + 1 + 7919 * (self.step * self.ranks + self.rank))
        mine = Rollouts([], torch.empty(0))
        if end > begin:
            mine = super().sample(examples[begin:end], responses, temperature)
        parts = self._gather((mine.responses, mine.logprobs.cpu()))
        logprobs = torch.cat([part[1] for part in parts if part[0]])
        return Rollouts([row for part in parts for row in part[0]], logprobs.to(self.device))

    # Steps

    def _microbatches(self, groups: Groups) -> list[Groups]:
        """The same prompts on every rank; flat tensors are cut where the responses are."""
        count, total = microbatches(self.config), len(groups.prompts)
        parts = []
        sequence = token = 0
        for index in range(count):
            begin, end = total * index // count, total * (index + 1) // count
            part = Groups(groups.shared, groups.prompts[begin:end], groups.responses[begin:end])
            lengths = [len(response) for _, response in part.flat()]
            if groups.advantages is not None:
                part.advantages = groups.advantages[sequence : sequence + len(lengths)]
                part.old_logprobs = groups.old_logprobs[token : token + sum(lengths)]
            sequence, token = sequence + len(lengths), token + sum(lengths)
            parts.append(part)
        return parts

    def _run_schedule(self, packed: list[PackedBatch], loss_of) -> float:
        """Forward and backward of all microbatches; the loss, their sum, on every rank."""
        self._prepare(max(part.tree.num_tokens for part in packed))
        tokens, ends, positions = (
            torch.stack(rows) for rows in zip(*(self._padded(part) for part in packed), strict=True)
        )
        losses: list[Tensor] = []
        self._loss_of = loss_of
        arguments = (tokens,) if 0 in self.stages else ()
        if self.has_head:
            places = torch.arange(len(packed), device=self.device)[:, None]
            self._schedule.step(*arguments, target=places, losses=losses, subtree_end=ends, position=positions)
        else:
            self._schedule.step(*arguments, subtree_end=ends, position=positions)
        self._sum_shared()
        found = [loss for loss in self._gather(float(sum(losses)) if self.has_head else None) if loss is not None]
        return found[0]

    def _sum_shared(self) -> None:
        """Gives the owner of a weight that lies in stages of several ranks the sum of their gradients."""
        for name, parameter in self.shared.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.reduce(gradient, self.owner[name])
            parameter.grad = gradient if self.owner[name] == self.rank else None

    def _padded(self, packed: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, subtree ends and positions with padding, which sees nothing and is seen by none."""
        more = self._capacity - packed.tree.num_tokens
        begin = torch.arange(packed.tree.num_tokens, self._capacity, device=self.device)
        zeros = packed.token_ids.new_zeros(more)
        tree = packed.tree
        return (
            torch.cat((packed.token_ids, zeros)),
            torch.cat((tree.subtree_end, begin.to(tree.subtree_end.dtype))),
            torch.cat((tree.position, zeros.to(tree.position.dtype))),
        )

    def _prepare(self, tokens: int) -> None:
        """A schedule whose messages have room for so many tokens."""
        if tokens <= self._capacity:
            return
        from torch.distributed.pipelining import PipelineStage

        from ..offload.stages import splits_functions

        config = self.config
        self._capacity = -(-tokens * 5 // 4 // _TOKENS) * _TOKENS
        count = self.ranks * config.chunks
        stages = [PipelineStage(stage, index, count, self.device) for index, stage in self.stages.items()]
        keywords = {
            "loss_fn": lambda hidden, place: self._loss_of(hidden[0], int(place)),
            "scale_grads": False,
            "split_backward": None if splits_functions() else False,
        }
        if config.offload == "none":
            self._schedule = offload.SchedulePlanned(config.schedule, stages, microbatches(config), **keywords)
            return
        wanted = int(config.offload) if config.offload.isdecimal() else config.offload
        storage = {"storage": "file" if config.spill_dir else "memory"}
        if self.device.type == "cuda":
            storage = {"storage": "pinned"}
        if config.spill_dir:
            storage["path"] = config.spill_dir
        self._schedule = offload.SchedulePipeOffload(
            stages, microbatches(config), schedule=config.schedule, offload=wanted, **storage, **keywords
        )

    def _logprobs_of(self, hidden: Tensor, packed: PackedBatch, temperature: float) -> Tensor:
        with arithmetic(self.config):
            rows, weight = self.model.head_operands(packed.gather(hidden[: packed.tree.num_tokens]))
        return linear_token_logprobs(rows, weight, packed.targets, temperature=temperature)

    def supervised_loss(self, examples: list[Example]) -> tuple[float, int]:
        parts = self._microbatches(Groups(self.dataset.shared, *supervised(examples)))
        packed = [pack_groups(part, self.device) for part in parts]
        total = sum(len(part.targets) for part in packed)

        def loss_of(hidden: Tensor, place: int) -> Tensor:
            return -self._logprobs_of(hidden, packed[place], 1.0).sum() / total

        return self._run_schedule(packed, loss_of), sum(part.tree.num_tokens for part in packed)

    def policy_update(self, groups: Groups) -> tuple[float, dict, int]:
        config = self.config
        parts = self._microbatches(groups)
        packed = [pack_groups(part, self.device) for part in parts]
        whole = torch.cat([part.cu_seqlens.diff() for part in packed]).cumsum(0)
        weights = policy_loss_token_weights(
            groups.old_logprobs,
            cu_seqlens=torch.cat((whole.new_zeros(1), whole)),
            aggregate=LOSSES[config.loss].aggregate,
            horizon=groups.horizon,
        ).split([len(part.targets) for part in packed])
        metrics: list[dict] = [{}] * len(parts)

        def loss_of(hidden: Tensor, place: int) -> Tensor:
            part = parts[place]
            loss, metrics[place] = policy_loss(
                self._logprobs_of(hidden, packed[place], config.temperature),
                part.old_logprobs,
                part.advantages,
                cu_seqlens=packed[place].cu_seqlens,
                loss=config.loss,
                token_weights=weights[place],
            )
            return loss

        loss = self._run_schedule(packed, loss_of)
        found = next(rows for rows in self._gather([_numbers(row) for row in metrics] if self.has_head else []) if rows)
        share = [len(part.targets) / len(groups.old_logprobs) for part in packed]
        policy = {name: sum(s * row[name] for s, row in zip(share, found, strict=True)) for name in found[0]}
        return loss, policy, sum(part.tree.num_tokens for part in packed)

    def descend(self) -> float:
        """Clips by the norm over all ranks, steps this rank's parameters, and hands the weights round."""
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(squares)
        norm = squares.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.trained, self.config.clip_norm, norm)
        self.optimizer.step()
        self._hand_round({name: p.detach() for name, p in self.model.named_parameters()})
        return float(norm)

    def _hand_round(self, tensors: dict[str, Tensor]) -> None:
        works = [dist.broadcast(tensor, self.owner[name], async_op=True) for name, tensor in tensors.items()]
        for work in works:
            work.wait()

    def gradient(self) -> Tensor:
        """Of the whole model; for a moment every rank has all of it."""
        whole = {
            name: p.grad if self.owner[name] == self.rank else torch.zeros_like(p)
            for name, p in self.model.named_parameters()
        }
        self._hand_round(whole)
        kept = {name: p.grad for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            p.grad = whole[name]
        flat = flat_gradient(self.model)
        for name, p in self.model.named_parameters():
            p.grad = kept[name]
        return flat

    def grpo_step(self, plain: PlainPyTorch | None = None, comparing: bool = False) -> dict:
        row = super().grpo_step(plain, comparing)
        row["memory"]["peaks"] = self._gather(row["memory"]["peak"])
        if self.config.offload != "none":
            counters = self._schedule.offload.counters()
            facts = {name: counters[name] for name in ("offloaded_bytes", "peak_blocks", "stall_seconds")}
            row["offload"] = self._gather(facts)
        return row


def _numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
