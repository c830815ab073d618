"""Where `ScoreHMC` starts: diffusion sites annealed through the noise levels, the other latents drawn given
them.
"""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
from jaxtyping import Array
from numpyro.handlers import condition, seed
from numpyro.infer.gibbs import with_conditioning
from numpyro.infer.initialization import init_to_median
from numpyro.infer.util import constrain_fn, initialize_model
from numpyro.primitives import Messenger

from numpyro_rtk._moves._accept import select
from numpyro_rtk._moves._leapfrog import Leaves, PathPoint
from numpyro_rtk._numpyro._arguments import resolved_strategy
from numpyro_rtk._numpyro._particle_gibbs import RTKParticleGibbs
from numpyro_rtk._numpyro._score_hmc_chain import Chain
from numpyro_rtk._numpyro._score_hmc_options import Options
from numpyro_rtk._numpyro._score_hmc_problem import JointProblem, Scores
from numpyro_rtk._numpyro._tracing import without_diffusion
from numpyro_rtk._prior._prior import DiffusionPrior


START_PARTICLES = 2
"""Particles of the annealed start: guided moves do the work, and the better of a few is kept at each
level.
"""

START_ROUNDS = 3
"""Rounds of annealing and drawing where there are other latents."""

START_TRAJECTORIES = 100
"""Trajectories that draw the other latents in each round."""

START_MAX_STEPS = 16
"""Leapfrog steps of each, at most."""


