"""Optimizers that step in a low-rank subspace of the gradient."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, distributed

from . import ops
from .amp import Amp, without_autocast
from .bases import rows_or_bases
from .checks import capturing, check_parameter
from .choosing import Bases, ProjectorFunction
from .distributed import average, is_distributed
from .matrices import Job
from .options import ALIASES, complete_group, is_low_rank
from .portable import shards_as_values
from .projectors import PROJECTORS
from .quantized import int8_weight
from .refresh import is_due
from .residuals import RESIDUALS
from .state import fitted_states, make_state, wide_dtype
from .stepping import misses_roundings, step_low_rank, step_plain


class LowRankOptimizer(torch.optim.Optimizer):
    r"""A rule such as AdamW whose moments live in a low-rank subspace of each weight's gradient.

    The parts are keywords: what chooses the subspace and when, the rule inside it, what becomes of the rest, how state
    is kept and weights are rounded. As it begins: for a weight W [rows, columns] with gradient G and an orthonormal
    basis P, at step t = 1, 2, ...::

        R = P^T G^T                                 (right side, P is [columns, rank])
        R = P^T G                                   (left side, P is [rows, rank])
        m = beta1 m + (1 - beta1) R                 v = beta2 v + (1 - beta2) R^2
        N = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        D = scale * up(N)                           up(X) = (P X)^T, or P X
        W = (1 - lr * weight_decay) W - lr * D

    `residual="fira"` adds to D what the subspace misses, with the subspace's own step length::

        S_j = |N_j| / (|R_j| + 1e-8) * (G - up(R))_j     for every row j (right) or column j (left)
        S   = S / l,  l = max(|S| / (norm + 1e-8), 1.01) / 1.01,  norm = |S| after that (l = 1 at first)

    Every `refresh_every` steps, beginning with the first, P becomes the leading singular vectors of the
    current gradient; the moments stay. A gradient that is zero or not finite names no subspace: the old P
    is kept (at first: P = 0, so only decay acts), and the next step tries again. The step itself is taken as
    other optimizers take it, so a NaN in the gradient reaches the weights; of "rows", "rows_sampled" and "coordinates"
    one in the rows that are picked, where the residual is "none".

    A group without `rank`, and a parameter of fewer than two axes, gets plain AdamW (the same lines with R = G,
    D = N). A weight of more axes, as a convolution has, is a matrix of shape[0] rows. Ranks above min(rows, columns)
    are cut to it. All weights of a group are stepped together: where AdamW, float32 moments, nearest rounding and
    the residuals "none", "fira" or APOLLO's are asked for, by one op (low_rank_adamw_step), else by its parts one
    after the other. On the CPU, and on CUDA for bfloat16 and float16, there is no temporary of a weight's size; on
    CUDA float32 and float64 have PyTorch's matrix products, under its TF32 setting, and one such temporary. Where
    projectors pick rows the parts take their indices and make no product, but for Fira, APOLLO, 8-bit weights, and
    shards along the axis that is compressed. A gradient whose unit stride is along another axis than its weight's is
    copied. Everywhere results repeat bit for bit, and on the CPU they don't depend on the number of threads, but for
    what is PyTorch's: projector "svd", and "newton_schulz" of ranks below 8.

    On CUDA a step waits for the device only where it chooses P, and when it first reads a loaded state. It can be
    captured in a graph after one ordinary step; in a graph P stays, so step outside it every `refresh_every` steps,
    and such steps read the count from the device. Pass `lr` as a tensor to change it between replays.

    Args:
        params: parameters or groups, float32, float64, bfloat16 or float16. Groups may set every keyword below
            but `process_group` (`projector` by its name), and may call refresh_every, side and scale by the names of
            the GaLore and Fira packages: update_proj_gap, proj_type, alpha. `low_rank_groups` makes such groups.
        lr: a float, or a 0-dim float32 or float64 tensor on the device of the parameters.
        rank: columns of P; None for plain AdamW.
        rule: the inner rule, what makes N of R (the formulas are those of reference.lowrank_parts.rule and of
            lowrank.matrix_rules): "adamw"; "adabelief"; "lion"; "momentum" (N = m = momentum m + R); "adafactor"
            (row and column means for second moments); "newton_schulz" (the momentum with its singular values brought
            to one, as Muon has it).
        refresh_every: steps between two choices of P.
        scale: GaLore's alpha, on the low-rank part of the update.
        refresh: when P is chosen: "every" `refresh_every` steps; "staggered", likewise, but matrix by matrix, spread
            over the steps by the work that each is, after a cheap basis for all in the first step; "lazy", every, and
            the gap doubles while the subspace stays (Q-GaLore); "online", in each step (LDAdam).
        moments: what becomes of m and v then, with T = P_new^T P_old: "keep" (indices that are chosen again keep their
            places, and so theirs); "rotate", T m and |T v| (DCT-AdamW); "rotate_variance", T m and v by the variance
            around it (LDAdam); "reset", zero, and the count of steps too (FRUGAL, Grass).
        side: "std" compresses the smaller axis, "reverse_std" the larger, "left" the rows, "right" the columns; "full"
            compresses both, R = P^T G Q [rank, rank].
        projector: what chooses P. Of the gradient: "gram", its leading singular vectors, by its Gram matrix (0.9999
            of their energy or more, by an iteration that estimates what it misses and else gives way to the whole
            decomposition; a small one's are exact); "power", one step of the block power iteration from the P in use,
            with a shift, and "plain_power" without (LDAdam); "randomized", a range finder; "svd", as the packages have
            it, bit for bit; "dct" and "dct_l2", the vectors of the DCT-II with the largest l1 or l2 norms; "rows" and
            "rows_sampled", rows by their norms (Grass). Drawn: "random" (normal / sqrt(rank); APOLLO, Flora) and
            "apollo_torch" (that package's numbers), "random_orthonormal" and "coordinates" (FRUGAL). Of "dct", "rows"
            and "coordinates" the state has the indices only. Or a function (grad, rank, right) -> P ([columns, rank] if
            right, else [rows, rank]; None to keep the one in use), or P itself; those belong to the whole optimizer and
            are not part of its state_dict.
        projector_format: "dense", P in the weight's dtype, or "int8" and "int4" (Q-GaLore): P in 8.25 or 4.25 bits an
            element. Rounding costs P its orthonormality; what depends on that takes P^T P into account.
        projector_memory: what the projector looks at is projector_memory * up(m) / (1 - beta1^t) and (1 -
            projector_memory) * G (LDAdam's rho).
        residual: what becomes of the gradient outside the subspace: "none"; "fira"; "apollo_channel" and
            "apollo_tensor" (D is G itself, its channels or the whole times |N| / |R| and the root of `scale`, limited
            like Fira's S); "sign" and "sgd" (D gets residual_scale times sign(G - up(R)), or G - up(R), as FRUGAL has
            it; no signs where the rank is that of the axis, so that G - up(R) is roundings); "error_feedback" (G -
            feedback_share * up(R) is kept in a buffer and added to the next gradient).
        residual_scale: of "sign" and "sgd".
        growth_limit: how much the norm of S may grow in a step, for "fira" and APOLLO; 0 for no limit.
        scale_first: APOLLO's root of `scale` comes before the limit, not after it.
        feedback_share: what "error_feedback" forgets of the part that was used. 1 - mu makes the buffer a momentum,
            of which Trion uses what the subspace sees.
        feedback_momentum: "error_feedback" also keeps beta1 / (1 - beta1) times what up(m) loses at a refresh (LDAdam).
        feedback_dtype: of the buffer: "weight", or "8bit" and "4bit" (DCT-AdamW), 8.25 or 4.25 bits an element. With
            these `.grad` is scratch: the gradient and what was missed before are added there, so it is another after
            a step.
        state_dtype: of the moments: "float32" (float64 for a float64 parameter); "bfloat16", whose second moment near
            1 never decays, as its steps are below the rounding; "8bit", with a float32 scale for each block of 256
            along a basis vector, in bitsandbytes' codes. Plain AdamW has float32 moments whatever this is.
        rounding: of the weights: "nearest"; "stochastic", whose bits depend on seed, parameter, element and step, not
            on how the work is shared out; "kahan", with what rounding lost in a buffer of the weight's size and dtype.
            Plain AdamW rounds to the nearest.
        weight_decay: decoupled, times lr.
        betas: of "adamw", "adabelief", "lion" and plain AdamW.
        momentum: of "momentum" (0.9 by default), "newton_schulz" (0.95) and "adafactor" (0: no average).
        nesterov: "newton_schulz" looks one step of momentum ahead.
        shape_scale: the factor on a "newton_schulz" direction: "original", sqrt(max(1, rows / columns));
            "match_rms_adamw", 0.2 sqrt(max(rows, columns)); "spectral", sqrt(rows / columns); "none".
        eps: 1e-8 by default, 1e-6 with `parity`, as in the packages.
        decay: "before" or "after": whether weight decay precedes the update.
        parity: "galore_torch", "fira" or "apollo_torch" reproduces these packages: W is decayed after the update; eps
            is added to sqrt(v), and the bias corrections are folded into the step size, lr sqrt(1 - beta2^t) / (1 -
            beta1^t); Fira subtracts scale * up(R) in the residual, and a norm of zero limits the next. The packages
            keep moments in the weight's dtype; here they are float32.
        maximize: ascend.
        seed: of what is drawn: random bases, the bits of stochastic rounding.
        process_group: the gradients are this process's own, and those of all processes of the group are averaged in
            the step. Where only R is needed (residual "none", between two choices of P) R is averaged in place of G,
            rank / n of the bytes; `.grad` then stays this process's, elsewhere it becomes the mean. Leave the model
            without DistributedDataParallel, or run its backward passes under no_sync(); a parameter has a gradient in
            all processes or in none. P is that of the group's first process in all.

    A parameter that is a DTensor (fully_shard, tensor parallelism, both) is stepped by its shards. One in shards of
    rows is projected from the right, one in shards of columns from the left ("std" and "reverse_std" give way), so
    that only the step that chooses P sends anything of the weight's size: it sums the Gram matrix, or what else the
    projector looks at. In shards along both axes, the axis is compressed that the mesh's last dimension cuts; then, and
    where a side by name compresses what is in shards, each step adds up R [rank, length] over the processes that share
    that axis. Fira and APOLLO sum three numbers per matrix each step; "adafactor" and "newton_schulz" gather R. State
    of single rows or columns is kept in DTensors, so torch.distributed.checkpoint saves it, and loads it into other
    numbers of processes. 8-bit moments have their blocks within shards, so state_dict gives them in float32 and
    load_state_dict quantises them again: bit for bit where the blocks are the same.

    torch.amp.GradScaler may leave unscaling to the step, which then waits for nothing; an overflow skips all of it,
    also a choice of P. With `process_group`, call scaler.unscale_(optimizer) first. A projector function sees the
    gradient as it came, scaled.

    State per parameter, tensors only: step, exp_avg, exp_avg_sq (float32; float64 for a float64 parameter), and
    projector (the parameter's dtype) or projector_indices, next_refresh and refreshes (on the CPU, as refresh_gap and
    refresh_similarity of "lazy" are), residual_norm (Fira and APOLLO; negative until known), exp_avg_sq_row and
    exp_avg_sq_col ("adafactor"), error (feedback; the parameter's size and dtype). In few bits projector and error are
    three tensors each, as in projector_codes, projector_scale and projector_zero. Moments are [rank, length], where
    length is the axis that is not compressed. All of it survives torch.load(weights_only=True), and load_state_dict
    keeps its dtypes.

    Weights in 8 bits are those of `Int8Linear`: they need a rank and a residual of "none" or "error_feedback", and
    are rounded stochastically whatever `rounding` is.

    The published optimizers are rows of lowrank.presets.PRESETS, each with a class that names its paper.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
        RuntimeError: a sparse gradient, or a graph captured before the first step.
        NotImplementedError: a parameter on a device whose kernels this build lacks.
    """

    _step_supports_amp_scaling = True
    # Where `join` has put this one among the optimizers of a model.
    _family: "list[LowRankOptimizer] | None" = None
    _first_index = 0

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        rule: str = "adamw",
        refresh_every: int = 200,
        refresh: str = "every",
        moments: str = "keep",
        scale: float = 1.0,
        side: str = "std",
        projector: str | ProjectorFunction | Tensor = "gram",
        projector_format: str = "dense",
        projector_memory: float = 0.0,
        residual: str = "none",
        residual_scale: float = 1.0,
        growth_limit: float = 1.01,
        scale_first: bool = False,
        feedback_share: float = 1.0,
        feedback_momentum: bool = False,
        feedback_dtype: str = "weight",
        state_dtype: str = "float32",
        rounding: str = "nearest",
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float | None = None,
        nesterov: bool = True,
        shape_scale: str = "original",
        eps: float | None = None,
        weight_decay: float = 0.0,
        decay: str = "before",
        parity: str | None = None,
        maximize: bool = False,
        seed: int = 0,
        process_group: "distributed.ProcessGroup | None" = None,
    ):
        if not (isinstance(projector, Tensor) or callable(projector) or projector in PROJECTORS):
            raise ValueError(
                f"projector: expected one of {tuple(PROJECTORS)}, a function or a tensor, got {projector!r}"
            )
        self.projector = None if isinstance(projector, str) else projector
        self.process_group = process_group
        self._counted: dict[Tensor, int] = {}
        defaults = {
            "lr": lr,
            "rank": rank,
            "rule": rule,
            "refresh_every": refresh_every,
            "refresh": refresh,
            "moments": moments,
            "scale": scale,
            "side": side,
            "projector": projector if isinstance(projector, str) else None,
            "projector_format": projector_format,
            "projector_memory": projector_memory,
            "residual": residual,
            "residual_scale": residual_scale,
            "growth_limit": growth_limit,
            "scale_first": scale_first,
            "feedback_share": feedback_share,
            "feedback_momentum": feedback_momentum,
            "feedback_dtype": feedback_dtype,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "betas": betas,
            "momentum": momentum,
            "nesterov": nesterov,
            "shape_scale": shape_scale,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "parity": parity,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            for theirs, ours in ALIASES.items():
                if theirs in param_group:
                    param_group.setdefault(ours, param_group.pop(theirs))
        super().add_param_group(param_group)
        try:
            complete_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self):
        if self.process_group is not None:
            raise TypeError(
                f"{type(self).__name__}: a process group can be neither copied nor pickled; save state_dict() and load "
                "it into a new optimizer"
            )
        own = {"projector": self.projector, "process_group": None, "_first_index": self._first_index}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # torch.optim.Optimizer.load_state_dict comes by here too: the counts may be others now.
        self._counted = {}
        # Torch's own, which a group is not to have only after loading: a state_dict of it would fit no fresh optimizer.
        defaults = {name: value for name, value in self.defaults.items() if name != "differentiable"}
        for group in self.param_groups:
            for name, value in defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict:
        """As torch.optim.Optimizer.state_dict, but 8-bit moments of DTensors are given in float32, with a scale of one,
        so that other numbers of processes can load their shards of them."""
        given = super().state_dict()
        shared = [is_distributed(param) for param in self._parameters()]
        given["state"] = {
            index: shards_as_values(state) if shared[index] else state for index, state in given["state"].items()
        }
        return given

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what state_dict() returned. Unlike torch's own, it keeps the dtype of every state tensor.

        As everywhere in torch.optim, the options of the groups become the saved ones. A learning rate that is a tensor
        here and there stays the same tensor.

        Raises:
            ValueError: the parameters have other shapes, or the state other tensors than these options ask for.
        """
        states: dict[Tensor, dict[str, Tensor]] = {}
        rates = [group["lr"] for group in self.param_groups]

        def check(optimizer, given: dict) -> dict | None:
            ours = [len(group["params"]) for group in self.param_groups]
            if [len(group["params"]) for group in given["param_groups"]] != ours:
                return None  # torch's own error says it.
            states.update(fitted_states(self, given))
            return {**given, "state": {}}

        def fill(optimizer) -> None:
            self.state.update(states)
            for group, rate in zip(self.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor) and isinstance(rate, Tensor):
                    # The same tensor, which other optimizers may share and graphs may have captured.
                    group["lr"] = rate.copy_(group["lr"])
                elif isinstance(group["lr"], Tensor) and group["params"]:
                    group["lr"] = group["lr"].to(group["params"][0].device)
                complete_group(group)

        # Between the hooks of others: those before may change the state_dict, those after see the states.
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        """Steps every parameter that has a gradient; returns what `closure` returned, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step({param: None for param in self._parameters() if param.grad is not None})
        return loss

    @torch.no_grad()
    def step_projected(self, low: Mapping[Tensor, Tensor]) -> None:
        """Steps the parameters of `low` from low-rank gradients R in place of `.grad`.

        Between two refreshes R is linear in the gradient, so the R of several backward passes may be added up, or
        averaged over processes, where their gradients would take n / rank times the memory::

            if optimizer.needs_gradient(weight):  # accumulate weight.grad, then optimizer.step()
            else: low += optimizer.project(weight)  # for each pass, then optimizer.step_projected({weight: low})

        Args:
            low: {parameter: R [rank, length]}, as `project` gives it.

        Raises:
            ValueError: a parameter of which the optimizer needs the gradient, or R of another shape.
        """
        for param, matrix in low.items():
            if self.needs_gradient(param):
                raise ValueError(
                    f"low: expected parameters for which needs_gradient is False, but one of shape "
                    f"{tuple(param.shape)} is to be stepped from its gradient; use step()"
                )
            expected = self._job(param)
            if tuple(matrix.shape) != (expected.rank, expected.length):
                raise ValueError(
                    f"low: expected {(expected.rank, expected.length)} for a parameter of shape {tuple(param.shape)}, "
                    f"got {tuple(matrix.shape)}"
                )
        self._step(dict(low))

    def needs_gradient(self, param: Tensor, ignore_refresh: bool = False) -> bool:
        """Whether the next step of a parameter needs its gradient itself, not only R.

        True for plain AdamW, where the residual is not "none", and, unless `ignore_refresh`, where a basis is to be
        chosen.
        """
        job = self._job(param)
        if job is None or not RESIDUALS[job.group["residual"]].linear:
            return True
        if ignore_refresh or not job.state:
            return not ignore_refresh
        done = self._bases.steps_done(job)
        return done is not None and is_due(job, done)

    @torch.no_grad()
    def project(self, param: Tensor, refresh: bool = False) -> Tensor:
        """R [rank, length] of a parameter's `.grad`, of the dtype of the moments; with `maximize`, of its negative.

        Args:
            param: a low-rank parameter.
            refresh: choose the basis anew by this gradient if that is due.

        Raises:
            ValueError: a parameter without a rank, or without a gradient.
        """
        job = self._job(param)
        if job is None or param.grad is None:
            raise ValueError(f"param: expected a low-rank parameter with a gradient, got one of {tuple(param.shape)}")
        check_parameter(param, self.process_group is not None)
        if not job.state:
            make_state(job, self.state[param])
        job.with_gradient()
        with without_autocast(param.device.type):
            if refresh and self._bases.due(job, Amp()):
                if self.process_group is not None:
                    average([job.grad], self.process_group)
                self._bases.refresh(job, job.grad, Amp())
            low = [torch.empty(job.rank, job.length, dtype=wide_dtype(param), device=param.device)]
            ops.low_rank_project([job.grad], rows_or_bases([job]), None, low, [], maximize=job.group["maximize"])
            if job.partial:
                job.shards.add_up(low)
        return low[0]

    def low_norm(self, param: Tensor, low: Tensor) -> Tensor:
        """The norm of R, as `project` gives it, over all shards of a parameter."""
        norm = torch.linalg.vector_norm(low)
        job = self._job(param)
        return norm if job.shards is None else job.shards.reduce(norm.square()).sqrt()

    @property
    def _bases(self) -> Bases:
        return Bases(self.projector, self.process_group, self._family or [self], self._counted)

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _job(self, param: Tensor) -> Job | None:
        """The job of one parameter; None if it gets plain AdamW."""
        index = self._first_index
        for group in self.param_groups:
            for other in group["params"]:
                if other is param:
                    return Job.of(param, index, group, self.state[param]) if is_low_rank(param, group) else None
                index += 1
        raise ValueError(f"param: expected a parameter of this optimizer, got a tensor of {tuple(param.shape)}")

    def _step(self, given: dict[Tensor, Tensor | None]) -> None:
        """Steps the parameters of `given`: from R where it is a tensor, else from their gradients."""
        # torch.amp.GradScaler sets these before it calls.
        amp = Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        if self.process_group is not None:
            amp = amp.shared_by(self.process_group)
        index = self._first_index - 1
        for group in self.param_groups:
            plain: dict[tuple, list[Tensor]] = {}
            low_rank: dict[tuple, list[Job]] = {}
            for param in group["params"]:
                index += 1
                if param not in given:
                    continue
                check_parameter(param, self.process_group is not None)
                if not self.state.get(param) and capturing(param.device):
                    raise RuntimeError(
                        f"{type(self).__name__}: take one step before capturing a graph; it makes the state"
                    )
                if is_low_rank(param, group):
                    job = Job.of(param, index, group, self.state[param])
                    job = job.with_gradient() if given[param] is None else job.with_low(given[param])
                    eight_bit = int8_weight(param) is not None
                    place = (param.device, param.dtype, job.shards, eight_bit, misses_roundings(job))
                    low_rank.setdefault(place, []).append(job)
                else:
                    plain.setdefault((param.device, param.dtype), []).append(param)
            for (device, _), params in plain.items():
                step_plain(params, [self.state[param] for param in params], group, amp.on(device), self._bases)
            for (device, *_), jobs in low_rank.items():
                with without_autocast(device.type):
                    step_low_rank(jobs, [self.state[job.param] for job in jobs], amp.on(device), self._bases)


def join(optimizers: list[LowRankOptimizer]) -> None:
    """Has the optimizers of parts of a model draw, and stagger their refreshes, as a single one of all parts does."""
    first = 0
    for optimizer in optimizers:
        optimizer._family, optimizer._first_index = optimizers, first
        first += sum(1 for _ in optimizer._parameters())


class LowRankAdamW(LowRankOptimizer):
    """LowRankOptimizer with the inner rule AdamW. Takes LowRankOptimizer's other keywords."""

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; see torch.optim.Optimizer.add_param_group."""
        rule = param_group.get("rule", self.defaults["rule"]) if isinstance(param_group, dict) else "adamw"
        if rule != "adamw":
            raise ValueError(f"rule: LowRankAdamW has 'adamw', got {rule!r}; use LowRankOptimizer to choose")
        super().add_param_group(param_group)
