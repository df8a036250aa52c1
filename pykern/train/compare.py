"""The same GRPO update in plain PyTorch, in a process of its own, beside pykern's.

Plain means: every response is a row of its own with the shared prefix and its prompt in front, rows are padded to
the longest, attention is `scaled_dot_product_attention` with is_causal, the rows that predict response tokens
(no others) go through the head to full logits and log_softmax, the loss is a chain of PyTorch calls, and the
low-rank step is written in PyTorch calls. Before every update the process gets the weights that pykern's update
starts from, so differences do not add up over steps; its optimizer keeps its own moments and projections.

Both updates are timed from token lists to stepped weights, and each process measures its own peak memory (see
memory.py), the interpreter and PyTorch included.
"""

import io
import multiprocessing
import signal
import time
import traceback

import torch
from torch import Tensor

from .batch import Groups, flat_gradient
from .config import Config
from .making import make_model, make_optimizer, use_threads
from .memory import PeakMemory
from .model import Transformer, causal_attention
from .plain import plain_optimizer, plain_policy_loss
from .precision import arithmetic


def padded(groups: Groups, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [B, L] of shared prefix + prompt + response; each response token, with its predictor's row and column."""
    rows, row_of, column_of, targets = [], [], [], []
    for number, (prompt, response) in enumerate(groups.flat()):
        begin = len(groups.shared) + len(prompt) - 1
        rows.append(torch.tensor([*groups.shared, *prompt, *response[:-1]]))
        row_of += [number] * len(response)
        column_of += range(begin, begin + len(response))
        targets += response
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return tokens, *(torch.tensor(values, device=device) for values in (row_of, column_of, targets))


def plain_logprobs(model: Transformer, groups: Groups, temperature: float) -> tuple[Tensor, int]:
    """Log-probabilities of the response tokens, flat, and how many tokens the model processed."""
    tokens, rows, columns, targets = padded(groups, model.norm.weight.device)
    hidden = model(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), causal_attention)
    logits = model.head(hidden[rows, columns]).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    return logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0], tokens.numel()


class PlainUpdate:
    """What `Trainer.update` does, in plain PyTorch."""

    def __init__(self, config: Config, model: Transformer, optimizer: torch.optim.Optimizer):
        """optimizer: pykern's, for its rule; it takes no step here."""
        self.config, self.model = config, model
        self.optimizer = plain_optimizer(optimizer, model)

    def __call__(self, groups: Groups) -> dict:
        config = self.config
        lengths = torch.tensor([len(response) for _, response in groups.flat()], device=groups.advantages.device)
        first = {}
        for _ in range(config.updates):
            self.optimizer.zero_grad(set_to_none=True)
            with arithmetic(config):
                logprobs, tokens = plain_logprobs(self.model, groups, config.temperature)
            loss = plain_policy_loss(
                config.loss, logprobs, groups.old_logprobs, groups.advantages, lengths, groups.horizon
            )
            loss.backward()
            if not first:
                first = {"loss": float(loss.detach()), "gradient": flat_gradient(self.model)}
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
            self.optimizer.step()
        return {**first, "tokens": tokens}


def _pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _serve(pipe, config: Config) -> None:
    """The process: answers each (weights, batch) with what its update found."""
    use_threads(config)
    device = torch.device(config.device)
    model = make_model(config, device)
    update = PlainUpdate(config, model, make_optimizer(config, model, config.learning_rate))
    while True:
        request = pipe.recv_bytes()
        try:
            weights, batch = torch.load(io.BytesIO(request), map_location=device, weights_only=True)
            model.load_state_dict(weights)
            groups = Groups(**batch)
            del request, weights, batch
            begin = time.perf_counter()
            with PeakMemory(device, trim=True) as memory:
                found = update(groups)
            found["seconds"] = time.perf_counter() - begin
            found["gradient"] = found["gradient"].cpu()
            found["memory"] = {"peak": memory.peak, "before": memory.before, "method": memory.method}
        except Exception as error:  # whatever it is, the trainer is to tell it
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        pipe.send_bytes(_pickled(found))


class PlainPyTorch:
    """The process that runs the plain update. Close it, or let the trainer's end do it."""

    def __init__(self, config: Config):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, config), daemon=True, name="plain PyTorch")
        # Ctrl-C reaches the whole group, but the trainer ends this process. It inherits that from its first instant on:
        # it takes seconds until code of its own could say so.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        other.close()

    def update(self, model: Transformer, groups: Groups) -> dict:
        """Runs the update from `model`'s weights and waits for it. Raises RuntimeError if it fails."""
        request = _pickled((model.state_dict(), vars(groups)))
        try:
            self._pipe.send_bytes(request)
            found = torch.load(io.BytesIO(self._pipe.recv_bytes()), weights_only=True)
        except (EOFError, ConnectionError):
            self._process.join(10)
            raise RuntimeError(
                f"the plain PyTorch process ended with status {self._process.exitcode}; if it was killed for memory, "
                "lower --prompts or leave out --compare"
            ) from None
        if "error" in found:
            raise RuntimeError(f"the plain PyTorch update failed: {found['error']}")
        return found

    def close(self) -> None:
        # It has nothing to finish, and may be in the middle of an update that nobody waits for any more.
        self._process.kill()
        self._process.join()
        self._pipe.close()


def differences(row: dict, gradient: Tensor, plain: dict, groups: Groups) -> dict:
    """Loss and gradient of both sides against each other, and what each took.

    loss_difference is |pykern - plain| / |plain|. With normalised advantages and ratios near 1 a GRPO loss is a sum
    of terms that nearly cancel (loss_over_terms says how far), so the same gap is also given over the mean magnitude of
    the terms, mean |advantage| over response tokens. gradient_difference is the norm of the difference over the norm of
    plain's gradient.
    All are 0 where both sides are exactly 0 (a batch whose groups have equal rewards throughout).
    """
    lengths = torch.tensor([len(response) for _, response in groups.flat()])
    terms = float((groups.advantages.detach().cpu().abs() * lengths).sum() / lengths.sum())
    gap = abs(row["loss"] - plain["loss"])
    gradient = gradient.cpu().double()
    expected = plain["gradient"].double()

    def relative(difference: float, size: float) -> float:
        return 0.0 if difference == 0 else difference / size if size else float("inf")

    return {
        "loss": plain["loss"],
        "loss_difference": relative(gap, abs(plain["loss"])),
        "loss_difference_over_terms": relative(gap, terms),
        "loss_over_terms": relative(abs(plain["loss"]), terms),
        "gradient_difference": relative(float((gradient - expected).norm()), float(expected.norm())),
        "tokens": plain["tokens"],
        "seconds": plain["seconds"],
        "memory": plain["memory"],
        "token_ratio": plain["tokens"] / row["tokens"],
        "time_ratio": plain["seconds"] / row["seconds"]["update"],
        "memory_ratio": plain["memory"]["peak"] / row["memory"]["peak"],
    }
