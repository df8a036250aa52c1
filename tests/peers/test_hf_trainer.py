"""In the Trainer of transformers: low-rank steps, checkpoints, steps inside the backward pass, activation offload."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pykern
from pykern.integrations.hf_trainer import backward_optimizer, offloading, trainer_optimizer

LENGTH = 12
OPTIONS = {"rank": 4, "lr": 0.01, "refresh_every": 2, "weight_decay": 0.1, "exclude": ["lm_head"]}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def examples(count):
    tokens = torch.randint(0, 31, (count, LENGTH), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(model, folder, steps, accumulate=1, save=False, kind=Trainer, checkpointing=False, **optimizer):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        learning_rate=77.0,
        lr_scheduler_type="linear",
        save_strategy="steps" if save else "no",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        data_seed=0,
    )
    return kind(model, arguments, train_dataset=examples(20), **optimizer)


def assert_equal(one, other):
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("name", ["GaLoreAdamW", "FiraAdamW"])
def test_five_steps_and_resuming_after_three(tmp_path, name):
    model, resumed = llama(), llama()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    run = trainer(model, tmp_path, 5, save=True, optimizer_cls_and_kwargs=trainer_optimizer(model, name, **OPTIONS))
    run.train()
    assert type(run.optimizer.optimizer) is getattr(pykern, name)
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    assert all(not torch.equal(value, start[key]) for key, value in model.state_dict().items())
    again = trainer(resumed, tmp_path, 5, optimizer_cls_and_kwargs=trainer_optimizer(resumed, name, **OPTIONS))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(model, resumed)


def test_groups():
    model = llama()
    kind, arguments = trainer_optimizer(model, "GaLoreAdamW", **OPTIONS)
    low_rank, plain, undecayed = arguments["params"]
    assert len(low_rank["params"]) == 14 and low_rank["rank"] == 4
    assert {id(param) for param in plain["params"]} == {
        id(param) for param in (model.lm_head.weight, model.model.embed_tokens.weight)
    }
    assert all(param.dim() == 1 for param in undecayed["params"]) and undecayed["weight_decay"] == 0.0
    optimizer = kind(**arguments)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    with pytest.raises(ValueError, match="name: expected 'LowRankOptimizer' or one of"):
        trainer_optimizer(model, "GaLore", rank=4, lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_in_the_backward_pass(tmp_path, accumulate):
    """As the ordinary steps without clipping, also where an epoch ends within a window."""
    model, layerwise, resumed = llama(), llama(), llama()
    ordinary = trainer(
        model, tmp_path / "a", 6, accumulate,
        optimizer_cls_and_kwargs=trainer_optimizer(model, "GaLoreAdamW", **OPTIONS),
    )  # fmt: skip
    ordinary.args.max_grad_norm = 0.0
    ordinary.train()
    run = trainer(
        layerwise, tmp_path / "b", 6, accumulate, save=True,
        optimizers=backward_optimizer(layerwise, "GaLoreAdamW", accumulate=accumulate, **OPTIONS),
    )  # fmt: skip
    run.train()
    assert all(param.grad is None for param in layerwise.parameters())
    for (name, one), other in zip(model.named_parameters(), layerwise.named_parameters(), strict=True):
        torch.testing.assert_close(one, other[1], rtol=1e-4, atol=1e-5, msg=name)
    again = trainer(
        resumed, tmp_path / "b", 6, accumulate,
        optimizers=backward_optimizer(resumed, "GaLoreAdamW", accumulate=accumulate, **OPTIONS),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert_equal(layerwise, resumed)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("storage", ["memory", "file"])
def test_activation_offload(tmp_path, storage, checkpointing):
    model, offloaded = llama(), llama()
    steps = {
        which: {"optimizer_cls_and_kwargs": trainer_optimizer(which, "GaLoreAdamW", **OPTIONS)}
        for which in (model, offloaded)
    }
    trainer(model, tmp_path, 3, 2, checkpointing=checkpointing, **steps[model]).train()
    kind = offloading(Trainer, storage=storage, min_bytes=256, keep_last=0)
    assert kind.__name__ == "OffloadingTrainer" and issubclass(kind, Trainer)
    run = trainer(offloaded, tmp_path, 3, 2, kind=kind, checkpointing=checkpointing, **steps[offloaded])
    run.train()
    assert_equal(model, offloaded)
    assert run.activation_offload.stats()["peak_slots"] > (2 if checkpointing else 4)
    with pytest.raises(TypeError, match="trainer: expected transformers.Trainer or a subclass, got str"):
        offloading("Trainer")