class Starter(NamedTuple):
    """What the start of a chain depends on besides its key and what is given."""

    problem: JointProblem
    scores: Scores
    draws: Leaves
    """A prior draw of each diffusion site, at which the other latents are made valid."""
    init_strategy: Any
    """Where the other latents start, as in NumPyro."""

    def find(self, key: Any, given: Leaves) -> Leaves:
        """Unconstrained values of all latents.

        What is given stays. If nothing else is said, the other diffusion sites come from the unconditional
        sweeps that start `RTKParticleGibbs`, given the other latents, and these from a short adaptive HMC run
        given the diffusion sites, in turn. That is a draw, not an optimum: where a hierarchy's density is
        unbounded its mass is elsewhere. Linear in memory; no score evaluation. With `init_to_sample` all
        that is not given is a prior draw.

        Args:
            key: Random key.
            given: Constrained values of some or all latents.
        """
        site_key, other_key, round_key = jr.split(key, 3)
        sampled = is_sample(self.init_strategy)
        x = self.draws
        if sampled:
            keys = jr.split(site_key, len(self.problem.sites))
            x = {
                site.name: _with_score(site.prior, self.scores[site.name]).expand(site.batch_shape).sample(k)
                for site, k in zip(self.problem.sites, keys, strict=True)
                if site.name not in given
            }
        given_z, free = self._others(other_key, x, given)
        z = given_z | free
        open_sites = self.problem.names - set(given)
        if sampled or not (open_sites or free):
            return z
        carry = (z, _unit_mass(free), jnp.asarray(0.1, self._dtype(z)))

        def one_round(carry: Any, key: Any) -> tuple[Any, None]:
            anneal_key, draw_key = jr.split(key)
            z, *tuning = carry
            if open_sites:
                z = self._annealed(anneal_key, z, open_sites)
            if free:
                z, *tuning = self._drawn(draw_key, z, frozenset(free), *tuning)
            return (z, *tuning), None

        rounds = START_ROUNDS if open_sites and free else 1
        return jax.lax.scan(one_round, carry, jr.split(round_key, rounds))[0][0]

    def _dtype(self, z: Leaves) -> Any:
        return jnp.result_type(*z.values())

    def _others(self, key: Any, x: Leaves, given: Leaves) -> tuple[Leaves, Leaves]:
        """Unconstrained values of what is given or a diffusion site, and valid ones of the rest."""
        problem: JointProblem = self.problem
        fixed: Any = x | given
        conditioned = condition(without_diffusion(problem.model), fixed)
        with numpyro.validation_enabled(False):
            free: Any = initialize_model(
                key,
                conditioned,
                init_strategy=resolved_strategy(self.init_strategy),
                dynamic_args=True,
                model_args=problem.args,
                model_kwargs=problem.kwargs,
            ).param_info.z
        # Transforms may depend on other values.
        values = constrain_fn(seed(conditioned, jr.key(0)), problem.args, problem.kwargs, free)
        z = problem.unconstrain(fixed | values)
        return {name: z[name] for name in fixed}, free

    def _annealed(self, key: Any, z: Leaves, names: frozenset[str]) -> Leaves:
        """Diffusion sites of these names anew, given all others; kept where nothing possible is found."""
        problem = self.problem
        others = {name: value for name, value in problem.constrain(z).items() if name not in names}
        kwargs = with_conditioning(problem.kwargs, others) if others else problem.kwargs
        model = _Rescored(problem.model, self.scores)
        kernel = RTKParticleGibbs(model, num_particles=START_PARTICLES, num_pilot_draws=32)
        new = z | kernel.init(key, 0, None, problem.args, kwargs).z
        return select(jnp.isfinite(problem.potential(new)), new, z)

    def _drawn(
        self, key: Any, z: Leaves, names: frozenset[str], inverse_mass: Any, step_size: Array
    ) -> tuple[Leaves, Any, Array]:
        """Other latents of these names by HMC given the rest: they end in the bulk of their law."""
        fixed = {name: value for name, value in z.items() if name not in names}

        def evaluate(free: Leaves) -> PathPoint:
            potential, gradient = jax.value_and_grad(lambda free: self.problem.potential(fixed | free))(free)
            return PathPoint(free, {}, potential, gradient, jnp.ones((), bool))

        options = Options(
            step_size=step_size,  # pyright: ignore[reportArgumentType]
            trajectory_length=2.2,
            adapt_step_size=True,
            adapt_mass_matrix=True,
            dense_mass=False,
            target_accept_prob=0.8,
            inverse_mass_matrix=None,
            max_num_steps=START_MAX_STEPS,
            init_strategy=self.init_strategy,
        )
        chain = Chain(options, evaluate, 0)
        state = chain.start(key, {name: z[name] for name in names}, inverse_mass, START_TRAJECTORIES)
        state = jax.lax.fori_loop(0, START_TRAJECTORIES, lambda _, state: chain.step(state), state)
        adapt = state.adapt_state
        return z | state.z, adapt.inverse_mass_matrix, adapt.step_size


def is_sample(init_strategy: Any) -> bool:
    """Whether it is `init_to_sample`: for NumPyro, the median of one draw."""
    strategy = resolved_strategy(init_strategy)
    return strategy.func is init_to_median and strategy.keywords.get("num_samples") == 1


def _unit_mass(z: Leaves) -> dict[Any, Array]:
    return {tuple(sorted(z)): jnp.ones(sum(value.size for value in z.values()))} if z else {}


class _Rescored(Messenger):
    """A model whose latent diffusion sites have other scores; arrays in them are arguments of a program."""

    def __init__(self, fn: Any, scores: Scores) -> None:
        self.scores = scores
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.scores:
            msg["fn"] = _with_score(msg["fn"], self.scores[msg["name"]])


def _with_score(fn: Any, score: Any) -> Any:
    """The same law with another score callable."""
    if isinstance(fn, DiffusionPrior):
        options: dict[str, Any] = {"reverse": fn.reverse, "density": fn.density}
        if fn.condition is not None:
            options |= {"condition": fn.condition, "condition_ndims": fn.condition.ndim - len(fn.batch_shape)}
        return DiffusionPrior(score.family, fn.event_shape, fn.schedule, segments=fn.segment_times, **options)
    fn = copy.copy(fn)
    fn.base_dist = _with_score(fn.base_dist, score)
    return fn
