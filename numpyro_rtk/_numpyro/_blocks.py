"""What blocks of a composite kernel keep of the values that they are conditioned on, made good when those
have moved.
"""

from typing import Any

from numpyro.infer.gibbs import Gibbs, with_conditioning
from numpyro.infer.mcmc import MCMCKernel


def refresh(kernel: MCMCKernel, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The state of a kernel, for other conditioning values than those it was made with.

    A NumPyro `Gibbs` refreshes a block when a sibling has moved, and takes what encloses it for constant: its
    own `refresh` is the identity, so that the energy that its first block keeps belongs to values of an
    enclosing kernel that are gone. Here all blocks are refreshed.

    Args:
        kernel: A kernel, perhaps a composite one.
        state: Its state.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model, with the conditioning values.
    """
    if not isinstance(kernel, Gibbs):
        return kernel.refresh(state, args, kwargs)
    constrained: Any = kernel.get_constrain_fn(args, kwargs)(state.z)
    blocks = []
    for block, sites, block_state in zip(kernel._kernels, kernel._sites, state.block_states, strict=True):
        siblings = {name: constrained[name] for name in state.z if name not in sites}
        blocks.append(refresh(block, block_state, args, with_conditioning(kwargs, siblings)))
    return state._replace(block_states=tuple(blocks))


def refuse_nested(kernel: MCMCKernel) -> None:
    """Refuse what NumPyro does not refresh.

    Raises:
        TypeError: for a NumPyro `Gibbs` among the blocks of another: it would go on with the energy of values
            that are gone.
    """
    if not isinstance(kernel, Gibbs):
        return
    for block, _ in kernel.blocks:
        if isinstance(block, Gibbs):
            raise TypeError(
                "`inner_kernel` is a `Gibbs` with a `Gibbs` among its blocks, which NumPyro does not refresh "
                "when others have moved: draws would have the wrong law. Put all blocks into one `Gibbs`."
            )
