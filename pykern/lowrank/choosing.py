"""When an optimizer chooses the bases of its parameters anew, and by what."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, distributed, optim

from .amp import Amp
from .bases import basis_of
from .checks import capturing
from .distributed import agree
from .matrices import Job, matrix_shape
from .options import is_low_rank
from .projectors import PROJECTORS, Choice
from .refresh import MOMENTS, is_due, note_refresh
from .residuals import RESIDUALS
from .state import seed_of
from .tracking import keep_lost_momentum, momentum_outside, remembered

ProjectorFunction = Callable[[Tensor, int, bool], Tensor | None]

# In place of a count of steps: ask the device each time.
_UNCOUNTED = -1


def recount(counted: dict[Tensor, int], param: Tensor) -> None:
    """Has the device asked for a parameter's count of steps the next time, and no more often than before."""
    if counted.get(param) != _UNCOUNTED:
        counted.pop(param, None)


def orthonormal(group: dict) -> bool:
    """Whether bases of this group are known to be orthonormal."""
    known = group["projector"] is not None and PROJECTORS[group["projector"]].orthonormal
    return known and basis_of(group).exact


@dataclass(frozen=True)
class Bases:
    """The choice of the bases of one optimizer.

    Attributes:
        projector: the optimizer's own, a function or a tensor, for groups that name none.
        process_group: whose gradients are averaged, or None.
        optimizers: the optimizer, and those of other parts of its model, in order.
        counted: the steps that each parameter has taken, as far as the host knows.
    """

    projector: ProjectorFunction | Tensor | None
    process_group: "distributed.ProcessGroup | None"
    optimizers: list[optim.Optimizer]
    counted: dict[Tensor, int]

    def stepped(self, job: Job) -> None:
        """Counts a step."""
        if self.counted.get(job.param, _UNCOUNTED) != _UNCOUNTED:
            self.counted[job.param] += 1

    def due(self, job: Job, amp: Amp) -> bool:
        """Whether this step chooses the basis anew; it does not where torch.amp.GradScaler has it skipped."""
        done = self.steps_done(job)
        if done is None or not is_due(job, done):
            return False
        if amp.found_inf is None:
            return True
        # What was skipped before was not counted on the device. To ask it waits for it, but only here.
        recount(self.counted, job.param)
        return is_due(job, self.steps_done(job)) and not bool(amp.found_inf)

    def refresh(self, job: Job, source: Tensor, amp: Amp) -> None:
        """Chooses a new basis; `source` [n, length] is what will be projected."""
        state, group = job.state, job.group
        done = self.steps_done(job)
        feedback = RESIDUALS[group["residual"]].feedback
        factor = 1.0 if feedback else amp.gradient_factor(group["maximize"])
        # P has all of the compressed axis.
        whole = source
        if job.partial:
            whole = job.shards.gathered(source, job.shards.compressed, 0, job.compressed)
        chosen = self._choose_basis(job, remembered(job, whole, done, factor))
        other = self._other_basis(job, source) if group["side"] == "full" else None
        if chosen is None or (group["side"] == "full" and other is None):
            return
        # Until the first choice the state has no basis, and no moments to carry over.
        first, basis = int(state["refreshes"]) == 0, basis_of(group)
        kept = [*basis.init(job.outline()), *(["other_projector"] if group["side"] == "full" else [])]
        before = {name: state[name].clone() for name in kept}
        tracked = feedback and group["feedback_momentum"] and not first
        momentum = momentum_outside(job) if tracked else None
        basis.store(job, chosen)
        if other is not None:
            state["other_projector"].copy_(other)
        if not first:
            MOMENTS[group["moments"]](job, before)
        if momentum is not None:
            keep_lost_momentum(job, momentum, source)
        if group["moments"] == "reset" and not first:
            recount(self.counted, job.param)
        note_refresh(job, done, before, self._share_before(job) if group["refresh"] == "staggered" else 0.0)

    def _share_before(self, job: Job) -> float:
        """The part of all matrices, by the work that their bases are, that comes before this one."""
        work, index = [0, 0], 0
        for group in chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            for param in group["params"]:
                if is_low_rank(param, group):
                    rows, columns = matrix_shape(param.shape)
                    work[index >= job.index] += rows * columns * min(rows, columns)
                index += 1
        return work[0] / sum(work)

    def steps_done(self, job: Job) -> int | None:
        """Steps taken before this one, counted on the host where it can; None while a graph is captured."""
        step = job.state["step"]
        if step.device.type == "cpu":
            return int(step)
        if capturing(job.param.device):
            # From now on replays may count steps that the host does not see.
            self.counted[job.param] = _UNCOUNTED
            return None
        done = self.counted.get(job.param)
        if done is None or done == _UNCOUNTED:
            read = int(step)
            if done is None:
                self.counted[job.param] = read
            return read
        return done

    def _choose_basis(self, job: Job, source: Tensor) -> Tensor | None:
        """What the projector gives for this parameter, the same in all processes that share it."""
        name, reduce = job.group["projector"], None
        if job.shards is not None and job.shards.cut(job.shards.along):
            # Of a gradient that is longer along the compressed axis, all is less than its Gram matrix.
            if name is not None and PROJECTORS[name].by_sums and job.compressed <= job.whole_length:
                reduce = job.shards.reduce
            else:
                source = job.shards.gathered(source, job.shards.along, 1, job.whole_length)
        if name is not None:
            projector, refreshes = PROJECTORS[name], int(job.state["refreshes"])
            if refreshes == 0 and job.group["refresh"] == "staggered" and projector.first is not None:
                projector = PROJECTORS[projector.first]
            choice = Choice(
                source,
                job.rank,
                basis_of(job.group).dense(job, job.state) if refreshes > 0 else None,
                seed_of(job.group["seed"], job.index) + refreshes,
                job.right,
                job.index,
                refreshes,
                reduce,
            )
            chosen = projector.choose(choice)
        else:
            chosen = self._given_basis(job, source.mT if job.right else source)
        return self._agreed(job, chosen)

    def _agreed(self, job: Job, chosen: Tensor | None) -> Tensor | None:
        """The basis that the first of the processes chose: eigenvectors of equal matrices may differ between kinds of
        processors."""
        shared = job.shards or self.process_group
        if chosen is not None and shared is not None:
            chosen = chosen.contiguous().clone()
            agree(chosen, shared)
        return chosen

    def _given_basis(self, job: Job, matrix: Tensor) -> Tensor | None:
        """The basis of the caller, from a tensor or a function."""
        if self.projector is None:
            raise ValueError(
                "projector: a group names none, as one does that was saved with a function or a tensor; give the "
                "optimizer that, or the group a name"
            )
        basis = self.projector if isinstance(self.projector, Tensor) else self.projector(matrix, job.rank, job.right)
        if basis is not None and tuple(basis.shape) != (job.compressed, job.rank):
            raise ValueError(
                f"projector: expected shape {(job.compressed, job.rank)} for a {tuple(matrix.shape)} gradient "
                f"projected from the {'right' if job.right else 'left'}, got {tuple(basis.shape)}"
            )
        return basis

    def _other_basis(self, job: Job, source: Tensor) -> Tensor | None:
        """The basis of the other axis, for side "full"."""
        name = job.group["projector"]
        if name is None:
            raise ValueError('side: "full" needs a projector by name, which can choose both bases')
        seed = seed_of(job.group["seed"], ~job.index)
        refreshes = int(job.state["refreshes"])
        previous = job.state["other_projector"] if refreshes > 0 else None
        choice = Choice(source.mT, job.rank, previous, seed + refreshes, not job.right, job.index, refreshes)
        return self._agreed(job, PROJECTORS[name].choose(choice))
