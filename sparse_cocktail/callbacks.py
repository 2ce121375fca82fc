"""Co-train a menu in somebody else's loop: callbacks for transformers.Trainer and Lightning.

    from sparse_cocktail.callbacks import CocktailCallback  # LightningCallback for Lightning

    cocktail = Cocktail(convert(model))
    cocktail.add("2:4")
    Trainer(model, ..., callbacks=[CocktailCallback(cocktail)]).train()
    cocktail.save("menu.safetensors")

Such a loop has one forward and backward per step, so the subnets take turns: dense, a subnet,
dense, another one, and so on. transformers and Lightning are imported when their class is first
asked for, never with the library.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from .cocktail import Cocktail
from .data import generator_for
from .freezing import Frozen
from .ops.checks import as_list, whole, wrong_type
from .recalibrate import frozen_statistics

__all__ = ["CocktailCallback", "LightningCallback"]  # noqa: F822 - made by __getattr__


class _Turns:
    """The subnets of a cocktail take turns, one per optimizer step; between steps it is dense.

    Evaluation and checkpoints of the loop therefore see the dense network, under torch.nn's keys.
    In a subnet's step BatchNorm normalises by the batch and leaves the running statistics to the
    dense steps. All micro-batches of an accumulated step use one subnet. The turn depends on the
    seed and the step only, so a resumed run goes on with the same sequence, and all processes of a
    data-parallel run agree; weights sharded over processes (FSDP, ZeRO-3) are not supported.

    Args:
        cocktail: of the model that is trained, or of a part of it.
        names: the subnets that take part; default: all but the dense network, which always does.
            They follow one another in a random order, each equally often.
        seed: of that order.
        every: optimizer steps that a turn lasts.
        batches: inputs of the model, on its device, for BatchNorm statistics of the subnets at the
            end of training; a list, as it is read more than once.
        freeze: undo what the optimizer does to pruned weights in a subnet's step (momentum, weight
            decay). Its state for them runs on.

    Raises:
        ValueError: for no subnet, `every` below 1, or, when training starts, for a cocktail whose
            model is not in the trained one. KeyError: for an unknown subnet.
    """

    def __init__(
        self,
        cocktail: Cocktail,
        names: Sequence[str] | None = None,
        seed: int = 0,
        every: int = 1,
        batches: Iterable[Tensor] | None = None,
        freeze: bool = True,
    ) -> None:
        op = type(self).__name__
        if not isinstance(cocktail, Cocktail):
            raise wrong_type(op, "cocktail", cocktail, "a Cocktail; make one, Cocktail(model)")
        names = list(cocktail.subnets) if names is None else as_list(op, "names", names)
        every = whole(op, "every", every, "give the optimizer steps of a turn")
        seed = whole(op, "seed", seed, "give a whole number")
        if isinstance(batches, (Tensor, Iterator)):
            raise wrong_type(op, "batches", batches, "a list, which is read more than once")
        self.names = [n for n in (cocktail.subnet(n).name for n in names) if n != "dense"]
        if not self.names:
            raise ValueError(
                f"{type(self).__name__}: names={names} holds no sparse subnet to train; add some "
                "with cocktail.add before the callback is made"
            )
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every={every} is below 1; it counts steps")
        self.cocktail, self.seed, self.every = cocktail, seed, every
        self.batches, self.freeze = batches, freeze
        self._open = ExitStack()  # what the present step has changed
        self._frozen: Frozen | None = None
        self._held = False  # what a step may not change

    def turn(self, step: int) -> str:
        """The subnet of an optimizer step, counted from 0 over the whole run."""
        index, sparse = divmod(step // self.every, 2)
        if not sparse:
            return "dense"
        lap, place = divmod(index, len(self.names))
        order = torch.randperm(len(self.names), generator=generator_for(self.seed, lap))
        return self.names[order[place]]

    def _start(self, trained: nn.Module) -> None:
        cocktail = self.cocktail
        if all(module is not cocktail.model for module in trained.modules()):
            raise ValueError(
                f"{type(self).__name__}: the cocktail's {type(cocktail.model).__name__} is not in "
                f"the {type(trained).__name__} that is trained; train cocktail.model, or a module "
                "that holds it"
            )
        if cocktail.norms and self.batches is None:
            warnings.warn(
                f"{type(self).__name__}: the model has BatchNorm; give batches=, or call "
                "cocktail.recalibrate for every subnet after training",
                stacklevel=2,
            )
        self._rest()
        self._frozen = None  # the model may have moved since another training
        dense = cocktail.subnets["dense"]
        if dense.statistics:  # of a loaded menu: from here on they are trained
            present, dense.statistics = dense.statistics, None
            cocktail.activate("dense")
            torch._foreach_copy_(cocktail.statistics(), present)

    def _begin(self, step: int) -> None:
        self._rest()
        name = self.turn(step)
        self.cocktail.activate(name)
        if name != "dense":
            self._open.enter_context(frozen_statistics(self.cocktail.model))

    def _before_update(self) -> None:
        if self.freeze and self.cocktail.active != "dense":
            self._frozen = self._frozen or Frozen(self.cocktail)
            self._frozen.hold([self.cocktail.active])
            self._held = True

    def _rest(self) -> None:
        """Back to the dense network; may be called at any time."""
        if self._held:
            self._frozen.restore()
            self._held = False
        self._open.close()
        self.cocktail.activate("dense")

    def _recalibrate(self) -> None:
        if self.cocktail.norms and self.batches is not None:
            for name in self.names:
                self.cocktail.recalibrate(name, self.batches)


class _Transformers(_Turns):
    __doc__ = f"""Callback for transformers.Trainer. {_Turns.__doc__.strip()}

    Beside every checkpoint the menu is saved as cocktail.safetensors.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._start(model)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._begin(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._before_update()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._rest()

    def on_save(self, args, state, control, **kwargs) -> None:
        self._rest()
        self._recalibrate()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.cocktail.save(folder / "cocktail.safetensors")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._rest()
        self._recalibrate()


class _Lightning(_Turns):
    __doc__ = f"""Callback for Lightning, with automatic optimization. {_Turns.__doc__.strip()}

    Lightning's checkpoints hold the dense network: save the menu with cocktail.save.
    """

    def on_train_start(self, trainer, pl_module) -> None:
        self._start(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._begin(trainer.global_step)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._before_update()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._rest()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._rest()

    def on_train_end(self, trainer, pl_module) -> None:
        self._rest()
        self._recalibrate()


_BASES = {  # hooks, modules to look for the base class in, its name
    "CocktailCallback": (_Transformers, ("transformers",), "TrainerCallback"),
    "LightningCallback": (_Lightning, ("lightning.pytorch", "pytorch_lightning"), "Callback"),
}


def __getattr__(name: str):
    """Join hooks and the framework's base class, now that it is asked for."""
    if name not in _BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hooks, modules, base = _BASES[name]
    reasons = []
    for module in modules:
        try:
            bases = (hooks, getattr(import_module(module), base))
        except ImportError as error:
            reasons.append(str(error))
            continue
        facts = {"__doc__": hooks.__doc__, "__module__": __name__}
        globals()[name] = type(name, bases, facts)
        return globals()[name]
    raise ImportError(
        f"{name} needs {' or '.join(modules)}, which cannot be imported ({'; '.join(reasons)}): "
        "pip install it"
    )
